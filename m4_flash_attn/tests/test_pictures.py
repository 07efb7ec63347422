"""The numbers behind the pictures, and that the pictures show them."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from m4_flash_attn.online_softmax import Trace, online_softmax, tiled_attention
from m4_flash_attn.tools.intensity import linear_part
from m4_flash_attn.tools.pictures import (
    AHEAD,
    DONE,
    HIDDEN,
    NOW,
    draw_growth,
    draw_roofline,
    draw_splits,
    draw_tile,
    draw_turns,
    tile_stages,
    turns,
)


def new_axes(count: int = 1) -> list[Axes]:
    return list(Figure().subplots(1, count, squeeze=False)[0])


def traced(num_heads: int = 2, num_kv_heads: int = 1) -> tuple[list[Trace], torch.Tensor]:
    """Three queries behind one cached token, tiles of two; and the scores of the first head [3, 4]."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, heads, 4, generator=generator) for n, heads in ((3, num_heads), (4, num_kv_heads)))
    trace: list[Trace] = []
    tiled_attention(q, k, k, 2, 2, scale=1.0, trace=trace)
    return trace, q[:, 0] @ k[:, 0].T


def test_stages_by_hand() -> None:
    """Queries 0-1 (positions 1-2) meet keys 0-1, then 2-3; query 2 (position 3) meets both tiles of keys."""
    trace, _ = traced()
    H, A, D, N = HIDDEN, AHEAD, DONE, NOW
    assert tile_stages(trace, 3, 4).tolist() == [
        [[N, N, H, H], [N, N, A, H], [A, A, A, A]],
        [[D, D, H, H], [D, D, N, H], [A, A, A, A]],
        [[D, D, H, H], [D, D, D, H], [N, N, A, A]],
        [[D, D, H, H], [D, D, D, H], [D, D, N, N]],
    ]


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 1)])
def test_turns_follow_the_first_head(heads: tuple[int, int]) -> None:
    """m and l of each query over its tiles, against the definition; what is carried and added is l."""
    trace, scores = traced(*heads)
    for row in range(3):
        rows = turns(trace, row)
        seen = scores[row, :row + 2]
        assert [turn.keys for turn in rows] == [range(2), range(2, 4)]
        for turn in rows:
            so_far = seen[:turn.keys.stop]
            assert turn.m == pytest.approx(so_far.max().item())
            assert turn.carried + turn.added == pytest.approx((so_far - so_far.max()).exp().sum().item(), rel=1e-5)
            assert turn.added == pytest.approx((seen[turn.keys.start:turn.keys.stop] - turn.m).exp().sum().item(),
                                               rel=1e-5, abs=1e-6)


def test_turns_of_a_softmax_by_hand() -> None:
    """Scores 0, 0 | ln 4, 0: l is 2, then 2 / 4 carried and 1 + 1 / 4 added."""
    trace: list[Trace] = []
    online_softmax(torch.tensor([0.0, 0.0, math.log(4), 0.0]), 2, trace)
    first, second = turns(trace)
    assert (first.m, first.before, first.carried, first.added) == (0, 0, 0, 2)
    assert second.m == pytest.approx(math.log(4))
    assert (second.before, second.carried, second.added) == pytest.approx((2, 0.5, 1.25))


def test_draw_tile_frames_the_tile_at_work() -> None:
    trace, _ = traced()
    axes, = new_axes()
    draw_tile(axes, tile_stages(trace, 3, 4)[1], trace[1])
    pixels = np.asarray(axes.images[0].get_array())
    assert pixels.shape == (3, 4, 3)
    assert (pixels[0, 2] == 255).all()
    assert (pixels[1, 2] == [0xE0, 0x8A, 0x3C]).all()
    frame = axes.lines[-1]
    assert (min(frame.get_xdata()), max(frame.get_xdata())) == (1.5, 3.5)
    assert (min(frame.get_ydata()), max(frame.get_ydata())) == (-0.5, 1.5)


def test_draw_turns_shows_scores_maximum_and_sum() -> None:
    trace: list[Trace] = []
    scores = torch.tensor([0.0, 0.5, math.log(4), 0.0, 1.0])
    online_softmax(scores, 2, trace)
    above, below = new_axes(2)
    rows = turns(trace)
    draw_turns(above, below, scores, rows)
    assert [bar.get_height() for bar in above.patches] == pytest.approx(scores.tolist())
    assert [line.get_ydata()[0] for line in above.lines] == pytest.approx([0.5, math.log(4), math.log(4)])
    before, carried, added = ([bar.get_height() for bar in bars] for bars in below.containers)
    assert before == [turn.before for turn in rows]
    assert [c + a for c, a in zip(carried, added, strict=True)] == pytest.approx([t.state.l.item() for t in trace])
    assert [label.get_text() for label in below.get_xticklabels()] == ["0-1", "2-3", "4-4"]
    assert above.get_legend() is below.get_legend() is None, "nothing stands over the bars"
    last = rows[-1]
    assert [text.get_text() for text in above.texts] == [f"m, the largest so far: {math.log(4):.1f}"]
    assert [text.get_text() for text in below.texts] == [
        f"added by the tile: {last.added:.1f}", f"l before: {last.before:.1f}",
        f"l exp(old m - new m): {last.carried:.1f}"]
    assert all(text.xy[0] >= 0.75 for text in (*above.texts, *below.texts))


def test_draw_growth_puts_counted_dots_on_the_formula() -> None:
    axes, = new_axes()
    draw_growth(axes, [2, 4, 8], {"square": [4, 16, 64], "line": [2, 4, 8]}, {"square": lambda n: n * n,
                                                                           "line": lambda n: n})
    dots, line, *_ = axes.lines
    assert list(dots.get_ydata()) == [4, 16, 64]
    assert list(line.get_ydata()) == [n * n for n in line.get_xdata()]
    assert (min(line.get_xdata()), max(line.get_xdata())) == (2, 8)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_legend() is None
    assert {text.get_text() for text in axes.texts} == {"square 64", "line 8", "dots: counted\nlines: formula"}
    assert all(text.xy[0] == 1 for text in axes.texts), "to the right of the axes"


def test_draw_roofline_puts_each_part_under_the_roof() -> None:
    axes, = new_axes()
    parts = [linear_part(tokens, 1000, 1000) for tokens in (1, 1000)]
    draw_roofline(axes, peak=1e12, bandwidth=1e10, series={"linear": parts})
    roof, ridge, dots = axes.lines
    assert ridge.get_xdata()[0] == 100
    assert max(roof.get_ydata()) == 1e12
    assert list(dots.get_ydata()) == pytest.approx([parts[0].intensity * 1e10, 1e12])
    axes.figure.draw_without_rendering()
    assert axes.get_legend().get_window_extent().y1 < axes.bbox.y0, "below the axes, not over the data"


def test_draw_splits_has_a_lane_for_each_worker() -> None:
    axes, = new_axes()
    draw_splits(axes, [range(3), range(3, 6), range(6, 8)], [0.5, 0.25, 0.25])
    spans = [tuple(c.get_paths()[0].get_extents().intervalx) for c in axes.collections]
    assert spans == [(0, 3), (3, 6), (6, 8)]
    texts = [t.get_text() for t in axes.texts]
    assert [t for t in texts if t.endswith("%")] == ["50.0%", "25.0%", "25.0%"]
    assert "merge" in texts
