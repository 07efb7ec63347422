"""The pictures that benchmarks draw: bars of throughput, bars in groups, lines of one quantity over another."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m0_basics.config import require

from . import style
from .harness import Comparison


@dataclass(frozen=True)
class Series:
    """One line: y over x, drawn solid or dashed, or level up to each point; `labels` stand beside its points,
    the last one behind the name."""

    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    level: bool = False
    labels: Sequence[str] = ()


def throughput_bars(comparison: Comparison, path: Path, title: str | None = None) -> Path:
    """Draw the median output throughput of each contender, the whiskers reaching from its slowest to its fastest
    round; behind each bar its value, and the median of the rounds' ratios to the baseline.

    `title` is what was run; the headline is made of it and of the result.
    """
    results = comparison.contenders[::-1]                               # from below: the first is at the top
    figure, axes = style.new_figure(height=1.3 + 0.42 * len(results))
    names = [c.name for c in results]
    medians = [c.output_throughput for c in results]
    lowest = [min(r.output_throughput for r in c.rounds) for c in results]
    highest = [max(r.output_throughput for r in c.rounds) for c in results]
    whiskers = [[m - low for m, low in zip(medians, lowest, strict=True)],
                [high - m for m, high in zip(medians, highest, strict=True)]]
    chosen = style.heroes(names)
    axes.barh(range(len(names)), medians, xerr=whiskers, height=0.62,
              color=[style.HERO if n in chosen else style.GREY for n in names],
              error_kw={"ecolor": style.INK, "elinewidth": 0.8, "capsize": 2})
    for i, result in enumerate(results):
        against = "" if result.name == comparison.baseline else f"   x{result.ratio:.2f}"
        axes.annotate(f"{style.short(medians[i])}{against}", (highest[i], i), xytext=(7, 0),
                      textcoords="offset points", va="center", fontsize=9, color=style.INK,
                      fontweight="bold" if result.name in chosen else "normal")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.28 * max(highest))
    _plain_numbers(axes.xaxis)
    axes.set_xlabel(f"output tokens per second; x: against {comparison.baseline}, round by round. "
                    "Whiskers: slowest and fastest round", fontsize=8)
    figure.suptitle(headline(comparison, title or str(comparison.workload["name"])), x=0.01, ha="left", fontsize=12,
                    fontweight="bold", color=style.INK)             # above the names too: it is longer than the bars
    return style.write(figure, path)


def headline(comparison: Comparison, what: str) -> str:
    """`what`, and how the newest milestone stands to the baseline; or, where it is the baseline, the fastest other."""
    others = {c.name: c.ratio for c in comparison.contenders if c.name != comparison.baseline}
    if not others:
        return what
    mine = style.heroes([c.name for c in comparison.contenders]) & set(others)
    who = max(mine or others, key=lambda name: others[name])
    whose = comparison.baseline + ("'" if comparison.baseline.endswith("s") else "'s")
    return f"{what}: {who} has {others[who]:.2f} times {whose} throughput"


def line_plot(series: Mapping[str, Series], path: Path, *, title: str, xlabel: str, ylabel: str,
              log_x: bool = False, log_y: bool = False, hero: str | None = None, unit: str | None = "") -> Path:
    """Draw several lines on linear or logarithmic axes; at their ends their names, last values and the `unit` of these
    (None: names alone). The `hero` is the newest milestone where none is named."""
    figure, axes = style.new_figure(width=8.2)
    colours = style.colours(list(series), hero)
    chosen = style.heroes(list(series)) if hero is None else {hero}
    for i, (name, line) in enumerate(series.items()):
        marker = "o" if len(line.x) <= 20 else ""
        dash = "--" if line.dashed else style.DASHES[i % len(style.DASHES)] if chosen and name not in chosen else "-"
        axes.plot(line.x, line.y, linestyle=dash, marker=marker, markersize=4, color=colours[name],
                  linewidth=2.4 if name in chosen else 1.6, zorder=3 if name in chosen else 2,
                  drawstyle="steps-pre" if line.level else "default")
        for k, label in enumerate(line.labels[:-1]):            # on the side where the line does not go on
            side = -1 if line.y[k + 1] < line.y[k] else 1
            axes.annotate(label, (line.x[k], line.y[k]), xytext=(6 * side, -3), textcoords="offset points", va="top",
                          ha="left" if side == 1 else "right", fontsize=8, color=style.text_colour(colours[name]))
    if log_x:
        axes.set_xscale("log", base=2)
    elif len(places := sorted({x for line in series.values() for x in line.x})) <= 4:
        axes.set_xticks(places)
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    style.title(axes, title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color=style.FAINT)
    series = {name: line for name, line in series.items() if line.x}        # nothing to draw, nothing to name
    last = max((x for line in series.values() for x in line.x), default=0)
    ends = []
    for name, line in series.items():
        value = "" if unit is None else f"  {style.short(line.y[-1])}{unit}"
        if line.labels and line.labels[-1]:
            value = f": {line.labels[-1]}{value}"
        early = "" if unit is None or line.x[-1] == last else f" at {line.x[-1]:,g}"
        ends.append((name + value + early, line.x[-1], line.y[-1], colours[name]))
    style.label_ends(axes, ends)
    return style.write(figure, path)


def grouped_bars(groups: Mapping[str, Mapping[str, float]], path: Path, *, title: str, ylabel: str,
                 line: float | None = None, line_name: str = "") -> Path:
    """Draw a group of bars for each key, one bar for each name in it, with values; a dashed `line` at that height, and
    beside it its name.

    The names stand above the axes, in the colours of their bars.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure, axes = style.new_figure(width=max(7.5, 2 + 0.42 * len(names) * len(groups)))
    colours = style.colours(names)
    width = 0.84 / max(1, len(names))
    most = max(value for group in groups.values() for value in group.values())
    for i, name in enumerate(names):
        places = [g + (i - (len(names) - 1) / 2) * width for g in range(len(groups))]
        bars = axes.bar(places, [group.get(name, 0.0) for group in groups.values()], 0.92 * width, color=colours[name])
        texts = axes.bar_label(bars, labels=[style.short(group[name]) if name in group else ""
                                             for group in groups.values()], padding=2, fontsize=7.5, color=style.INK)
        for text, bar in zip(texts, bars, strict=True):
            if line is not None and 0 <= line - bar.get_height() < 0.06 * most:     # the line would cross it out
                text.set_bbox({"facecolor": style.PAPER, "edgecolor": "none", "pad": 0.4})
    if line is not None:
        axes.axhline(line, linestyle="--", color=style.INK, linewidth=1, zorder=0.9)
        axes.annotate(line_name, (1, line), xycoords=("axes fraction", "data"), xytext=(6, 0), va="center",
                      textcoords="offset points", fontsize=9, color=style.INK, annotation_clip=False)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.tick_params(axis="x", length=0)
    style.title(axes, title, pad=28)
    axes.set_ylabel(ylabel)
    axes.margins(y=0.1)
    style.names_above(axes, colours)
    return style.write(figure, path)


def _plain_numbers(axis: Any) -> None:
    """10,000 instead of a power of ten, and no labels between the ticks unless there are few ticks."""
    ticker = require("matplotlib.ticker", "a figure")
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    few = low > 0 and high / low < 1000
    axis.set_minor_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}" if f"{value:g}"[0] in "25" else "")
                             if few and axis.axis_name == "y" else ticker.NullFormatter())
