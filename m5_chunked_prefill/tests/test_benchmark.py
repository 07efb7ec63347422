"""F5.3, F5.5, F5.6, FX.4: the benchmark runs every part, small; contenders give the same tokens."""
from __future__ import annotations

from pathlib import Path

import pytest

from m0_basics.tools.bench import BenchReport
from m0_basics.tools.documents.factbook import read_json_file, read_result
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.tiny_models import save_tiny_model
from m5_chunked_prefill import LLM, benchmark
from m5_chunked_prefill.tools.copy_tasks import TASKS, tasks
from m5_chunked_prefill.tools.facts import bench_results
from m5_chunked_prefill.tools.frontier import Budget
from m5_chunked_prefill.tools.train_draft import train_draft


@pytest.mark.slow
def test_every_part_is_there(tmp_path: Path, tiny_model: TinyModels) -> None:
    folder = tmp_path / "results"
    options = {"model": str(tiny_model("qwen3")), "dtype": "float32", "block_size": 8}
    benchmark.run(options, rounds=1, quick=True, peers=["transformers-static"], output_dir=folder)
    report = BenchReport.load(folder / "bench.json")
    assert [[c.name for c in comparison.contenders] for comparison in report.comparisons] == [
        ["m4", "m5", "transformers-static"], ["m4", "m5"]]
    assert all(c.identical_requests == comparison.workload["num_requests"]
               for comparison in report.comparisons for c in comparison.contenders)
    found = report.measurements
    assert list(found["frontier"]["points"]) == ["m4", "m5 125%", "m5 150%"]
    assert found["frontier"]["compared"]["m4"] == {
        "itl_p99_gain": 1, "throughput_share": 1,
        "over_decode_only": pytest.approx(found["frontier"]["points"]["m4"]["itl_p99_ms"]
                                          / found["frontier"]["decode_only_ms"])}
    assert list(found["short"]["contenders"]) == ["m4", "m5 fcfs", "m5"]
    assert all(c["longest_gap_ms"] > 0 and len(c["gaps"]) == 11 for c in found["giant"]["contenders"].values())
    assert [(e["task"], e["num_requests"]) for e in found["drafts"]] == [("story", 1), ("story", 2)]
    assert {name: c["acceptance"] is None for name, c in found["drafts"][0]["contenders"].items()}["none"]
    assert list(found["thoughts"]) == ["m4", "m5", "m5, half the cache", "m5, suffix"]
    assert {path.stem for path in folder.glob("*.png")} == {"frontier", "giant", "drafts", "no_help"}
    results = bench_results(read_json_file(folder / "bench.json"))
    assert {"bench.frontier.m5_150.itl_p99_gain", "bench.short.m5_fcfs.32.ratio", "bench.giant.m5.longest_gap_ms",
            "bench.drafts.story.1.suffix.ratio", "bench.thoughts.m5_half_the_cache.tokens_per_s"} <= set(results)
    for name, result in results.items():
        assert isinstance(read_result(tmp_path, result.file, result.path), int | float), name


def test_a_budget_is_set_and_taken_back(tiny_model: TinyModels) -> None:
    llm = LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=64)
    scheduler = llm.engine.scheduler
    Budget(num_tokens=5).apply(llm)
    assert (scheduler.token_budget, scheduler.budget.is_fixed) == (5, True)
    Budget(2.0).apply(llm)
    assert (scheduler.token_budget, scheduler.budget.is_fixed) == (scheduler.max_num_batched_tokens, False)
    assert scheduler.budget.max_step_slowdown == 2


def test_tasks_are_the_same_for_the_same_seed_and_never_twice() -> None:
    for kind in TASKS:
        assert tasks(kind, 3, seed=1) == tasks(kind, 3, seed=1)
        assert len({*tasks(kind, 8, seed=1), *tasks(kind, 8, seed=2)}) == 16


@pytest.mark.slow
def test_a_draft_model_learns_from_the_target(tmp_path: Path) -> None:
    """Its loss falls, its folder loads as a draft model, and its first layers' guesses change no token."""
    model = str(save_tiny_model(tmp_path / "target", "qwen3", max_position_embeddings=4096))
    losses = train_draft(tmp_path / "draft", model, num_layers=1, num_prompts=2, output_len=12, num_passes=3,
                         max_model_len=4096)
    assert losses[-1] < losses[0]
    drafting = LLM(model, dtype="float32", max_model_len=128, speculative_method="draft_model",
                   speculative_model=str(tmp_path / "draft"))
    plain = LLM(model, dtype="float32", max_model_len=128)
    [one], [other] = (llm.generate([{"prompt_token_ids": [5, 6, 7]}], use_tqdm=False) for llm in (drafting, plain))
    assert one.outputs[0].token_ids == other.outputs[0].token_ids
