"""The seam to what lies below the device and the host: blocks that are slower to reach, and many."""
from __future__ import annotations

from abc import ABC, abstractmethod

from m0_basics.request import Sequence
from m2_continuous_batching.plugins.base import CounterValue


class LowerTier(ABC):
    """Brings blocks of waiting sequences into blocks of the host, and keeps those of sequences that leave.

    Blocks are numbered along a sequence: block n holds its tokens [n * block_size, (n + 1) * block_size).
    """

    @abstractmethod
    def prefetch(self, sequence: Sequence, first: int, last: int) -> None:
        """Begin to bring a sequence's blocks [first, last), as far as they are here and that pays. Only once.

        To be asked between two steps, when no copies are noted: blocks of the host that are free then are not read
        by anybody any more.
        """

    @abstractmethod
    def is_reading(self, sequence: Sequence) -> bool:
        """Whether blocks of a sequence are on their way."""

    @abstractmethod
    def wait(self, sequence: Sequence) -> None:
        """Until they are there."""

    @abstractmethod
    def take(self, sequence: Sequence) -> tuple[int, list[int]]:
        """What was brought for a sequence: the number of the first, and blocks of the host, now the caller's."""

    @abstractmethod
    def give_up(self, sequence: Sequence) -> None:
        """A sequence does not want its blocks any more."""

    @abstractmethod
    def keep(self, sequence: Sequence, blocks: list[int]) -> None:
        """A sequence leaves; these blocks of the device, from its first on, hold its tokens."""

    def counters(self) -> list[CounterValue]:
        """What operators are shown of it; nothing by default."""
        return []
