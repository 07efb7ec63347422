"""F3.7, F3.9, F3.10: the benchmark runs every part, small; rows and blocks give the same tokens."""
from __future__ import annotations

from pathlib import Path

import pytest

from m0_basics.tools.bench import BenchReport
from m0_basics.tools.documents.factbook import read_result
from m0_basics.tools.testing.fixtures import TinyModels
from m3_paged_kv import LLM, benchmark
from m3_paged_kv.tools.cache_error import all_variants
from m3_paged_kv.tools.crossover import crossover
from m3_paged_kv.tools.facts import bench_results


@pytest.mark.slow
def test_every_part_is_there(tmp_path: Path, tiny_model: TinyModels) -> None:
    options = {"model": str(tiny_model("llama")), "dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 400}
    benchmark.run(options, rounds=1, quick=True, peers=["transformers"], output_dir=tmp_path / "results")
    report = BenchReport.load(tmp_path / "results" / "bench.json")
    names = [[c.name for c in comparison.contenders] for comparison in report.comparisons]
    assert names == [["m2", "m3", "transformers"], ["m2", "m3"], [f"block {s}" for s in benchmark.BLOCK_SIZES],
                     ["recompute", "swap"]]
    assert all(c.identical_requests == comparison.workload["num_requests"]
               for comparison in report.comparisons for c in comparison.contenders)
    shares = list(report.measurements["block_sizes"].values())
    assert shares[0] == 1.0, "blocks of one token waste nothing"
    assert all(0 < share <= 1 for share in shares)
    steps = report.measurements["step_costs"]
    assert 0 < steps["metadata_s"] < steps["prepare_s"] < steps["step_s"]
    assert 0 < steps["metadata_share"] < steps["prepare_share"] < 1
    errors = report.measurements["cache_error"]
    assert errors["positions"] == [32, 64, 96]
    assert set(errors["variants"]) == set(all_variants(64))
    timelines = report.measurements["timelines"]
    assert list(timelines) == ["rows", "blocks"]
    work = report.comparisons[0].workload
    for rows in timelines.values():                         # the runs that the picture is of: [end_s, tokens, firsts]
        ends, tokens, firsts = zip(*rows, strict=True)
        assert list(ends) == sorted(ends) and ends[0] > 0
        assert (sum(tokens), sum(firsts)) == (work["num_output_tokens"], work["num_requests"])
    figures = {path.name for path in (tmp_path / "results").glob("*.png")}
    assert figures == {"same_memory.png", "timeline.png", "crossover.png", "cache_error.png"}
    measured = len(report.measurements["crossover"])        # of the lengths that documents quote, a quick run has two
    missing = tuple(f"bench.crossover.{length}." for length in benchmark.CROSSOVER_LENGTHS[measured:])
    for name, result in bench_results().items():
        if not name.startswith(missing):
            assert isinstance(read_result(tmp_path, result.file, result.path), (int, float)), name


def test_crossover_leaves_nothing_behind(tiny_model: TinyModels) -> None:
    llm = LLM(str(tiny_model("llama")), dtype="float32", skip_tokenizer_init=True, max_model_len=128, num_blocks=16)
    ways = crossover(llm, (16, 40), rounds=1)
    assert [w["length"] for w in ways] == [16, 40]
    assert all(w["recompute_s"] > 0 and w["swap_s"] > 0 for w in ways)
    assert (llm.manager.usage, len(llm.manager.swapped), llm.manager.swapped.host_pool.num_used) == (0.0, 0, 0)



def test_no_host_memory_no_measurement(tiny_model: TinyModels) -> None:
    """F3.6: without host memory the measurement refuses to pretend."""
    llm = LLM(str(tiny_model("llama")), dtype="float32", skip_tokenizer_init=True, max_model_len=128, num_blocks=16,
              swap_space=0)
    with pytest.raises(AssertionError, match="swap_space has room"):
        crossover(llm, (16,), rounds=1)
