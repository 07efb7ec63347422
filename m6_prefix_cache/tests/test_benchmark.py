"""F6.6, F6.8, FX.4: the benchmark runs every part, small; contenders give the same tokens."""
from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from m0_basics.tools.bench import BenchReport, EngineContender, get_workload
from m0_basics.tools.documents.factbook import read_json_file, read_result
from m0_basics.tools.testing.fixtures import TinyModels
from m6_prefix_cache import LLM, benchmark
from m6_prefix_cache.tools import bookkeeping, warm_restart
from m6_prefix_cache.tools.facts import bench_results

OPTIONS = {"dtype": "float32", "block_size": 8}


@pytest.mark.slow
def test_every_part_is_there(tmp_path: Path, tiny_model: TinyModels) -> None:
    folder = tmp_path / "results"
    benchmark.run({"model": str(tiny_model("qwen3")), **OPTIONS}, rounds=1, quick=True, peers=["transformers-static"],
                  output_dir=folder)
    report = BenchReport.load(folder / "bench.json")
    assert [[c.name for c in comparison.contenders] for comparison in report.comparisons] == [
        ["m5", "m6"], ["m5", "m6", "transformers-static"]]
    assert all(c.identical_requests == comparison.workload["num_requests"]
               for comparison in report.comparisons for c in comparison.contenders)
    found = report.measurements
    assert [e["share"] for e in found["ttft"]] == [0, 0.5, 0.8, 0.95]
    assert all(e["contenders"]["m5"]["hit_share"] == 0 for e in found["traces"])
    assert {way: w["of_belady"] for way, w in found["replay"][0]["ways"].items()}["belady"] == 1
    assert all(0 < b["share"] < 1 for b in found["bookkeeping"].values())
    assert {path.stem for path in folder.glob("*.png")} == {"ttft", "restart", "hits-small", "hits-large"}
    results = bench_results(read_json_file(folder / "bench.json"))
    assert {"bench.ttft.95.m6.gain", "bench.shared.transformers_static.ratio", "bench.trace.multi_turn.m6.hit_share",
            "bench.lookup.radix.1000.lookup_us_1024", "bench.disk.65.10_MB_per_s.ms"} <= set(results)
    for name, result in results.items():
        assert isinstance(read_result(tmp_path, result.file, result.path), int | float), name


def test_a_cold_contender_finds_only_what_its_own_round_brings(tiny_model: TinyModels) -> None:
    llm = LLM(str(tiny_model("qwen3")), **OPTIONS, max_model_len=128)
    workload = get_workload("equal-1:prompt_len=40,output_len=2").fit_vocabulary(llm.spec.vocab_size)
    counts = []
    for contender in (EngineContender("cold", llm, before_run=llm.reset_prefix_cache), EngineContender("warm", llm)):
        contender.run(workload)
        before = llm.manager.index.version
        contender.run(workload)
        counts.append(llm.manager.index.version - before)
    assert counts[0] > counts[1] == 0


def test_the_stopwatch_counts_a_call_once_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    class Thing:
        def inner(self) -> None:
            self.time = next(clock)

        def outer(self) -> None:
            self.inner()

    clock = itertools.count()
    monkeypatch.setattr(bookkeeping.time, "perf_counter", lambda: next(clock))
    thing, watch = Thing(), bookkeeping.Stopwatch()
    watch.around(thing, ("inner", "outer", "missing"))
    thing.outer()                                           # 0: outer begins, 1: inner begins, 2: the call, 3: the end
    assert watch.seconds == 3
    watch.take_off()
    thing.outer()
    assert watch.seconds == 3
    assert list(vars(thing)) == ["time"]


@pytest.mark.slow
def test_a_slow_disk_is_read_where_that_pays(tiny_model: TinyModels) -> None:
    """F6.8. Each way is forced and gives a time; with a disk of 0.1 MB/s the engine computes by itself."""
    options = {"model": str(tiny_model("qwen3")), **OPTIONS, "max_model_len": 128}
    found = warm_restart.measure(options, 3, (17, 65), slow=(0.1,))
    assert [list(e["ms"]) for e in found["lengths"]] == [["recompute", "in memory", "disk", "0 MB/s"]] * 2
    assert all(e["chosen"]["0 MB/s"] == "recompute" for e in found["lengths"])
    assert found["lengths"][1]["ms"]["0 MB/s"] >= 8 * found["block_bytes"] / 0.1e6 * 1e3 * 0.99
