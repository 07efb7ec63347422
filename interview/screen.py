"""The terminal: shows Markdown without its invisible comments, and asks. Tests give it other ends to talk to."""
from __future__ import annotations

import re
from collections.abc import Callable

from rich.console import Console
from rich.markdown import Markdown

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FOLD = re.compile(r"^\s*(?:</?details[^>]*>|<summary>.*?</summary>)\s*$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\([^)\s]+\)")


def plain(text: str) -> str:
    """Markdown as it is to be read: no comments, no folds, links as their text."""
    return _LINK.sub(r"\1", _FOLD.sub("", _COMMENT.sub("", text))).strip()


class Screen:
    """Where a quiz or an interview happens. `ask` returns a line; at the end of the input it raises EOFError."""

    def __init__(self, console: Console | None = None, ask: Callable[[str], str] | None = None) -> None:
        self.console = console or Console()
        self._ask = ask or self.console.input

    def show(self, text: str) -> None:
        """Markdown, rendered."""
        self.console.print(Markdown(plain(text)))

    def say(self, text: str, style: str | None = None) -> None:
        """A plain line."""
        self.console.print(text, style=style, markup=False, highlight=False)

    def ask(self, prompt: str) -> str:
        return self._ask(f"{prompt} ").strip()

    def ask_lines(self, prompt: str) -> str:
        """Lines up to an empty one."""
        lines: list[str] = []
        while line := self.ask(prompt if not lines else "..."):
            lines.append(line)
        return "\n".join(lines)

    def ask_yes(self, prompt: str) -> float:
        """y -> 1, h (half) -> 0.5, n or nothing -> 0; q ends the input. Asks again for anything else."""
        while True:
            answer = self.ask(f"{prompt} (y yes, h half, n no, q quit)").lower()
            if answer in ("q", "quit"):
                raise EOFError
            if answer in ("y", "yes", "h", "half", "n", "no", ""):
                return {"y": 1.0, "h": 0.5}.get(answer[:1], 0.0)
            self.say(f"{answer!r} is not valid; allowed: y, h, n, q")
