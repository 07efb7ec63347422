"""What milestone 4's benchmark found, as tables on the screen and as figures."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from m0_basics.tools.bench import BenchReport, Series, line_plot, throughput_bars

PLOTTED_BATCH = 16                  # sequences, in the figure of decode over the context
WAYS = {"kernel": "the kernel", "loop": "SDPA, one call a sequence", "padded": "SDPA, one padded call",
        "naive": "all scores, then a softmax"}
KINDS = {"native": "this milestone's", "onednn": "oneDNN, packed", "torch": "torch, as stored"}
PARTS = ("lookups", "linear", "attention", "elementwise", "sampling", "python")
Entries = list[dict[str, Any]]


def print_tables(report: BenchReport) -> None:
    """Attention, linear layers and the parts of a step, where they were measured."""
    console, found = Console(), report.measurements
    if "attention" not in found:
        return
    for kind, entries in found["attention"].items():
        console.print(_table(f"Attention of one layer, {kind}: milliseconds", ("batch", "context"), entries,
                             [f"{way}_s" for way in WAYS], 1e3))
    console.print(_table("One prompt: megabytes that a layer's attention needs", ("context",), found["prefill_memory"],
                         [f"{way}_bytes" for way in WAYS], 1e-6))
    console.print(_table("gate_up_proj, weights from memory: milliseconds", ("rows",), found["linear"],
                         [f"{kind}_s" for kind in KINDS], 1e3))
    apart = [{"num_sequences": s["num_sequences"], **s["apart"]} for s in found["steps"]]
    for title, steps in (("the engine", found["steps"]), ("layer by layer", apart)):
        console.print(_table(f"A decode step, {title}: milliseconds", ("num_sequences",), steps,
                             [f"{part}_s" for part in ("step", "layers", *PARTS)], 1e3))


def _table(title: str, keys: tuple[str, ...], entries: Entries, columns: list[str], scale: float) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD)
    for name in (*keys, *columns):
        table.add_column(name.removesuffix("_s").removesuffix("_bytes"), justify="right")
    for entry in entries:
        numbers = [f"{scale * entry[name]:.3f}" if name in entry else "-" for name in columns]
        table.add_row(*(str(entry[key]) for key in keys), *numbers)
    return table


def draw(report: BenchReport, output_dir: Path) -> None:
    """The figures of a whole report."""
    ragged, single = report.comparisons
    throughput_bars(ragged, output_dir / "ragged.png", f"{ragged.workload['num_requests']} ragged requests")
    throughput_bars(single, output_dir / "single.png", "One request")
    found = report.measurements
    if "attention" not in found:
        return
    hero = WAYS["kernel"]
    for kind, batch, title, xlabel in (
            ("decode", PLOTTED_BATCH, f"Decode, {PLOTTED_BATCH} sequences: one layer's attention",
             "tokens of each sequence"), ("prefill", 1, "One prompt: one layer's attention", "tokens of the prompt")):
        entries = [e for e in found["attention"][kind] if e["batch"] == batch]
        line_plot(_lines(entries, "context", "_s", WAYS, 1e3), output_dir / f"attention_{kind}.png", title=title,
                  xlabel=xlabel, ylabel="milliseconds", log_x=True, log_y=True, hero=hero, unit=" ms")
    if found["prefill_memory"]:
        line_plot(_lines(found["prefill_memory"], "context", "_bytes", WAYS, 1e-6), output_dir / "prefill_memory.png",
                  title="One prompt: memory that a layer's attention needs", xlabel="tokens of the prompt",
                  ylabel="megabytes", log_x=True, log_y=True, hero=hero, unit=" MB")
    line_plot(_lines(found["linear"], "rows", "_gflops", KINDS, 1), output_dir / "linear.png", log_x=True, log_y=True,
              title="The largest linear layer (gate_up_proj), its weights from memory", xlabel="rows", ylabel="GFLOP/s",
              hero=KINDS["native"])
    steps = found["steps"]
    line_plot({part: Series([s["num_sequences"] for s in steps], [100 * s["apart"][f"{part}_share"] for s in steps])
               for part in PARTS}, output_dir / "step.png",
              title="Where the time of a decode step goes, layer by layer", xlabel="sequences", ylabel="per cent",
              log_x=True, unit="%")


def _lines(entries: Entries, x: str, suffix: str, labels: dict[str, str], scale: float) -> dict[str, Series]:
    """A line for each label that has values, where it has some. 0 has no place on a logarithmic axis."""
    lines = {label: [(e[x], scale * e[key + suffix]) for e in entries if e.get(key + suffix, 0) > 0]
             for key, label in labels.items()}
    return {label: Series([x for x, _ in points], [y for _, y in points]) for label, points in lines.items() if points}
