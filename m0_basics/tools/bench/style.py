"""How all figures look: the milestone in colour, others grey, names and values beside what they belong to, no boxes.

A reader's eye goes to the one thing that the figure is about. Nothing has to be looked up in a legend, and nothing
stands over the data.
"""
from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from m0_basics.config import require

INK, HERO, GREY, FAINT, PAPER = "#22313f", "#2f6f9f", "#9aa5b1", "#e8ecf0", "#ffffff"
# Where nobody is the hero.
CYCLE = (HERO, "#e08a3c", "#4c9a6a", "#b5483a", "#7d6aa8", "#5b6770", "#3aa0a0", "#a8892c")
MUTED = "#5f6b76"                           # text about something grey: grey itself is too pale to read
GREYS = ("#7d8894", "#a9b2bb", "#939ea9", "#bcc4cb", "#6b7681")
ORANGE, GREEN, RED = CYCLE[1:4]
SKY = "#9cc3de"                             # the hero's pale companion
DASHES = ("-", "--", ":", "-.", (0, (5, 1)))
_MILESTONE = re.compile(r"m(\d)(?!\d)")
_SETTINGS = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "xtick.color": INK,
             "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": PAPER,
             "axes.axisbelow": True}


def new_figure(width: float = 7.5, height: float = 4.2, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its axes (a list of them with `rows` above 1), in this style.

    A figure of its own, not pyplot's global one: nothing to close, and no display is looked for.
    """
    with require("matplotlib", "a figure").rc_context(_SETTINGS):
        figure = require("matplotlib.figure", "a figure").Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, 1, sharex=True)
    return figure, axes


def for_notebooks() -> None:
    """Let pyplot draw in this style, at the sizes of a notebook's page."""
    require("matplotlib", "a figure").rcParams.update(_SETTINGS | {
        "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.titlecolor": INK, "figure.dpi": 110, "figure.constrained_layout.use": True, "legend.frameon": False})


def title(axes: Any, text: str, size: float = 12, pad: float = 12) -> None:
    """Say what a figure shows, above its left edge."""
    axes.set_title(text, loc="left", fontsize=size, fontweight="bold", pad=pad)


def write(figure: Any, path: Path) -> Path:
    """Save a figure, with the folder that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with require("matplotlib", "a figure").rc_context(_SETTINGS):
        figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)
    return path


def heroes(names: Sequence[str]) -> set[str]:
    """Those that belong to the newest milestone that is named; none where no name has a milestone in it.

    Where the newest is there as itself ("m2"), its variants ("m2-async") are not meant.
    """
    numbers = {name: int(match[1]) for name in names if (match := _MILESTONE.match(name))}
    newest = {name for name, number in numbers.items() if number == max(numbers.values())}
    itself = {name for name in newest if _MILESTONE.fullmatch(name)}
    return itself or newest


def colours(names: Sequence[str], hero: str | None = None) -> dict[str, str]:
    """A colour for each name: one hero and greys, or the cycle where there is no hero."""
    chosen = heroes(names) if hero is None else {hero}
    if not chosen:
        return {name: CYCLE[i % len(CYCLE)] for i, name in enumerate(names)}
    others = [name for name in names if name not in chosen]
    variants = [name for name in names if name in chosen]
    return ({name: GREYS[i % len(GREYS)] for i, name in enumerate(others)}
            | {name: (HERO, "#6fa3c7", "#1d4868")[i % 3] for i, name in enumerate(variants)})


def label_ends(axes: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write names where their lines end: to the right of the axes, moved apart where they would touch, or beside the
    last point of a line that ends well before the others.

    `ends` are (name, x, y, colour) in data coordinates.
    """
    axes.figure.draw_without_rendering()                        # the scale of the axes is known only now
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [tuple(to_axes.transform((x, y))) for _, x, y, _ in ends]
    right = [i for i, (x, _) in enumerate(places) if x > 0.75]
    gap = 14 / 72 * axes.figure.dpi / axes.bbox.height          # 14 points in axes' heights
    heights = dict(zip(right, spread_out([places[i][1] for i in right], gap), strict=True))
    for i, (name, _, _, colour) in enumerate(ends):
        place = (1.0, heights[i]) if i in heights else places[i]
        axes.annotate(name, place, xycoords="axes fraction", xytext=(6, 0), textcoords="offset points", va="center",
                      color=text_colour(colour), fontsize=9, annotation_clip=False)


def name_lines(axes: Any, form: str = "") -> None:
    """Write each labelled line's label where it ends, in its colour; with its last value in the format `form`."""
    axes.figure.draw_without_rendering()                        # a line across the axes ends where the axes do
    ends = []
    for line in axes.get_lines():
        if not line.get_label().startswith("_"):
            last = line.get_xydata()[-1]
            place = axes.transData.inverted().transform(line.get_transform().transform(last))
            value = " " + form.format(last[1]) if form else ""
            ends.append((line.get_label() + value, float(place[0]), float(place[1]), line.get_color()))
    label_ends(axes, ends)


def names_above(axes: Any, colours: Mapping[str, str]) -> None:
    """Names in one row above the axes, each in its colour behind a square of it. A title needs `pad=28` above them."""
    lines = require("matplotlib.lines", "a figure")
    samples = [lines.Line2D([], [], marker="s", linestyle="", color=colour, label=name)
               for name, colour in colours.items()]
    legend = axes.legend(handles=samples, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(samples), fontsize=9,
                         frameon=False, borderaxespad=0.2, handletextpad=0.1, columnspacing=1.4, borderpad=0)
    for text, colour in zip(legend.get_texts(), colours.values(), strict=True):
        text.set_color(text_colour(colour))


def text_colour(colour: str) -> str:
    """The colour for text about what has this colour."""
    return INK if colour in (FAINT, PAPER, SKY) else MUTED if colour in (GREY, *GREYS) else colour


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """The places, in their order, moved as little as needed so that no two are nearer than `gap`, and within [0, 1]."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    result = [min(max(p, 0.0), 1.0) for p in places]
    for below, above in pairwise(order):
        result[above] = max(result[above], result[below] + gap)
    top = 1.0
    for i in reversed(order):                                   # what was pushed out at the top comes back
        result[i] = min(result[i], top)
        top = result[i] - gap
    return result


def short(value: float) -> str:
    """A value as a label: three digits at most matter to an eye, and two of a small one."""
    if 0 < abs(value) < 0.1:
        return f"{value:.{1 - math.floor(math.log10(abs(value)))}f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
