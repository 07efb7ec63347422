"""Where the memory goes: how much, in which part of the work, and whether it grows without end.

    MemoryProfiler           resident, GPU and KV cache bytes of every step, and their peaks
    DetailedMemoryProfiler   what a part of the work leaves behind: prefill, decode, or any block of code
    MemoryLeakDetector       is there a floor under the memory, and does the floor rise?
"""
from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import psutil
import torch

from m0_basics.config import check_int

from .base import SchedulerPlugin, StepStats

if TYPE_CHECKING:
    from ..scheduler import Scheduler

logger = logging.getLogger(__name__)


class HasBytes(Protocol):
    """A KV cache, such as `llm.cache`."""

    @property
    def nbytes(self) -> int: ...


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    size: int = psutil.Process().memory_info().rss
    return size


def gpu_bytes() -> int:
    """What torch has allocated on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def live_tensors() -> tuple[int, int]:
    """How many tensors Python can reach, and the bytes of their storages, each counted once.

    It looks at every object there is, which takes tens of milliseconds: nothing for every step of a fast engine.
    """
    # By exact type: asking some objects for their class runs code of theirs.
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and not o.is_meta]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors
                if t.layout is torch.strided}
    return len(tensors), sum(storages.values())


def live_tensor_bytes() -> int:
    """The second of `live_tensors`."""
    return live_tensors()[1]


@dataclass(frozen=True)
class MemorySample:
    """Bytes at one moment."""

    rss_bytes: int
    gpu_bytes: int
    kv_cache_bytes: int             # reserved
    kv_cache_used_bytes: int        # of these, handed out to sequences

    def highest(self, other: MemorySample) -> MemorySample:
        """The larger of the two, number by number."""
        return MemorySample(*(max(pair) for pair in zip(vars(self).values(), vars(other).values(), strict=True)))


class MemoryProfiler(SchedulerPlugin):
    """A sample after every step. The cache is there only once the engine is: set `profiler.cache = llm.cache`."""

    def __init__(self, cache: HasBytes | None = None, max_samples: int = 10_000) -> None:
        """Keep the latest `max_samples` samples; peaks are of all."""
        check_int("max_samples", max_samples, 1)
        self.cache = cache
        self.samples: deque[tuple[int, MemorySample]] = deque(maxlen=max_samples)      # with the index of the step
        self.peak = self.current = self.measure()

    def measure(self, kv_cache_usage: float = 0.0) -> MemorySample:
        """The memory now; `kv_cache_usage`, 0 to 1, as the KV cache manager knows it."""
        reserved = self.cache.nbytes if self.cache is not None else 0
        return MemorySample(resident_bytes(), gpu_bytes(), reserved, round(kv_cache_usage * reserved))

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self.current = self.measure(stats.kv_cache_usage)
        self.peak = self.peak.highest(self.current)
        self.samples.append((stats.index, self.current))


@dataclass(frozen=True)
class MemorySnapshot:
    """Memory at one moment, down to the tensors."""

    rss_bytes: int
    gpu_bytes: int
    num_tensors: int
    tensor_bytes: int

    @classmethod
    def take(cls) -> MemorySnapshot:
        return cls(resident_bytes(), gpu_bytes(), *live_tensors())


@dataclass
class ContextMemory:
    """What all runs of one context left behind: the sum of the differences between after and before."""

    count: int = 0
    rss_bytes: int = 0
    gpu_bytes: int = 0
    num_tensors: int = 0
    tensor_bytes: int = 0
    largest_tensor_bytes: int = 0       # the most that one run left behind

    def add(self, before: MemorySnapshot, after: MemorySnapshot) -> None:
        self.count += 1
        for name, value in vars(before).items():
            setattr(self, name, getattr(self, name) + getattr(after, name) - value)
        self.largest_tensor_bytes = max(self.largest_tensor_bytes, after.tensor_bytes - before.tensor_bytes)


class DetailedMemoryProfiler(SchedulerPlugin):
    """Differences of memory by context. As a plugin it files each step under "prefill" or "decode".

    It looks at every object in the process twice a step, so it is for finding out, not for production.
    """

    def __init__(self) -> None:
        self.contexts: dict[str, ContextMemory] = {}
        self._before: MemorySnapshot | None = None

    @contextmanager
    def context(self, name: str) -> Iterator[None]:
        """`with profiler.context("load"): ...`. Contexts may nest: each counts what is inside it."""
        before = MemorySnapshot.take()
        try:
            yield
        finally:
            self._add(name, before)

    def _add(self, name: str, before: MemorySnapshot) -> None:
        after = MemorySnapshot.take()       # first: the books take memory themselves
        self.contexts.setdefault(name, ContextMemory()).add(before, after)

    def before_step(self, scheduler: Scheduler) -> None:
        self._before = MemorySnapshot.take()

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        if self._before is not None:
            self._add("prefill" if stats.num_prompt_tokens else "decode", self._before)
            self._before = None


@dataclass(frozen=True)
class Leak:
    """Memory that rises from window to window."""

    growth_bytes: int               # from the first of the windows looked at to the last
    bytes_per_sample: float


class MemoryLeakDetector(SchedulerPlugin):
    """Flags memory that never comes back down.

        memory   |  /|  /|  /|  /|       peaks come and go; the least of each window is the floor.
                 | / |_/ |_/ |_/ |       floor rises in every window: a leak. It rests, or falls: none.

    Growth during warm-up, when caches fill and buffers are made, is not looked at; growth that ends is forgiven.
    """

    def __init__(self, measure: Callable[[], int] = live_tensor_bytes, warmup: int = 32, window: int = 16,
                 num_windows: int = 4, min_growth_bytes: int = 1 << 16, every: int = 1) -> None:
        """Samples of `measure`, in bytes, after every `every` steps: `warmup` of them are skipped, then the floors
        of the last `num_windows` windows are compared. `resident_bytes` sees more than tensors, and is noisier."""
        for name, value, least in (("warmup", warmup, 0), ("window", window, 1), ("num_windows", num_windows, 2),
                                   ("min_growth_bytes", min_growth_bytes, 1), ("every", every, 1)):
            check_int(name, value, least)
        self.measure = measure
        self.warmup, self.window, self.every = warmup, window, every
        self.min_growth_bytes = min_growth_bytes
        self.floors: deque[int] = deque(maxlen=num_windows)
        self._window: list[int] = []
        self._num_samples = 0

    def sample(self, value: int | None = None) -> None:
        """Take one sample, or be told one. The first leak found is logged."""
        self._num_samples += 1
        if self._num_samples <= self.warmup:
            return
        self._window.append(self.measure() if value is None else value)
        if len(self._window) == self.window:
            known = self.leak is not None
            self.floors.append(min(self._window))
            self._window = []
            if (leak := self.leak) is not None and not known:
                logger.warning("memory grows by %.0f bytes a sample, and does not come back", leak.bytes_per_sample)

    @property
    def leak(self) -> Leak | None:
        """What the windows seen last say; None while there are too few of them, or no leak."""
        floors = list(self.floors)
        if len(floors) < (self.floors.maxlen or 0) or not all(a < b for a, b in pairwise(floors)):
            return None
        growth = floors[-1] - floors[0]
        if growth < self.min_growth_bytes:
            return None
        return Leak(growth, growth / (self.window * (len(floors) - 1)))

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        if stats.index % self.every == 0:
            self.sample()
