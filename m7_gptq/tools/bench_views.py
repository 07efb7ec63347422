"""What milestone 7's benchmark and its quality suite found, as tables on the screen and as figures."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from m0_basics.tools.bench import BenchReport
from m0_basics.tools.bench.figures import throughput_bars
from m5_chunked_prefill.tools import draft_table

from .quality_suite import METHODS

Rows = list[tuple[str, ...]]
DRAFTERS = {"folder": "the 4-bit folder drafts", "own": "the model's own 4-bit file drafts"}
SPEEDS = ("Bytes and speed: of one folder for each number of bits, its inputs as they come; 3 bits are held as 4. "
          "Inputs in an order of activations cost a gather more, and are not timed.")


def key(name: str) -> str:
    """A contender's name where a path of names leads to a number: without dots."""
    return name.replace(".", "_")


def print_tables(report: BenchReport) -> None:
    """A table for each part."""
    found, console = report.measurements, Console()
    limits = found["limits"]
    rows: Rows = [(name, f"{size / 1e6:.1f}", f"{found['decode_tokens_per_s'][name]:.1f}",
             f"{limits['tokens_per_s'][name]:.0f}", f"{limits['share'][name]:.0%}")
            for name, size in found["weight_bytes"].items()]
    console.print(_table(f"One request, once its first token is there; the memory gives "
                         f"{limits['bytes_per_second'] / 1e9:.1f} GB/s",
                         ("", "weights, MB", "tokens/s", "limit", "share of it"), rows))
    names = [c["name"] for c in report.to_dict()["comparisons"][0]["contenders"]]
    rows = [(way, workload, *(f"{ratios[key(n)]:.2f}" if key(n) in ratios else "-" for n in names))
            for workload, ways in found["speedup"].items() for way, ratios in ways.items()]
    console.print(_table("Output tokens per second, over each other's", ("", "", *names), rows))
    if "linear" in found:
        kinds = [key for key in found["linear"][0] if key.endswith("_ms")]
        rows = [(str(e["rows"]), *(f"{e[kind]:.3f}" for kind in kinds)) for e in found["linear"]]
        console.print(_table("The linear products of all layers, weights from memory: milliseconds",
                             ("rows", *(kind.removesuffix("_ms") for kind in kinds)), rows))
    if found.get("phases"):
        kinds = list(found["phases"][0]["phases"])
        rows = [(e["name"], str(e["num_requests"]), f"{e['call_ms']:.2f}",
                 *(f"{e['phases'][kind]['ms']:.2f}" for kind in kinds)) for e in found["phases"]]
        console.print(_table("A decode step's native call, and what its phases add to it: milliseconds",
                             ("", "requests", "call", *(kind.replace("_", " ") for kind in kinds)), rows))
    rows = [(e["task"], str(e["num_requests"]), name, f"{c['tokens_per_s']:.1f}", f"{c['decode_ratio']:.2f}",
             "-" if c["acceptance"] is None else f"{c['acceptance']:.0%}")
            for e in found["drafts"] for name, c in e["contenders"].items()]
    console.print(_table("Packed weights draft for the full ones", ("task", "requests", "draft", "tokens/s", "decode",
                                                                    "right"), rows))


def quality_table(quality: dict[str, Any], bench: dict[str, Any] | None) -> Table:
    """Every way to hold the weights: perplexity, and, where the benchmark ran, bytes and speed of its form.

    Speed depends on a form's bits, its activations and its order of inputs, not on how its codes were found.
    """
    rows: Rows = []
    texts = list(dict.fromkeys(text for row in quality.values() for text in row.get("perplexity", {})))
    for name in in_order(quality):
        row = quality[name]
        if "perplexity" not in row or name.startswith("tiny"):
            continue
        form = form_of(name, row.get("options", {}))
        speed = speed_of(bench, form) if bench and form else ("-",) * 3
        rows.append((name, *(_number(row["perplexity"].get(text)) for text in texts), *speed))
        for way, values in row.get("int8_activations", {}).items():
            exact = speed_of(bench, "m7") if bench and "group" in way else ("-",) * 3
            rows.append((f"  + activations of 8 bits, {way}", *(_number(values.get(text)) for text in texts), *exact))
    own = bench["measurements"].get("perplexity", {}) if bench else {}
    for name in own:                        # by the engine's own kernels, on the first windows of the text
        assert bench is not None
        rows.append((f"{name}, as it runs", *(_number(own[name]) if text == "test" else "-" for text in texts),
                     *speed_of(bench, name)))
    table = _table("Perplexity; no choice has seen the text 'test'. 'As it runs': by the engine's kernels, on a part",
                   ("", *texts, "weights, MB", "decode, tokens/s", "64 requests, tokens/s"), rows)
    if bench:
        table.caption, table.caption_justify = SPEEDS, "left"
    return table


def choices_table(rows: dict[str, Any]) -> Table:
    """What the defaults were chosen by: each change of one thing, at each number of bits."""
    bits = list(dict.fromkeys(name.partition(" ")[0] for name in rows if " bits: " in name))
    full = rows.get("full precision", {}).get("perplexity", {}).get("dev")
    lines: Rows = [] if full is None else [("full precision", *[_number(full)] * len(bits))]
    for choice in dict.fromkeys(name.partition(": ")[2] for name in rows if " bits: " in name):
        found = (rows.get(f"{number} bits: {choice}", {}).get("perplexity", {}).get("dev") for number in bits)
        lines.append((choice, *map(_number, found)))
    return _table("Perplexity of 'dev', by which defaults were chosen", ("", *(f"{number} bits" for number in bits)),
                  lines)


def in_order(rows: dict[str, Any]) -> list[str]:
    """The rows' names: bits as they come in the file, methods from the simplest to the best."""
    bits, ladder = list(dict.fromkeys(name.partition(": ")[0] for name in rows)), list(METHODS)

    def place(name: str) -> tuple[int, int]:
        number, _, method = name.partition(": ")
        return bits.index(number), ladder.index(method) if method in ladder else 0

    return sorted(rows, key=place)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def form_of(name: str, options: dict[str, Any]) -> str | None:
    """The contender whose speed a row of the quality suite has, with activations as they are.

    None where there is none: the benchmark's folders have their inputs as they come.
    """
    if name.startswith("full"):
        return "m6"
    if options.get("desc_act") and not options.get("act_group_aware"):
        return None
    if name.startswith(("4 bits", "3 bits")):           # 3 bits are held as 4
        return "m7-a16"
    return "m7-8bit" if name.startswith("8 bits") else None


def speed_of(bench: dict[str, Any], name: str) -> tuple[str, str, str]:
    """Megabytes of weights, tokens per second in decode, and of 64 requests at once."""
    found = bench["measurements"]
    if name not in found["weight_bytes"]:
        return "-", "-", "-"
    [ragged] = [c["output_throughput"] for c in bench["comparisons"][0]["contenders"] if c["name"] == name]
    return (f"{found['weight_bytes'][name] / 1e6:.0f}", f"{found['decode_tokens_per_s'][name]:.0f}", f"{ragged:.0f}")


def draw(report: BenchReport, output_dir: Path) -> None:
    """The figures of a whole report."""
    ragged, single = report.comparisons
    throughput_bars(ragged, output_dir / "ragged.png", f"{ragged.workload['num_requests']} ragged requests")
    throughput_bars(single, output_dir / "single.png", "One request")
    draft_table.draw(report.measurements["drafts"], output_dir / "drafts.png", DRAFTERS)


def _table(title: str, columns: tuple[str, ...], rows: Rows) -> Table:
    table = Table(*columns, title=title, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    return table
