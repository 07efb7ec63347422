"""Benchmark of milestone 1: against milestone 0 and transformers, one request and several.

Four questions, each with its own table and entry in the JSON:
  one request     how fast is a decode step, beside transformers' `generate` on the same weights?
  growth          what does a token cost as the sequence grows, with a cache and without one?
  several         what does static batching with padding gain over one request at a time, and what does it waste?
  step            how much of a decode step is not the model? (metadata and sampling, 32 sequences)
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import m0_basics
from m0_basics.tools.analysis.growth import growth
from m0_basics.tools.bench import (
    BenchReport,
    Comparison,
    Contender,
    EngineContender,
    Series,
    Workload,
    compare,
    get_workload,
    line_plot,
    make_peers,
    throughput_bars,
)

from .llm import LLM
from .static_batching import StaticBatchEngine, StaticBatchLLM
from .tools import step_costs

DEFAULT_PEERS = ("transformers", "transformers-static")
BATCH_SIZE = 16             # of the static batches, ours and transformers'
STEP_SEQUENCES = 32
GROWTH_LENGTHS = (16, 64, 128, 256, 512, 1024)


def run(config_options: dict[str, Any], *, workload: str | None = None, rounds: int = 3, quick: bool = False,
        peers: Sequence[str] = (), peer_python: Sequence[Path] = (), output_dir: Path) -> BenchReport:
    """Run everything, or one named `workload` over all contenders; print, save JSON and figures, return the report.

    `quick` shrinks every part until it takes seconds; its numbers mean nothing.
    """
    names = list(peers) or list(DEFAULT_PEERS)
    if workload is not None:
        report = _named(config_options, get_workload(workload), rounds, names, peer_python)
        report.print()
        report.save(output_dir / f"bench-{report.comparisons[0].workload['name'].partition(':')[0]}.json")
        return report
    single = get_workload("single:output_len=8" if quick else "single")
    several = get_workload(f"ragged-64:num_requests={4 if quick else 16}")
    lengths = (16, 32) if quick else GROWTH_LENGTHS
    options = {"max_model_len": max(1100, single.longest, several.longest), **config_options}

    cached = LLM(**options)
    single, several = (w.fit_vocabulary(cached.spec.vocab_size) for w in (single, several))
    naive = m0_basics.LLM(**options)
    growth_points = {"m0": growth(naive, lengths, rounds), "m1": growth(cached, lengths, rounds)}
    comparisons = [_one_request(cached, naive, single, rounds, names, peer_python, options["max_model_len"])]
    del naive
    comparisons.append(_several(cached, options, several, rounds, names, peer_python))
    steps = step_costs.measure(LLM(**(options | {"max_num_seqs": STEP_SEQUENCES, "max_model_len": 256})),
                               STEP_SEQUENCES, rounds)

    report = BenchReport.create("m1_offline", options, tuple(comparisons), {
        "growth": growth_points, "step_costs": steps, "static_batching": _slots(options, several)})
    report.print()
    _print_steps(steps)
    report.save(output_dir / "bench.json")
    draw(report, output_dir)
    return report


def draw(report: BenchReport, output_dir: Path) -> None:
    """The figures of a whole report."""
    single, several = report.comparisons
    throughput_bars(single, output_dir / "one_request.png", "One request")
    throughput_bars(several, output_dir / "several_requests.png", f"{several.workload['num_requests']} ragged requests")
    draw_growth(report.measurements["growth"], output_dir)


def _one_request(cached: LLM, naive: m0_basics.LLM, workload: Workload, rounds: int, peers: Sequence[str],
                 peer_python: Sequence[Path], max_model_len: int) -> Comparison:
    """m1 against m0 and everything that runs one request at a time."""
    contenders: list[Contender] = [EngineContender("m1", cached), EngineContender("m0", naive)]
    single = [name for name in peers if name != "transformers-static"]
    baseline = "transformers" if "transformers" in single else "m1"
    return _compare(contenders, make_peers(single, peer_python, cached, max_model_len), workload, rounds, baseline)


def _several(cached: LLM, options: dict[str, Any], workload: Workload, rounds: int, peers: Sequence[str],
             peer_python: Sequence[Path]) -> Comparison:
    """One request at a time against left-padded batches, ours and transformers'."""
    static = StaticBatchLLM(**(options | {"max_num_seqs": BATCH_SIZE}))
    contenders: list[Contender] = [EngineContender("m1", cached, "one request at a time"),
                                   EngineContender("m1-static", static, f"left-padded batches of {BATCH_SIZE}")]
    return _compare(contenders, make_peers(peers, peer_python, cached, options["max_model_len"]), workload, rounds)


def _named(options: dict[str, Any], workload: Workload, rounds: int, peers: Sequence[str],
           peer_python: Sequence[Path]) -> BenchReport:
    options = {"max_model_len": max(1024, workload.longest), **options}
    cached = LLM(**options)
    workload = workload.fit_vocabulary(cached.spec.vocab_size)
    comparison = _several(cached, options, workload, rounds, peers, peer_python)
    return BenchReport.create("m1_offline", options, (comparison,))


def _compare(ours: list[Contender], peers: list[Contender], workload: Workload, rounds: int,
             baseline: str = "m1") -> Comparison:
    try:
        return compare([*ours, *peers], workload, rounds, baseline=baseline)
    finally:
        for peer in peers:
            peer.close()


def _slots(options: dict[str, Any], workload: Workload) -> dict[str, int]:
    """Token slots that the static batches of `workload` computed, and how many of them held a token."""
    llm = StaticBatchLLM(**(options | {"max_num_seqs": BATCH_SIZE}))
    EngineContender("m1-static", llm).serve(workload)
    assert isinstance(llm.engine, StaticBatchEngine)
    useful = workload.num_prompt_tokens + workload.num_output_tokens - len(workload.requests)
    return {"run": llm.engine.num_slots_run, "useful": useful, "batch_size": BATCH_SIZE}


def _print_steps(steps: list[dict[str, Any]]) -> None:
    table = Table(title=f"a decode step of {STEP_SEQUENCES} sequences")
    for column in ("sampling", "metadata ms", "sampling ms", "step ms", "not the model"):
        table.add_column(column, justify="right")
    for s in steps:
        table.add_row(s["sampling"], f"{s['metadata_s'] * 1e3:.2f}", f"{s['sample_s'] * 1e3:.2f}",
                      f"{s['step_s'] * 1e3:.1f}", f"{s['overhead']:.1%}")
    Console().print(table)


def draw_growth(points: dict[str, Any], output_dir: Path) -> None:
    """Time and FLOPs of the next token over the length of the sequence, with and without a cache."""
    names = {"m0": "m0: everything again", "m1": "m1: with a KV cache"}
    for key, file, ylabel, factor, unit, message in (
            ("seconds", "growth.png", "milliseconds per token", 1e3, " ms",
             "After {length:,} tokens a KV cache makes the next one {ratio:.0f} times faster"),
            ("flops", "growth_flops.png", "GFLOP per token", 1e-9, " GFLOP",
             "After {length:,} tokens without a KV cache the next one costs {ratio:.0f} times the work")):
        lines = {names[m]: Series([p["length"] for p in points[m]], [p[key] * factor for p in points[m]])
                 for m in points}
        ends = [points[m][-1] for m in ("m0", "m1")]
        title = message.format(length=ends[1]["length"], ratio=ends[0][key] / ends[1][key])
        line_plot(lines, output_dir / file, title=title, xlabel="tokens so far", ylabel=ylabel, unit=unit)
