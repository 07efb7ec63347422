"""What tiled attention looks like: pictures of a trace, of growth, of the roofline, and of the work of splits.

Each picture is drawn on axes that the caller brings, from numbers that a plain function works out before: the numbers
are what the tests check. Matplotlib is the caller's, so nothing is imported here.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from m0_basics.tools.bench import style

from ..online_softmax import Trace
from .intensity import Part, attainable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, BLUE, SKY, ORANGE, GREEN, RED, GREY, LIGHT = (
    "#22313f", "#2f6f9f", "#9cc3de", "#e08a3c", "#4c9a6a", "#b5483a", "#9aa5b1", "#e8ecf0")
CYCLE = (BLUE, ORANGE, GREEN, RED, GREY)

HIDDEN, AHEAD, DONE, NOW = range(4)         # a query-key pair: masked, still to come, seen, in fast memory now


def tile_stages(trace: Sequence[Trace], num_queries: int, num_keys: int) -> npt.NDArray[np.int64]:
    """[tiles, num_queries, num_keys]: each pair's stage while the tile is at work, for the first head of the trace."""
    turn = np.full((num_queries, num_keys), -1)                     # which tile computes the pair
    for i, t in enumerate(trace):
        pairs = turn[t.queries.start:t.queries.stop, t.keys.start:t.keys.stop]
        scores = _first_head(t, t.scores.reshape(-1, len(t.keys)))
        pairs[(scores > float("-inf")).numpy()] = i
    now = np.arange(len(trace))[:, None, None]
    stages = np.where(turn < now, DONE, np.where(turn == now, NOW, AHEAD))
    return np.where(turn < 0, HIDDEN, stages)


def draw_tile(axes: Axes, stages: npt.NDArray[np.int64], tile: Trace) -> None:
    """One picture of the strip: `stages` is an entry of `tile_stages`, `tile` the tile at work."""
    shades = np.array([[int(c[i:i + 2], 16) for i in (1, 3, 5)] for c in ("#ffffff", LIGHT, SKY, ORANGE)])
    axes.imshow(shades[stages], interpolation="nearest")
    for edges, lines in ((stages.shape[1], axes.axvline), (stages.shape[0], axes.axhline)):
        for edge in range(edges + 1):
            lines(edge - 0.5, color="white", lw=0.6)
    top, left = tile.queries.start - 0.5, tile.keys.start - 0.5
    bottom, right = tile.queries.stop - 0.5, tile.keys.stop - 0.5
    axes.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=INK, lw=1.2, clip_on=False)
    axes.set_frame_on(False)
    axes.set(xticks=[], yticks=[], xlim=(-0.6, stages.shape[1] - 0.4), ylim=(stages.shape[0] - 0.4, -0.6))


@dataclass(frozen=True)
class Turn:
    """What one tile did to the maximum and the sum of one row."""

    keys: range
    m: float                    # the maximum afterwards
    carried: float              # the earlier sum, scaled to that maximum
    added: float                # the tile's own exponentials
    before: float               # the earlier sum, as it was


def turns(trace: Sequence[Trace], row: int = 0) -> list[Turn]:
    """The life of m and l for one query, in the first head of the trace."""
    found: list[Turn] = []
    last_m, last_l = float("-inf"), 0.0
    for t in trace:
        if row not in t.queries:
            continue
        m, total = (float(_first_head(t, x.reshape(-1))[t.queries.index(row)]) for x in (t.state.m, t.state.l))
        carried = last_l * float(np.exp(last_m - m)) if last_l else 0.0
        found.append(Turn(t.keys, m, carried, total - carried, last_l))
        last_m, last_l = m, total
    return found


def draw_turns(scores_axes: Axes, sum_axes: Axes, scores: torch.Tensor, rows: Sequence[Turn]) -> None:
    """One: the scores of a row and the running maximum. The other: the sum, what was carried over and what was added.

    The names stand beside the last tile, with its values.
    """
    for i, turn in enumerate(rows):
        keys = np.arange(turn.keys.start, turn.keys.stop)
        scores_axes.bar(keys, scores[turn.keys.start:turn.keys.stop].numpy(), color=(SKY, LIGHT)[i % 2], width=0.9)
        scores_axes.plot([keys[0] - 0.5, keys[-1] + 0.5], [turn.m, turn.m], color=RED, lw=2)
    scores_axes.set(xlabel="key", ylabel="score")
    style.label_ends(scores_axes, [(f"m, the largest so far: {turn.m:.1f}", keys[-1] + 0.5, turn.m, RED)])
    places = np.arange(len(rows))
    carried = np.array([turn.carried for turn in rows])
    sum_axes.bar(places, [turn.before for turn in rows], 0.8, fill=False, edgecolor=GREY, ls="--")
    sum_axes.bar(places, carried, 0.6, color=BLUE)
    sum_axes.bar(places, [turn.added for turn in rows], 0.6, bottom=carried, color=ORANGE)
    sum_axes.set_xticks(places, [f"{turn.keys.start}-{turn.keys.stop - 1}" for turn in rows])
    sum_axes.set(xlabel="keys of the tile", ylabel="l")
    style.label_ends(sum_axes, [
        (f"added by the tile: {turn.added:.1f}", places[-1], turn.carried + turn.added / 2, ORANGE),
        (f"l before: {turn.before:.1f}", places[-1], turn.before, GREY),
        (f"l exp(old m - new m): {turn.carried:.1f}", places[-1], turn.carried / 2, BLUE)])


def draw_growth(axes: Axes, sizes: Sequence[int], counted: Mapping[str, Sequence[float]],
                formulas: Mapping[str, Callable[[int], float]]) -> None:
    """Counted values as dots over the formula's line, one colour per name, both axes logarithmic."""
    x = np.unique(np.geomspace(min(sizes), max(sizes), 60).astype(int))
    for colour, name in zip(CYCLE, counted, strict=False):
        axes.plot(sizes, counted[name], "o", color=colour)
        axes.plot(x, [formulas[name](int(n)) for n in x], color=colour, lw=1.5)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(list(sizes), [f"{n:,}" for n in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    style.label_ends(axes, [(f"{name} {_rounded(counted[name][-1])}", sizes[-1], counted[name][-1], colour)
                            for colour, name in zip(CYCLE, counted, strict=False)])
    axes.annotate("dots: counted\nlines: formula", (1, 0), xycoords="axes fraction", xytext=(6, 0),
                  textcoords="offset points", va="bottom", fontsize=9, color=GREY)


def _rounded(value: float) -> str:
    """37.2 M for 37,200,000."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def draw_roofline(axes: Axes, peak: float, bandwidth: float, series: Mapping[str, Sequence[Part]]) -> None:
    """The roof of a machine (FLOP/s and bytes/s, data sheet or measured), and under it what each part may reach."""
    intensities = [part.intensity for parts in series.values() for part in parts] + [peak / bandwidth]
    x = np.geomspace(min(intensities) / 3, max(intensities) * 3, 200)
    axes.plot(x, [attainable(i, peak, bandwidth) for i in x], color=INK, lw=2)
    axes.axvline(peak / bandwidth, color=GREY, ls=":", lw=1.5)
    for colour, marker, (name, parts) in zip(CYCLE, "osD^v", series.items(), strict=False):
        places = [part.intensity for part in parts]
        axes.plot(places, [attainable(i, peak, bandwidth) for i in places], marker, color=colour, ms=8, label=name,
                  zorder=3, alpha=0.85)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte moved", ylabel="FLOP/s at most")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def draw_splits(axes: Axes, splits: Sequence[range], shares: Sequence[float]) -> None:
    """Workers as lanes: which keys each one read, and its share of the final weight."""
    length = splits[-1].stop
    for lane, (keys, share) in enumerate(zip(splits, shares, strict=True)):
        axes.broken_barh([(keys.start, len(keys))], (lane - 0.36, 0.72), color=CYCLE[lane % len(CYCLE)])
        axes.annotate("", (length * 1.08, (len(splits) - 1) / 2), (keys.stop, lane), annotation_clip=False,
                      arrowprops={"arrowstyle": "->", "color": GREY, "lw": 1})
        axes.text(keys.start + len(keys) / 2, lane, f"{share:.1%}", ha="center", va="center", color="white")
    axes.text(length * 1.09, (len(splits) - 1) / 2, "merge", va="center", color=INK)
    axes.set(ylim=(len(splits) - 0.5, -0.5), xlim=(0, length * 1.2), yticks=range(len(splits)),
             yticklabels=[f"worker {i}" for i in range(len(splits))], xlabel="key")


def _first_head(tile: Trace, per_row: torch.Tensor) -> torch.Tensor:
    """Of `per_row` [rows of all heads, ...]: one entry per query, that of the first head."""
    num_rows = tile.state.m.shape[-1] if tile.state.m.dim() else 1      # of the first key-value head
    return per_row[:num_rows:num_rows // len(tile.queries)]
