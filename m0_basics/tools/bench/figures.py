"""The pictures that benchmarks draw: bars of throughput, bars in groups, lines of one quantity over another."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m0_basics.config import require

from .harness import Comparison


@dataclass(frozen=True)
class Series:
    """One line: y over x, drawn solid or dashed."""

    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def throughput_bars(comparison: Comparison, path: Path, title: str | None = None) -> Path:
    """Draw the median output throughput of each contender, the whiskers reaching from its slowest to its fastest
    round."""
    figure, axes = _new_figure(width=1.6 + 1.5 * len(comparison.contenders))
    names = [c.name for c in comparison.contenders]
    medians = [c.output_throughput for c in comparison.contenders]
    lowest = [min(r.output_throughput for r in c.rounds) for c in comparison.contenders]
    highest = [max(r.output_throughput for r in c.rounds) for c in comparison.contenders]
    whiskers = [[m - low for m, low in zip(medians, lowest, strict=True)],
                [high - m for m, high in zip(medians, highest, strict=True)]]
    colours = ["#9aa5b1" if n == comparison.baseline else "#2f6f9f" for n in names]
    axes.bar(range(len(names)), medians, yerr=whiskers, capsize=4, color=colours)
    for i, result in enumerate(comparison.contenders):
        axes.annotate(f"x{result.ratio:.2f}", (i, highest[i]), xytext=(0, 5), textcoords="offset points", ha="center")
    axes.set_xticks(range(len(names)), [n.replace(" ", "\n") for n in names])
    axes.set_ylabel("output tokens per second")
    axes.set_ylim(0, 1.15 * max(highest))
    axes.set_title(title or str(comparison.workload["name"]))
    return _write(figure, path)


def line_plot(series: Mapping[str, Series], path: Path, *, title: str, xlabel: str, ylabel: str,
              log_x: bool = False, log_y: bool = False) -> Path:
    """Draw several lines with their names, on linear or logarithmic axes."""
    figure, axes = _new_figure()
    for name, line in series.items():
        marker = "o" if len(line.x) <= 20 else ""
        axes.plot(line.x, line.y, "--" if line.dashed else "-", marker=marker, markersize=4, label=name)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(require("matplotlib.ticker", "a figure").ScalarFormatter())
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend()
    return _write(figure, path)


def grouped_bars(groups: Mapping[str, Mapping[str, float]], path: Path, *, title: str, ylabel: str,
                 line: float | None = None) -> Path:
    """Draw a group of bars for each key, one bar for each name in it; a dashed `line` at that height."""
    figure, axes = _new_figure(width=2 + 1.5 * len(groups))
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        places = [g + (i - (len(names) - 1) / 2) * width for g in range(len(groups))]
        bars = axes.bar(places, [group.get(name, 0.0) for group in groups.values()], width, label=name)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    if line is not None:
        axes.axhline(line, linestyle="--", color="#555555", linewidth=1)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_title(title)
    axes.set_ylabel(ylabel)
    axes.legend()
    return _write(figure, path)


def _new_figure(width: float = 7.0) -> tuple[Any, Any]:
    # A figure of its own, not pyplot's global one: nothing to close, and no display is looked for.
    figure = require("matplotlib.figure", "a figure").Figure(figsize=(max(width, 4.5), 4.2), layout="constrained")
    return figure, figure.add_subplot()


def _write(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
