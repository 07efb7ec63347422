"""The block pool that forgets late: a block that nobody holds keeps its contents until its room is needed.

    held      by sequences, counted by reference
    cached    by nobody, but what it holds may be found:  oldest [ 9 | 4 | 1 | 7 ] newest      revived, or evicted
    free      holds nothing that anybody could ask for

Blocks of a sequence are let go of from the tail, so a tail is older than its head: the least recently used block is
always a leaf of the tree, and a prefix goes after what is built on it.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Set

from m3_paged_kv.block_pool import Pool

from .prefix_index import PrefixIndex


class CachedBlockPool(Pool):
    """Plain integers: who is held how often, and what is cached in which order."""

    def __init__(self, num_blocks: int, index: PrefixIndex, max_cached_blocks: int | None = None) -> None:
        """`trim` leaves at most `max_cached_blocks` blocks that nobody holds and that may be found; None: all."""
        self.num_blocks = num_blocks
        self.index = index
        self.max_cached_blocks = num_blocks if max_cached_blocks is None else max_cached_blocks
        self.num_evicted = 0                            # in all
        self._wanted: set[int] = set()
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached = OrderedDict[int, None]()         # the least recently used first
        self._spared = OrderedDict[int, None]()         # older than all of these, but wanted
        self._ref_counts = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free) + self.num_cached

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that may be found."""
        return len(self._cached) + len(self._spared)

    @property
    def wanted(self) -> Set[int]:
        """Cached blocks that waiting requests would use: evicted last."""
        return self._wanted

    @wanted.setter
    def wanted(self, blocks: Set[int]) -> None:
        self._wanted = set(blocks)
        for block in reversed(self._spared):            # back to where they stood: they are the oldest
            self._cached[block] = None
            self._cached.move_to_end(block, last=False)
        self._spared.clear()

    def allocate(self) -> int:
        """Take a free block, or the cached one that is needed least. The caller has made sure that there is one."""
        block = self._free.pop() if self._free else self._evict()
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a block that is held, or cached: then it is revived."""
        if self._ref_counts[block] == 0:
            if block not in self._cached and block not in self._spared:
                raise ValueError(f"block {block} is free; it cannot be shared")
            self._cached.pop(block, None)
            self._spared.pop(block, None)
        self._ref_counts[block] += 1

    def release(self, block: int) -> None:
        """One holder less. Raises ValueError for a block that nobody holds: somebody has freed it twice."""
        if self._ref_counts[block] == 0:
            raise ValueError(f"block {block} is free already; it cannot be freed twice")
        self._ref_counts[block] -= 1
        if self._ref_counts[block] > 0:
            return
        if block in self.index:
            self._cached[block] = None
        else:
            self._free.append(block)

    def trim(self) -> None:
        """Evict what is cached beyond the cap. Not while a step is chosen: what a newcomer has found must stay."""
        while self.num_cached > self.max_cached_blocks:
            self._free.append(self._evict())

    def ref_count(self, block: int) -> int:
        """How many hold the block; 0 for a cached one."""
        return self._ref_counts[block]

    def clear(self) -> None:
        """Forget all that is cached. What is held stays held, and is not found any more either."""
        self.wanted = frozenset()
        for block in (*self._cached, *(b for b, count in enumerate(self._ref_counts) if count)):
            self.index.remove(block)
        self._free += self._cached
        self._cached.clear()

    def _evict(self) -> int:
        """The least recently used block that no waiting request would use; if they would use all, the oldest."""
        while self._cached:
            block, _ = self._cached.popitem(last=False)
            if block not in self._wanted:
                break
            self._spared[block] = None
        else:
            block, _ = self._spared.popitem(last=False)
        self._wanted.discard(block)                     # what it holds next is not what was wanted
        self.index.remove(block)
        self.num_evicted += 1
        return block
