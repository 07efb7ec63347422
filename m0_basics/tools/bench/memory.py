"""Peak memory of a run: resident memory by psutil, and what torch allocated on the GPU.

The operating system's own high-water mark never falls again, so it cannot tell one run from the next in the same
process. A thread that looks every few milliseconds can, at the price of missing shorter peaks.
"""
from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Self

import psutil
import torch

from .metrics import PeakMemory

_INTERVAL = 0.05            # seconds between two looks


class MemoryMeter:
    """Context manager: once left, `peak` holds the highest memory of process `pid` and its children."""

    def __init__(self, pid: int | None = None) -> None:
        """`pid` defaults to this process; GPU memory is known of this process only."""
        self._own = pid is None or pid == os.getpid()
        self._watched = _family(pid, alone=self._own)
        self._stop = threading.Event()
        self._highest = self._before = 0
        self.peak: PeakMemory | None = None

    def __enter__(self) -> Self:
        self._highest = self._before = self._resident()
        if self._own and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._watch, name="memory-meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._highest = max(self._highest, self._resident())
        gpu = torch.cuda.max_memory_allocated() if self._own and torch.cuda.is_available() else None
        self.peak = PeakMemory(self._highest, self._highest - self._before, gpu)

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._highest = max(self._highest, self._resident())

    def _resident(self) -> int:
        """Bytes resident now. Pages that children share with their parent are counted once in each."""
        total = 0
        for process in self._watched:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return total


def _family(pid: int | None, alone: bool) -> list[psutil.Process]:
    """The process, and its children where it is not `alone`; nothing where it has ended.

    Another engine's process is a child of ours, which is why ours is taken alone. The children are listed once:
    going through all processes takes longer than one look should.
    """
    try:
        process = psutil.Process(pid)
        return [process] if alone else [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
