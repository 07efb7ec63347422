"""Benchmark of milestone 3: blocks against rows, at the same memory.

  memory      64 ragged requests in a cache of fixed size: how many run side by side, and how fast is that?
  roomy       the same with memory for all: what do block tables and gathers cost where there is no need for them?
  block size  the same with other block sizes: small blocks waste less, large ones need fewer look-ups
  preemption  a cache too small for all that runs: swapped to host memory, or recomputed
  crossover   one sequence out and in again, by both ways, over its length
  cache error a cache of fewer bits, or of fewer tokens: how far off is the next token's distribution?
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import m2_continuous_batching as m2
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
from m2_continuous_batching.tools.step_costs import step_costs
from m2_continuous_batching.tools.timeline import as_rows, draw_timelines, record_timeline

from .llm import LLM
from .tools.cache_error import cache_errors
from .tools.crossover import crossover
from .tools.fragmentation import FragmentationMeter

DEFAULT_PEERS = ("transformers-continuous",)
MEMORY_ROWS = 8                     # rows of 1,024 tokens: the memory that both have in the first table
MAX_NUM_SEQS = 64
BLOCK_SIZES = (1, 4, 8, 16, 32, 128)
CROSSOVER_LENGTHS = (32, 64, 128, 256, 512, 768)
STEP_SEQUENCES, STEP_PROMPT = 64, 300      # decoding side by side, each with that many tokens or a few more


def run(config_options: dict[str, Any], *, workload: str | None = None, rounds: int = 3, quick: bool = False,
        peers: Sequence[str] = (), peer_python: Sequence[Path] = (), output_dir: Path) -> BenchReport:
    """Run everything, or one named `workload` over all contenders; print, save JSON and figures, return the report.

    `quick` shrinks every part until it takes seconds; its numbers mean nothing.
    """
    base = {"max_model_len": 1024, **config_options}
    chosen = get_workload(workload or ("ragged-64:num_requests=6,output_max=20" if quick else "ragged-64"))
    row_size = base["max_model_len"] = max(base["max_model_len"], chosen.longest)
    rows = m2.LLM(**base, max_num_seqs=MEMORY_ROWS)
    chosen = chosen.fit_vocabulary(rows.spec.vocab_size)
    size = base.get("block_size", 16)
    blocks = LLM(**(base | {"num_blocks": MEMORY_ROWS * row_size // size, "max_num_seqs": MAX_NUM_SEQS}))
    same_memory: list[Contender] = [
        EngineContender("m2", rows, f"{MEMORY_ROWS} rows of {row_size} tokens"),
        EngineContender("m3", blocks, f"the same memory in {MEMORY_ROWS * row_size // size} blocks of {size}")]
    with ExitStack() as stack:
        names = list(peers) or list(DEFAULT_PEERS)
        others = [stack.enter_context(peer) for peer in make_peers(names, peer_python, rows, row_size)]
        comparisons = [compare([*same_memory, *others], chosen, rounds, baseline="m2")]
    if workload is not None:
        report = BenchReport.create("m3_paged_kv", base, tuple(comparisons))
        report.print()
        report.save(output_dir / f"bench-{chosen.name.partition(':')[0]}.json")
        return report
    comparisons += [_roomy(base, chosen, rounds), _block_sizes(base, chosen, rounds), _preemption(base, chosen, rounds)]
    concurrency = {"m2": _running(rows, chosen), "m3": _running(blocks, chosen)}
    lengths = (16, 32) if quick else CROSSOVER_LENGTHS
    ways = crossover(blocks, lengths, rounds)
    steps = step_costs(LLM(**(base | {"max_num_seqs": STEP_SEQUENCES})), 4 if quick else STEP_SEQUENCES,
                       prompt_len=64 if quick else STEP_PROMPT)
    errors = cache_errors(base, length=96, num_texts=2, budget=64) if quick else cache_errors(base)
    report = BenchReport.create("m3_paged_kv", base, tuple(comparisons), {
        "concurrency": concurrency, "crossover": ways, "step_costs": steps, "cache_error": errors,
        "block_sizes": {str(s): _utilisation(base, chosen, s) for s in BLOCK_SIZES},
        "timelines": {"rows": as_rows(record_timeline(rows, chosen)),
                      "blocks": as_rows(record_timeline(blocks, chosen))}})
    report.print()
    report.save(output_dir / "bench.json")
    draw(report, output_dir)
    return report


def _roomy(base: dict[str, Any], workload: Workload, rounds: int) -> Comparison:
    """Memory for everybody: rows and blocks run the same steps."""
    return compare([EngineContender("m2", m2.LLM(**base, max_num_seqs=MAX_NUM_SEQS), "a row for each request"),
                    EngineContender("m3", LLM(**base, max_num_seqs=MAX_NUM_SEQS), "blocks for each request")],
                   workload, rounds)


def _block_sizes(base: dict[str, Any], workload: Workload, rounds: int) -> Comparison:
    contenders = [EngineContender(f"block {s}", LLM(**(base | {"block_size": s, "max_num_seqs": MAX_NUM_SEQS})))
                  for s in BLOCK_SIZES]
    return compare(contenders, workload, rounds, baseline="block 16")


def _preemption(base: dict[str, Any], workload: Workload, rounds: int) -> Comparison:
    """Blocks for a quarter of what runs when there is room: sequences have to give way again and again."""
    few = max(-(-workload.longest // 16), len(workload.requests) * workload.longest // (16 * 4 * 2))
    options = base | {"block_size": 16, "num_blocks": few, "max_num_seqs": MAX_NUM_SEQS}
    return compare([EngineContender("recompute", LLM(**(options | {"swap_space": 0})), f"{few} blocks"),
                    EngineContender("swap", LLM(**(options | {"swap_space": 1.0})), f"{few} blocks, and host memory")],
                   workload, rounds)


def _running(llm: m2.LLM | LLM, workload: Workload) -> dict[str, float]:
    """Sequences that got a token per step: the most, and the mean over the steps."""
    counts = [row.num_tokens for row in record_timeline(llm, workload)]
    return {"most": max(counts), "mean": sum(counts) / len(counts)}


def _utilisation(base: dict[str, Any], workload: Workload, block_size: int) -> float:
    """Share of the reserved slots that held a token, on average over the steps of a run."""
    meter = FragmentationMeter()
    llm = LLM(**(base | {"block_size": block_size, "max_num_seqs": MAX_NUM_SEQS}), plugins=[meter])
    EngineContender("m3", llm).serve(workload)
    return meter.mean_utilisation


def draw(report: BenchReport, output_dir: Path) -> None:
    """The figures of a whole report."""
    throughput_bars(report.comparisons[0], output_dir / "same_memory.png", "The same memory")
    if timelines := report.measurements.get("timelines"):
        draw_timelines(timelines, MAX_NUM_SEQS, output_dir / "timeline.png")
    ways = report.measurements["crossover"]
    lengths = [w["length"] for w in ways]
    line_plot({"recompute": Series(lengths, [w["recompute_s"] * 1e3 for w in ways]),
               "swap out and in": Series(lengths, [w["swap_s"] * 1e3 for w in ways])}, output_dir / "crossover.png",
              title=f"Bringing {lengths[-1]:,} tokens back: computing them takes "
                    f"{ways[-1]['recompute_s'] / ways[-1]['swap_s']:.0f} times as long as copying",
              xlabel="tokens of the sequence", ylabel="milliseconds", log_y=True, unit=" ms")
    errors = report.measurements["cache_error"]
    lines = dict[str, Series]()
    for name, variant in errors["variants"].items():        # 0 has no place on the axis: nothing is forgotten yet
        points = [(x, y) for x, y in zip(errors["positions"], variant["kl"], strict=True) if y > 0]
        lines[name] = Series([x for x, _ in points], [y for _, y in points])
    line_plot(lines, output_dir / "cache_error.png", title="Error of the next token, by what the cache keeps",
              xlabel="position", ylabel="KL divergence from a cache in float32, nats", log_y=True)
