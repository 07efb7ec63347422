"""The drafter seam: who guesses the next tokens of a sequence."""
from __future__ import annotations

from abc import ABC, abstractmethod

from m0_basics.request import Sequence
from m2_continuous_batching.plugins.base import SchedulerPlugin

Drafts = list[list[int]]


class Drafter(SchedulerPlugin, ABC):
    """Guesses ahead. A wrong guess costs time, and never changes a token."""

    seconds_per_token: float = 0.0          # what one more guess for all sequences costs; 0 where it is looked up

    @abstractmethod
    def propose(self, sequences: list[Sequence], lengths: list[int]) -> Drafts:
        """For each sequence at most so many tokens that may follow its newest one; [] where it has no guess."""
