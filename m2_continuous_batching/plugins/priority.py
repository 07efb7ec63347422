"""Reorder the queue before every step: a plugin can do so whatever the engine's policy is."""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .base import SchedulerPlugin

if TYPE_CHECKING:
    from ..policies import QueuedSequence
    from ..scheduler import Scheduler


def by_priority(entry: QueuedSequence) -> Any:
    """`SchedulingParams.priority`: lower runs sooner."""
    return entry.params.priority


class PriorityPlugin(SchedulerPlugin):
    """The waiting sequence with the smallest key goes first; between equals, who came first.

    Unlike the priority *policy* it displaces nobody who runs: it only says who is next.
    """

    def __init__(self, key: Callable[[QueuedSequence], Any] = by_priority) -> None:
        self.key = key

    def before_step(self, scheduler: Scheduler) -> None:
        scheduler.waiting.sort(key=lambda entry: (self.key(entry), entry.order))
