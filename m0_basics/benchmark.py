"""Benchmark of milestone 0: the cost of recomputing everything.

  one request    against transformers' `generate`, without a cache (the same work) and with one (what it costs
                 not to have one)
  growth         time and FLOPs of the next token as the sequence grows, beside the calculator's prediction: O(n)
  total          FLOPs of whole outputs, counted while they are generated: the sum of those steps, O(n^2)
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .llm import LLM
from .tools.analysis.calculators import prefill_flops
from .tools.analysis.flop_count import count_flops
from .tools.analysis.growth import growth
from .tools.bench import (
    BenchReport,
    EngineContender,
    Series,
    compare,
    get_workload,
    line_plot,
    make_peers,
    throughput_bars,
)

GROWTH_LENGTHS = (16, 64, 128, 256, 512, 1024)
DEFAULT_PEERS = ("transformers-no-cache", "transformers")


def run(config_options: dict[str, Any], *, workload: str | None = None, rounds: int = 3, quick: bool = False,
        peers: Sequence[str] = (), peer_python: Sequence[Path] = (), output_dir: Path) -> BenchReport:
    """Run everything (or `workload` instead of the default one); print, save JSON and figures, return the report.

    `quick` shrinks every part until it takes seconds; its numbers mean nothing.
    """
    work = get_workload(workload or ("single:output_len=4" if quick else "single:output_len=32"))
    lengths = (16, 32) if quick else GROWTH_LENGTHS
    output_lens = (2, 4) if quick else (4, 8, 16, 32, 64, 128)
    options = {"max_model_len": max(lengths[-1] + 2, work.longest), **config_options}
    llm = LLM(**options)
    work = work.fit_vocabulary(llm.spec.vocab_size)
    contenders = make_peers(list(peers) or list(DEFAULT_PEERS), peer_python, llm, options["max_model_len"])
    try:
        comparison = compare([EngineContender("m0", llm), *contenders], work, rounds, baseline="m0")
    finally:
        for contender in contenders:
            contender.close()
    points = growth(llm, lengths, rounds)
    for point in points:
        point["predicted_flops"] = prefill_flops(llm.spec, point["length"]).total

    totals = [{"output_len": n, "flops": _total_flops(llm, n)} for n in output_lens]

    report = BenchReport.create("m0_basics", options, (comparison,), {"growth": points, "total": totals})
    report.print()
    report.save(output_dir / "bench.json")
    draw(report, output_dir)
    return report


def draw(report: BenchReport, output_dir: Path) -> None:
    """The figures of a report."""
    throughput_bars(report.comparisons[0], output_dir / "one_request.png", "One request")
    points = report.measurements["growth"]
    line_plot({"m0: everything again": Series([p["length"] for p in points], [p["seconds"] * 1e3 for p in points])},
              output_dir / "growth.png", title="Without a cache each next token costs more", xlabel="tokens so far",
              ylabel="milliseconds per token", unit=" ms")
    draw_total(report.measurements["total"], output_dir / "total_flops.png")


def _total_flops(llm: LLM, output_len: int) -> int:
    """FLOPs of an output of so many tokens after a prompt of one, counted while it is generated."""
    work = get_workload("decode", output_len=output_len, prompt_len=1).fit_vocabulary(llm.spec.vocab_size)
    return count_flops(lambda: EngineContender("m0", llm).serve(work))


def draw_total(totals: Sequence[dict[str, int]], path: Path) -> Path:
    """Counted FLOPs over the length of the output, beside a line of slope 2 through the first point."""
    x = [t["output_len"] for t in totals]
    first = totals[0]["flops"]
    lines = {"m0, counted": Series(x, [t["flops"] * 1e-9 for t in totals]),
             "n squared": Series(x, [first * 1e-9 * (n / x[0]) ** 2 for n in x], dashed=True)}
    more = totals[-1]["flops"] / totals[-2]["flops"]
    return line_plot(lines, path, title=f"Without a cache an output of {x[-1]:,} tokens costs {more:.1f} times one of "
                     f"{x[-2]:,}", xlabel="output tokens", ylabel="GFLOP", log_x=True, log_y=True)
