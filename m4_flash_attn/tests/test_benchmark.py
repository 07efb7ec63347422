"""F4.1, F4.3, F4.4: the benchmark runs every part, small; contenders give the same tokens, ways the same values."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from m0_basics import SamplingParams
from m0_basics.loading.loader import load_spec
from m0_basics.tools.bench import BenchError, BenchReport
from m0_basics.tools.bench.harness import Comparison, ContenderResult
from m0_basics.tools.bench.metrics import RunMetrics
from m0_basics.tools.cli.options import as_flags
from m0_basics.tools.documents.factbook import read_json_file, read_result
from m0_basics.tools.testing.fixtures import TinyModels
from m4_flash_attn import LLM, benchmark
from m4_flash_attn.tools import phase_times
from m4_flash_attn.tools.attention_bench import AttentionCase, peak_bytes, prefill_memory
from m4_flash_attn.tools.facts import bench_results
from m4_flash_attn.tools.start_up import first_token_s
from m4_flash_attn.tools.step_parts import Stopwatch, step_parts, timed_engine


@pytest.mark.slow
def test_every_part_is_there(tmp_path: Path, tiny_model: TinyModels) -> None:
    """It starts the command, which builds the kernels once more: the only test here that takes long."""
    folder = tmp_path / "results"
    options = {"model": str(tiny_model("parrot")), "dtype": "float32", "max_model_len": 400}
    benchmark.run(options, rounds=1, quick=True, peers=["transformers-static"], output_dir=folder)
    report = BenchReport.load(folder / "bench.json")
    contenders = ["m4", "m4-sdpa", "m4-unfused", "m3", "m2", "transformers-static"]
    assert [[c.name for c in comparison.contenders] for comparison in report.comparisons] == [contenders] * 2
    assert all(c.identical_requests == comparison.workload["num_requests"]
               for comparison in report.comparisons for c in comparison.contenders)
    found = report.measurements
    assert set(found["speedup"]["single"]) == set(contenders[1:])
    assert found["limits"]["single"]["tokens_per_s"] == pytest.approx(
        found["limits"]["bytes_per_second"] / found["limits"]["single"]["bytes_per_token"])
    single = report.comparisons[1]
    for c in single.contenders:         # of the bandwidth in each contender's own turns
        [metrics], [bandwidth] = c.rounds, c.probes
        assert found["limits"]["single"]["decode_share"][c.name] == pytest.approx(
            found["limits"]["single"]["bytes_per_token"] / (1e-3 * metrics.tpot_ms.median) / bandwidth)
    assert [(e["batch"], e["context"]) for e in found["attention"]["decode"]] == [(1, 16), (1, 40), (16, 16), (16, 40)]
    assert all(e[f"{way}_s"] > 0 for entries in found["attention"].values() for e in entries
               for way in ("kernel", "loop", "padded", "naive"))
    assert [entry["rows"] for entry in found["linear"]] == [1, 4]
    assert found["start"]["cold_s"] - found["start"]["warm_s"] == pytest.approx(found["start"]["build_s"])
    figures = {"ragged", "single", "attention_decode", "attention_prefill", "linear", "step"}
    figures |= {"prefill_memory"} if sys.platform == "linux" else set()
    assert {path.stem for path in folder.glob("*.png")} == figures
    results = bench_results(read_json_file(folder / "bench.json"))
    assert {"bench.ragged.m4_over.m3", "bench.single.m4.limit_share", "bench.attention.16x40.padded_s",
            "bench.prefill.40.sdpa_s", "bench.linear.4.native_s", "bench.step.2.apart.attention_share",
            "bench.step.1.python_share", "bench.build_s"} <= set(results)
    for name, result in results.items():
        assert isinstance(read_result(tmp_path, result.file, result.path), int | float), name


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_all_ways_compute_the_same(batch: int, prefill: bool, tiny_model: TinyModels) -> None:
    """F4.1: what is timed is attention."""
    case = AttentionCase(load_spec(tiny_model("llama")), torch.float32, batch, 37, prefill)
    expected = case.batch.expected().float().flatten(1)
    ways = case.ways()
    assert list(ways) == ["kernel", "loop", "padded", "naive"]
    for name, run in ways.items():
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_peak_memory_counts_what_is_gone_again(tiny_model: TinyModels) -> None:
    """F4.3: by size, by hand; twice the same, though malloc could use the first one's pages again. O(n^2), and O(n)."""
    size = 48 << 20
    for _ in range(2):
        assert peak_bytes(lambda: torch.ones(size // 4).sum().item()) == pytest.approx(size, rel=0.05)
    spec = load_spec(tiny_model("llama"))
    short, long = prefill_memory(spec, torch.float32, (1024, 2048))
    scores = spec.num_attention_heads * 2048 * 2048 * 4
    assert 2 * scores < long["naive_bytes"] < 5 * scores
    assert long["naive_bytes"] == pytest.approx(4 * short["naive_bytes"], rel=0.1)
    output = 2048 * spec.num_attention_heads * spec.head_dim * 4
    assert 0 < long["kernel_bytes"] < 4 * output < scores / 8       # the system counts pages in dozens: no lower bound


def test_parts_of_a_step_add_up(tiny_model: TinyModels) -> None:
    """Both ways of looking: all layers in one call, and part by part. Nothing is left behind."""
    llm = LLM(str(tiny_model("qwen3")), dtype="float32", skip_tokenizer_init=True, max_model_len=64, max_num_seqs=2)
    [entry] = step_parts(llm, (2,), prompt_len=8, steps=3)
    apart = entry["apart"]
    parts = [{key.removesuffix("_share") for key in costs if key.endswith("_share")} for costs in (entry, apart)]
    assert parts == [{"lookups", "layers", "sampling", "python", "step"},
                     {"lookups", "linear", "attention", "elementwise", "sampling", "python", "step"}]
    for costs in (entry, apart):
        assert all(0 < value < 1 for key, value in costs.items() if key.endswith("_share") and key != "step_share")
    assert llm.manager.usage == 0


@pytest.mark.parametrize("num_sequences", [1, 6])
def test_phases_of_the_native_call(num_sequences: int, tiny_model: TinyModels) -> None:
    """Every phase has its time, and together they are no more than the call."""
    llm = LLM(str(tiny_model("qwen3")), dtype="float32", skip_tokenizer_init=True, max_model_len=64, max_num_seqs=8)
    step = phase_times.measure(llm, num_sequences, prompt_len=8, steps=3)
    assert {phase.name for phase in step.phases} == {*phase_times.LAYER, "output_matrix"}
    assert all(phase.seconds > 0 for phase in step.phases) and llm.manager.usage == 0
    of_first = [phase.work[0] + phase.wait[0] for phase in step.phases]
    assert 0 < sum(of_first) < step.total
    assert 0 < step.products <= sum(phase.seconds for phase in step.phases)
    assert phase_times.table(step)["call_ms"] == pytest.approx(1e3 * step.total)


def test_phases_need_one_native_call(tiny_model: TinyModels) -> None:
    llm = LLM(str(tiny_model("qwen3")), dtype="float32", skip_tokenizer_init=True, max_model_len=64,
              attention_backend="sdpa")
    with pytest.raises(ValueError, match="not one native call"):
        phase_times.measure(llm, 1)


@pytest.mark.parametrize("apart", [False, True])
def test_a_watched_engine_makes_the_same_tokens(apart: bool, tiny_model: TinyModels) -> None:
    options = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 64, "max_num_seqs": 2}
    llm = LLM(str(tiny_model("qwen3")), **options)
    prompts = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (3, 9)]
    greedy = SamplingParams(temperature=0, max_tokens=12)
    expected = [out.outputs[0].token_ids for out in llm.generate(prompts, greedy, use_tqdm=False)]
    llm.engine = timed_engine(llm, Stopwatch(), apart)
    assert [out.outputs[0].token_ids for out in llm.generate(prompts, greedy, use_tqdm=False)] == expected


def test_speedups_are_medians_of_ratios() -> None:
    """12 / 10, 30 / 10, 90 / 50: the median is 1.8; the ratio of the medians would be 3."""
    def result(name: str, *throughput: float) -> ContenderResult:
        rounds = tuple(RunMetrics(1, 1, 1, 1.0, 1.0, t, 1.0, None, None, None, None) for t in throughput)
        return ContenderResult(name, "", rounds, (1.0,) * len(rounds), 1)

    comparison = Comparison({}, "m3", (result("m4", 12.0, 30.0, 90.0), result("m3", 10.0, 10.0, 50.0)))
    assert benchmark.speedups(comparison) == {"m3": 1.8}


def test_flags_of_a_command() -> None:
    assert as_flags({"max_model_len": 64, "fused_layers": False, "enforce_eager": True, "num_blocks": None}) == [
        "--max-model-len", "64", "--no-fused-layers", "--enforce-eager"]


@pytest.mark.slow
def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="model"):
        first_token_s({"model": str(tmp_path / "nothing")}, tmp_path)
