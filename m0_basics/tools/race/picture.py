"""The race as an animated picture: an SVG whose bars grow as the tokens came, each engine's clock starting at zero."""
from __future__ import annotations

import html
import textwrap

from .board import Board, Lane
from .runner import HEATS, SINGLE

_WIDTH, _EDGE, _LEFT, _BAR, _ROW = 580, 16, 208, 300, 24      # narrow: its text can be read on a phone
_COLUMNS, _LINES = 64, 8            # of the text
_PAUSE = 4.0                        # seconds that the end is shown before it begins again
_GREY, _HERO, _INK, _QUIET, _PAPER = "#9aa5b1", "#2f6f9f", "#22313f", "#5b6770", "#ffffff"
_FONT = "font-family='ui-monospace,SFMono-Regular,Menlo,Consolas,monospace'"


def animated_svg(board: Board, machine: str) -> str:
    """The picture. Its text names the machine, because the numbers belong to it."""
    lanes = [lane for lane in board.lanes if lane.state != "failed"]
    length = max(lane.heats[heat][-1][0] for lane in lanes for heat in HEATS) + _PAUSE
    y, parts = 34, list[str]()
    for heat in HEATS:
        parts.append(_text(_EDGE, y, f"{heat}, tokens", bold=True))
        most = max(lane.heats[heat][-1][1] for lane in lanes)
        leader = board.fastest(heat)
        for lane in lanes:
            y += _ROW
            parts += _lane(lane, heat, y, most, length, lane is leader)
        y += 2 * _ROW
    leader = board.fastest()
    assert leader is not None
    parts.append(_text(_EDGE, y, f"{leader.name} writes", bold=True))
    lines = textwrap.wrap(leader.text.strip(), _COLUMNS)[:_LINES]
    spent = leader.heats[SINGLE][-1][0]
    for number, line in enumerate(lines):
        y += 20
        parts.append(_text(_EDGE, y, line, appears=spent * (number + 1) / max(1, len(lines)), length=length))
    y += 14
    for line in textwrap.wrap(f"real time, each engine alone on {machine}; loading is left out", _COLUMNS):
        y += 20
        parts.append(_text(_EDGE, y, line, colour=_QUIET))
    return (f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {y + 20}' width='{_WIDTH}' "
            f"height='{y + 20}' role='img' aria-label='a race of {len(lanes)} engines'>\n"
            f"<rect width='100%' height='100%' fill='{_PAPER}'/>\n" + "\n".join(parts) + "\n</svg>\n")


def _lane(lane: Lane, heat: str, y: int, most: int, length: float, leads: bool) -> list[str]:
    """A bar that grows with the tokens, and at its end the rate."""
    points = _thinned([(0.0, 0), *lane.heats[heat]])
    widths = [_BAR * tokens / most for _, tokens in points]
    times = [min(1.0, seconds / length) for seconds, _ in points]
    values, keys = ";".join(f"{w:.1f}" for w in [*widths, widths[-1]]), ";".join(f"{t:.4f}" for t in [*times, 1.0])
    colour = _HERO if leads else _GREY
    grows = (f"<animate attributeName='width' values='{values}' keyTimes='{keys}' dur='{length:.2f}s' "
             "repeatCount='indefinite'/>")
    bar = f"<rect x='{_LEFT}' y='{y - 13}' height='16' width='{widths[-1]:.1f}' rx='2' fill='{colour}'>"
    return [_text(_EDGE, y, lane.name), f"{bar}{grows}</rect>",
            _text(int(_LEFT + widths[-1] + 8), y, f"{lane.rate(heat):.0f}/s", bold=leads, appears=points[-1][0],
                  length=length)]


def _thinned(points: list[tuple[float, int]], most: int = 40) -> list[tuple[float, int]]:
    """At most so many points, the last one included."""
    step = -(-len(points) // most)
    return [*points[:-1:step], points[-1]]


def _text(x: int, y: int, text: str, bold: bool = False, colour: str = _INK, appears: float | None = None,
          length: float = 1.0) -> str:
    weight = " font-weight='600'" if bold else ""
    fade = ""
    if appears is not None:
        at = min(0.999, appears / length)
        fade = (f"<animate attributeName='opacity' values='0;0;1;1' keyTimes='0;{at:.4f};{min(1.0, at + 0.001):.4f};1' "
                f"dur='{length:.2f}s' repeatCount='indefinite'/>")
    return f"<text x='{x}' y='{y}' {_FONT} font-size='14' fill='{colour}'{weight}>{html.escape(text)}{fade}</text>"
