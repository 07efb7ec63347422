"""What milestone 5's benchmark found, as tables on the screen and as figures."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from m0_basics.tools.bench import BenchReport
from m0_basics.tools.bench.figures import grouped_bars

from . import draft_table, frontier, waits


def print_tables(report: BenchReport) -> None:
    """A table for each part."""
    found, console = report.measurements, Console()
    lines = found["frontier"]
    rows: list[tuple[str, ...]]
    rows = [(name, _number(p["itl_p99_ms"]), _number(p["itl_max_ms"]), _number(p["output_throughput"]),
             _number(p["long_ttft_ms"]), f"{c['itl_p99_gain']:.2f}", f"{c['throughput_share']:.2f}",
             f"{c['over_decode_only']:.2f}")
            for (name, p), c in zip(lines["points"].items(), lines["compared"].values(), strict=True)]
    console.print(_table(f"Streams while long prompts come; a step of decodes alone: {lines['decode_only_ms']:.1f} ms",
                         ("", "P99 ITL ms", "longest ms", "tokens/s", "long TTFT ms", "P99 gain", "throughput",
                          "P99 / decode"), rows))
    rows = [(name, length, _number(v["alone_ms"]), _number(v["behind_ms"]), f"{v['ratio']:.2f}", _number(v["giant_ms"]))
            for name, by_length in found["short"]["contenders"].items() for length, v in by_length.items()]
    console.print(_table(f"A short prompt behind one of {found['short']['giant']:,} tokens: TTFT",
                         ("", "tokens", "alone ms", "behind ms", "ratio", "the giant's ms"), rows))
    rows = [(name, _number(v["longest_gap_ms"]), _number(v["giant_ttft_ms"]), _number(v["output_throughput"]))
            for name, v in found["giant"]["contenders"].items()]
    console.print(_table("A giant prompt among streams", ("", "longest gap ms", "its TTFT ms", "tokens/s"), rows))
    rows = [(e["task"], str(e["num_requests"]), name, _number(c["tokens_per_s"]), f"{c['ratio']:.2f}",
             f"{min(c['ratios']):.2f}-{max(c['ratios']):.2f}", f"{c['decode_ratio']:.2f}",
             "-" if c["acceptance"] is None else f"{c['acceptance']:.0%}")
            for e in found["drafts"] for name, c in e["contenders"].items()]
    columns = ("task", "requests", "drafter", "tokens/s", "ratio", "rounds", "decode", "right")
    console.print(_table("Drafts", columns, rows))
    rows = [(name, *(_number(v) for v in values.values())) for name, values in found["thoughts"].items()]
    console.print(_table("Long thoughts", ("", *next(iter(found["thoughts"].values()))), rows))


def draw(report: BenchReport, output_dir: Path) -> None:
    """The figures of a whole report."""
    found = report.measurements
    frontier.draw(found["frontier"], output_dir / "frontier.png")
    names = ("requests at once", "a long prompt alone")
    bars = {name: {c.name: c.ratio for c in comparison.contenders if c.name.startswith("m")}
            for name, comparison in zip(names, report.comparisons, strict=True)}
    grouped_bars(bars, output_dir / "no_help.png", title="Nothing decodes meanwhile: m5's throughput over m4's",
                 ylabel="times m4's throughput", line=1.0)
    waits.draw_gaps(found["giant"], output_dir / "giant.png")
    draft_table.draw(found["drafts"], output_dir / "drafts.png")


def _table(title: str, columns: tuple[str, ...], rows: list[Any]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"
