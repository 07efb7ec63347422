"""One line on the terminal that says how far a long command is, and how long it still takes.

    ragged-64: round 2 of 3, m2 · 5 of 12 · about 40 s left

It is rewritten in place, on standard error, and only where that is a terminal: files and pipes get nothing of it.
"""
from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO


class Progress:
    """`with Progress("ragged-64", 12) as progress: progress.now("round 1 of 3, m2"); ...`"""

    def __init__(self, label: str, total: int, stream: TextIO | None = None,
                 clock: Callable[[], float] = time.perf_counter) -> None:
        """`total` parts of about the same length are to come."""
        self.label, self.total, self.done = label, total, 0
        self._stream, self._clock, self._start = stream or sys.stderr, clock, clock()
        self._shown = False

    def now(self, what: str) -> None:
        """The next part begins."""
        self._show(" · ".join(part for part in (f"{self.label}: {what}", f"{self.done + 1} of {self.total}",
                                                 self._left()) if part))

    def step(self) -> None:
        """A part is done."""
        self.done += 1

    def _left(self) -> str:
        if not self.done:
            return ""
        seconds = (self._clock() - self._start) / self.done * (self.total - self.done)
        return f"about {seconds:.0f} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"

    def _show(self, text: str) -> None:
        if self._stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{text[:width]:<{width}}")
            self._stream.flush()
            self._shown = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._shown:                                 # the line makes room for what the command prints
            width = shutil.get_terminal_size().columns - 1
            self._stream.write("\r" + " " * width + "\r")
            self._stream.flush()
