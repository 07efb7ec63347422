"""What looking, hashing and keeping cost: the seconds that an engine's cache manager takes, of a whole run.

Differences of a percent drown in the noise of two runs. Here every call is timed, from outside; a call within a call
counts once.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from m0_basics.tools.bench import EngineContender, Workload
from m2_continuous_batching.engine import engine_of

from ..policy import QueueWatch

_METHODS = ("get_num_computed_tokens", "should_wait", "allocate_slots", "fits_without", "preempt", "free", "fork",
            "take_copies", "match")


class Stopwatch:
    """Seconds in the methods that it was put around."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._restore: list[Callable[[], None]] = []

    def around(self, thing: object, names: Sequence[str]) -> None:
        """Time these methods of an object, as far as it has them."""
        for name in names:
            if hasattr(thing, name):
                setattr(thing, name, self._timed(getattr(thing, name)))
                self._restore.append(lambda name=name: delattr(thing, name))    # type: ignore[misc]

    def take_off(self) -> None:
        """Leave the objects as they were."""
        for restore in self._restore:
            restore()
        self._restore.clear()

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.perf_counter() - start

        return call


def measure(contenders: Sequence[EngineContender], workload: Workload, rounds: int) -> dict[str, dict[str, float]]:
    """By contender: seconds of its cache manager, and their share of the run; medians of the rounds."""
    found: dict[str, list[tuple[float, float]]] = {c.name: [] for c in contenders}
    for _ in range(rounds):
        for contender in contenders:
            engine, watch = engine_of(contender.llm), Stopwatch()
            watch.around(contender.llm.manager, _METHODS)           # type: ignore[attr-defined]
            for plugin in engine.plugins:
                if isinstance(plugin, QueueWatch):
                    watch.around(plugin, ("before_step",))
            try:
                duration = contender.run(workload).metrics.duration_s
            finally:
                watch.take_off()
            found[contender.name].append((watch.seconds, watch.seconds / duration))
    return {name: {"seconds": median(s for s, _ in own), "share": median(share for _, share in own)}
            for name, own in found.items()}
