"""Who may use which slots of the KV cache: the seam, and the manager that hands out whole rows.

    row 0  [ A A A A A A A . . . . . . . . . ]      one base slot per sequence:
    row 1  [ C C C . . . . . . . . . . . . . ]      token i lies in slot  row * row_size + i
    row 2  [ . . . . . . . . . . . . . . . . ]      free
    row 3  [ B B B B B B B B B B . . . . . . ]

Plain integers: a manager owns no tensors. What has to be copied it writes down, and the engine does it.
"""
from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from dataclasses import dataclass

from m0_basics.request import Sequence, SequenceStatus


@dataclass(frozen=True)
class SlotCopy:
    """Copy `num_slots` slots of every layer, from slot `source` on to slot `target` on."""

    source: int
    target: int
    num_slots: int


class KVCacheManager(ABC):
    """Keeps the books of the KV cache for the scheduler."""

    @abstractmethod
    def get_num_computed_tokens(self, sequence: Sequence) -> int:
        """Tokens of a sequence that is about to start whose keys and values are in the cache already."""

    def should_wait(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to compute what this one, which has not started, needs as well."""
        return False

    @abstractmethod
    def allocate_slots(self, sequence: Sequence, num_computed_tokens: int, num_tokens: int) -> bool:
        """Make room for tokens [num_computed_tokens, num_computed_tokens + num_tokens) of `sequence`.

        Those before them are in the cache; for a sequence that starts, as many as `get_num_computed_tokens` has said.
        False: there is no room, and nothing has changed.
        """

    @abstractmethod
    def fits_without(self, sequence: Sequence, num_computed_tokens: int, num_tokens: int,
                     victims: list[Sequence]) -> bool:
        """Whether `allocate_slots` would find room for a sequence that is not running, once `victims` are preempted.

        The scheduler asks before it acts: nobody is preempted for a newcomer who does not fit even so.
        """

    @abstractmethod
    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Let `child` start with what `parent` has computed. False: there is no room, and nothing has changed."""

    @abstractmethod
    def preempt(self, sequence: Sequence) -> SequenceStatus:
        """Take back the room of a running sequence that has to give way. Returns the state that it is left in:

        WAITING, if nothing of it is kept, or SWAPPED, if its cache is kept elsewhere until `allocate_slots`.
        """

    @abstractmethod
    def free(self, sequence: Sequence) -> None:
        """Take back everything that `sequence` holds, if it holds anything."""

    @abstractmethod
    def take_copies(self) -> list[SlotCopy]:
        """Copies to make, in order, before the next step runs. Each is handed out once."""

    @property
    @abstractmethod
    def usage(self) -> float:
        """Share of the cache that is handed out, 0 to 1."""

    @abstractmethod
    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` tokens would fit into an empty cache."""


class RowKVCacheManager(KVCacheManager):
    """One row per sequence, as long as the longest sequence may get. The lowest free row goes first."""

    def __init__(self, num_rows: int, row_size: int) -> None:
        self.num_rows = num_rows
        self.row_size = row_size
        self._free = list(range(num_rows))          # a heap
        self._row_of: dict[int, int] = {}
        self._copies: list[SlotCopy] = []

    def get_num_computed_tokens(self, sequence: Sequence) -> int:
        return 0                                    # a row that was given back keeps nothing

    def allocate_slots(self, sequence: Sequence, num_computed_tokens: int, num_tokens: int) -> bool:
        assert num_computed_tokens + num_tokens <= self.row_size
        if sequence.seq_id in self._row_of:
            return True                             # the row is long enough for all its tokens
        if not self._free:
            return False
        self._row_of[sequence.seq_id] = heapq.heappop(self._free)
        return True

    def fits_without(self, sequence: Sequence, num_computed_tokens: int, num_tokens: int,
                     victims: list[Sequence]) -> bool:
        return bool(self._free or victims)          # a row is long enough for anybody

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        if not self.allocate_slots(child, 0, parent.num_computed_tokens):
            return False
        self._copies.append(SlotCopy(self.first_slot(parent), self.first_slot(child), parent.num_computed_tokens))
        return True

    def preempt(self, sequence: Sequence) -> SequenceStatus:
        self.free(sequence)
        return SequenceStatus.WAITING

    def free(self, sequence: Sequence) -> None:
        if sequence.seq_id in self._row_of:
            heapq.heappush(self._free, self._row_of.pop(sequence.seq_id))

    def take_copies(self) -> list[SlotCopy]:
        copies, self._copies = self._copies, []
        return copies

    @property
    def usage(self) -> float:
        return len(self._row_of) / self.num_rows

    def can_ever_hold(self, num_tokens: int) -> bool:
        return num_tokens <= self.row_size

    def first_slot(self, sequence: Sequence) -> int:
        """The slot of the sequence's token 0."""
        return self._row_of[sequence.seq_id] * self.row_size
