"""F2.4, F2.5, F2.10, F2.14: the benchmark runs every part, small, and its numbers are those of its runs."""
from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from m0_basics.tools.bench import BenchReport, get_workload
from m0_basics.tools.testing.fixtures import TinyModels
from m1_offline.static_batching import StaticBatchLLM
from m2_continuous_batching import LLM, benchmark
from m2_continuous_batching.tools.step_costs import step_costs
from m2_continuous_batching.tools.timeline import StepSpan, mean_occupancy, record_timeline


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModels) -> tuple[BenchReport, Path]:
    folder = tmp_path_factory.mktemp("results")
    options = {"model": str(tiny_model("llama")), "dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 400}
    benchmark.run(options, rounds=1, quick=True, peers=["transformers-static"], output_dir=folder)
    return BenchReport.load(folder / "bench.json"), folder


@pytest.mark.slow
def test_every_part_is_there(report: tuple[BenchReport, Path]) -> None:
    """F2.4: three engines side by side, and peers; every contender does the whole work, with the same tokens."""
    result, folder = report
    names = [[c.name for c in comparison.contenders] for comparison in result.comparisons]
    assert names == [["m1", "m1-static", "m2", "transformers-static"], ["m1-static", "m2", "transformers-static"],
                     *[["m1", "m1-static", "m2"]] * 3, ["m2", "m2-async"]]
    for comparison in result.comparisons:
        assert all(c.identical_requests == comparison.workload["num_requests"] for c in comparison.contenders)
    assert all(c.rounds[0].request_goodput is not None for poisson in result.comparisons[2:5]
               for c in poisson.contenders)
    timelines = result.measurements["timelines"]
    assert list(timelines) == ["static batches", "continuous batching"]
    work = result.comparisons[0].workload
    for rows in timelines.values():             # the runs that the picture is of: a step is [end_s, tokens, firsts]
        ends, tokens, firsts = zip(*rows, strict=True)
        assert list(ends) == sorted(ends) and ends[0] > 0
        assert (sum(tokens), sum(firsts)) == (work["num_output_tokens"], work["num_requests"])
    figures = {p.name for p in folder.glob("*.png")}
    assert figures == {"ragged.png", "equal.png", "timeline.png", "poisson_ttft_ms.png", "poisson_request_goodput.png"}


@pytest.mark.slow
def test_latency_scenarios(report: tuple[BenchReport, Path]) -> None:
    """F2.5, F2.10: each policy and each budget was measured; a longest wait is not below a percentile."""
    latency = report[0].measurements["latency"]
    assert set(latency["policies"]) == {"fcfs", "priority", "ageing:1"}
    for row in latency["policies"].values():
        assert row["longest_ttft_ms"] >= max(row["urgent_ttft_p99_ms"], row["others_ttft_p99_ms"]) > 0
    for name in ("fixed", "adaptive"):
        assert latency["budget"][name]["stream_itl_max_ms"] >= latency["budget"][name]["stream_itl_p99_ms"] > 0


def test_a_timeline_counts_every_token(tiny_model: TinyModels) -> None:
    """F2.13: one row per step, in order of time; continuous batching takes fewer steps than a static batch."""
    workload = get_workload("ragged-6:output_max=20").fit_vocabulary(256)
    options = {"dtype": "float32", "max_model_len": 400, "skip_tokenizer_init": True, "max_num_seqs": 2}
    rows = record_timeline(LLM(str(tiny_model("llama")), **options), workload)
    assert sum(row.num_tokens for row in rows) == workload.num_output_tokens
    assert all(a.end_s < b.end_s for a, b in pairwise(rows))
    assert max(row.num_tokens for row in rows) == 2
    static = record_timeline(StaticBatchLLM(str(tiny_model("llama")), **options), workload)
    assert sum(row.num_tokens for row in static) == workload.num_output_tokens


def test_mean_occupancy_by_hand() -> None:
    """One second with four sequences, three seconds with one: seven sequence-seconds in four seconds."""
    assert mean_occupancy([StepSpan(1.0, 4), StepSpan(4.0, 1)]) == pytest.approx(7 / 4)


def test_step_costs_are_of_the_real_step(tiny_model: TinyModels) -> None:
    """The parts add up, and watching changes no token."""
    options = {"dtype": "float32", "max_model_len": 200, "skip_tokenizer_init": True, "max_num_seqs": 4}
    llm = LLM(str(tiny_model("llama")), **options)
    costs = step_costs(llm, 4, steps=3)
    parts = [costs[f"{part}_share"] for part in ("schedule", "prepare", "model", "conclude")]
    assert all(share > 0 for share in parts)
    assert sum(parts) == pytest.approx(1, abs=0.2), "medians of shares"
    assert 0 < costs["metadata_s"] < costs["prepare_s"], "metadata is a part of prepare"
    assert costs["prompt_len"] == 64
    assert not llm.engine.has_unfinished_requests()
    assert llm.engine.scheduler.kv_cache_manager.usage == 0
