"""The score board: what each engine has done so far, and how it looks in a terminal of any width."""
from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.text import Text

from .runner import EIGHT, HEATS, SINGLE, Event

_STYLES = {"waiting": "bright_black", "loading": "yellow", "racing": "bold green", "done": "default", "failed": "red"}
_SPARE = 12                     # columns for the rate behind a bar


@dataclass
class Lane:
    """One engine."""

    name: str                                                       # m3 paged kv
    state: str = "waiting"
    note: str = ""
    heats: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: {heat: [] for heat in HEATS})
    text: str = ""

    def take(self, event: Event) -> None:
        """Note an event."""
        if event.kind == "tokens":
            self.state = "racing"
            self.heats[event.heat].append((event.seconds, event.tokens))
            if event.heat == SINGLE:
                self.text = event.text
        else:
            self.state = {"ready": "racing"}.get(event.kind, event.kind)
            self.note = event.text

    def rate(self, heat: str) -> float:
        """Tokens per second so far in a heat, prompts included in the time; 0 before its first token."""
        seconds, tokens = self.heats[heat][-1] if self.heats[heat] else (0.0, 0)
        return tokens / seconds if seconds else 0.0


@dataclass
class Board:
    """All engines."""

    lanes: list[Lane]

    def fastest(self, heat: str = SINGLE) -> Lane | None:
        """Who leads a heat."""
        ranked = [lane for lane in self.lanes if lane.rate(heat)]
        return max(ranked, key=lambda lane: lane.rate(heat), default=None)

    def render(self, width: int, height: int) -> RenderableType:
        """Both heats, and below them what the fastest engine has written."""
        parts: list[RenderableType] = []
        for heat in (SINGLE, EIGHT):
            parts.append(Text(f"{heat}, tokens per second", style="bold"))
            parts += self._rows(heat, width)
            parts.append(Text(""))
        leader = self.fastest()
        room = height - 2 * (len(self.lanes) + 2) - 2
        if leader is not None and room > 1:
            parts.append(Text(f"{leader.name} writes:", style="bold"))
            lines = textwrap.wrap(leader.text.strip(), max(20, width - 1))
            parts += [Text(line, no_wrap=True) for line in lines[-(room - 1):]]
        return Group(*parts)

    def _rows(self, heat: str, width: int) -> Iterator[Text]:
        names = max(len(lane.name) for lane in self.lanes) if width >= 60 else 2
        most = max((lane.rate(heat) for lane in self.lanes), default=0.0)
        room = max(4, width - names - _SPARE)
        for lane in self.lanes:
            rate = lane.rate(heat)
            row = Text(f"{lane.name[:names]:<{names}} ", style=_STYLES[lane.state], no_wrap=True, overflow="crop")
            if rate:
                row.append("█" * max(1, round(room * rate / most)), style="green" if lane is self.fastest(heat) else "")
                row.append(f" {rate:.0f}", style="bold")
            elif lane.state != "done":
                row.append(f"{lane.state} {lane.note}".strip()[:width - names - 1], style=_STYLES[lane.state])
            yield row

    def lines(self) -> list[str]:
        """The same without a live display: a line for each engine."""
        names = max(len(lane.name) for lane in self.lanes)
        return [f"{lane.name:<{names}}  " + ("  ".join(f"{heat} {lane.rate(heat):6.1f} tokens/s" for heat in HEATS)
                                             if lane.state != "failed" else f"failed: {lane.note}")
                for lane in self.lanes]
