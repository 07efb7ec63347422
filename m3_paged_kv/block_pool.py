"""The block pool: fixed-size blocks of the KV cache, handed out one by one and counted by reference.

    free list   [ 7 | 3 | 0 | 5 ]        a stack: take from the end, put back at the end, both O(1)
    references  [ 0 . 2 1 . 0 1 . ]      how many sequences hold each block; 0 means free

A block that two sequences hold is one block. It is free again when the last of them lets go.
"""
from __future__ import annotations

from abc import ABC, abstractmethod


class Pool(ABC):
    """Blocks handed out one by one. Whoever holds one more of them, or one less, says so."""

    num_blocks: int

    @property
    @abstractmethod
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out."""

    @abstractmethod
    def allocate(self) -> int:
        """Take a free block, held once. The caller has made sure that there is one."""

    @abstractmethod
    def share(self, block: int) -> None:
        """One more holder of a block."""

    @abstractmethod
    def release(self, block: int) -> None:
        """One holder less."""

    @abstractmethod
    def ref_count(self, block: int) -> int:
        """How many hold the block."""

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free


class BlockPool(Pool):
    """Plain integers: which of `num_blocks` blocks are free, and how often the others are held."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))        # the lowest block goes first
        self._ref_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """Take a free block, held once. The caller has made sure that there is one."""
        block = self._free.pop()
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a block that is held already."""
        if self._ref_counts[block] == 0:
            raise ValueError(f"block {block} is free; it cannot be shared")
        self._ref_counts[block] += 1

    def release(self, block: int) -> None:
        """One holder less. Raises ValueError for a block that nobody holds: somebody has freed it twice."""
        if self._ref_counts[block] == 0:
            raise ValueError(f"block {block} is free already; it cannot be freed twice")
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._free.append(block)

    def ref_count(self, block: int) -> int:
        """How many hold the block."""
        return self._ref_counts[block]
