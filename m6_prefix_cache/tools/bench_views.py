"""What milestone 6's benchmark found, as tables on the screen and as figures."""
from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from m0_basics.tools.bench import BenchReport
from m0_basics.tools.bench.figures import grouped_bars

from . import ttft, warm_restart


def print_tables(report: BenchReport) -> None:
    """A table for each part."""
    found, console = report.measurements, Console()
    rows = [(f"{e['share']:.0%}", *(f"{c['ttft_ms']:.1f}" for c in e["contenders"].values()),
             f"{e['contenders']['m6']['gain']:.2f}") for e in found["ttft"]]
    console.print(_table(f"TTFT of {found['ttft'][0]['length']:,} tokens by the share that is known",
                         ("known", *(f"{name}, ms" for name in found["ttft"][0]["contenders"]), "gain"), rows))
    rows = [(e["trace"], name, f"{c['ttft_ms']:.1f}", f"{c['gain']:.2f}", f"{c['hit_share']:.0%}")
            for e in found["traces"] for name, c in e["contenders"].items()]
    console.print(_table("Traces, one visit at a time", ("trace", "", "TTFT ms", "gain", "found"), rows))
    rows = [(e["trace"], f"{e['blocks']:,}", *(f"{w['share']:.1%} ({w['of_belady']:.0%})" for w in e["ways"].values()))
            for e in found["replay"]]
    console.print(_table("Hits, and of Belady's", ("trace", "blocks", *found["replay"][0]["ways"]), rows))
    columns = [key for key in found["lookup"][0] if key.startswith("lookup_us")]
    rows = [(e["index"], f"{e['blocks']:,}", *(f"{e[key]:.0f}" for key in columns), f"{e['bytes_per_block']:.0f}")
            for e in found["lookup"]]
    console.print(_table("A look-up, microseconds", ("index", "cached blocks",
                                                     *(f"{key.rpartition('_')[2]} tokens" for key in columns),
                                                     "bytes / block"), rows))
    rows = [(name, f"{b['seconds']:.3f}", f"{b['share']:.2%}") for name, b in found["bookkeeping"].items()]
    console.print(_table("Requests that share nothing: the cache manager alone", ("", "seconds", "of the run"), rows))
    disk = found["disk"]
    rows = [(f"{e['tokens']:,}", *(f"{ms:.1f}" for ms in e["ms"].values()),
             ", ".join(f"{way}: {what}" for way, what in e["chosen"].items())) for e in disk["lengths"]]
    console.print(_table(f"After a restart: TTFT, ms; a block of {disk['block_tokens']} tokens has "
                         f"{disk['block_bytes']:,} bytes", ("tokens", *disk["lengths"][0]["ms"], "chosen"), rows))


def draw(report: BenchReport, output_dir: Path) -> None:
    """The figures of a whole report."""
    found = report.measurements
    ttft.draw(found["ttft"], output_dir / "ttft.png")
    warm_restart.draw(found["disk"], output_dir / "restart.png")
    largest = max(e["blocks"] for e in found["replay"])
    smallest = min(e["blocks"] for e in found["replay"])
    for size, name in ((smallest, "hits-small"), (largest, "hits-large")):
        groups = {e["trace"]: {way: 100 * w["share"] for way, w in e["ways"].items()}
                  for e in found["replay"] if e["blocks"] == size}
        grouped_bars(groups, output_dir / f"{name}.png", title=f"Prompt tokens found in a cache of {size:,} blocks",
                     ylabel="% of the prompts' tokens")


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(*columns, title=title, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    return table
