"""Paging: the memory of a sequence is taken block by block, as it grows.

    starts        brings what it holds in host memory, or nothing; then takes the blocks that are missing
    runs          takes a block whenever its last one is full
    gives way     its blocks move to host memory, and come back when it starts again; or are lost, and it is recomputed
"""
from __future__ import annotations

from collections import Counter

from m0_basics.request import Sequence, SequenceStatus
from m2_continuous_batching.kv_cache_manager import KVCacheManager, SlotCopy

from .block_pool import BlockPool, Pool
from .block_tables import BlockTables, HasBlocks, Place
from .holdings import SwapSpace, blocks_to_start


class PagedKVCacheManager(KVCacheManager, HasBlocks):
    """Decides who may have blocks: for those who run a table, for those who had to leave a place in host memory."""

    def __init__(self, tables: BlockTables, host_pool: Pool, watermark: float = 0.01) -> None:
        """A `host_pool` without blocks means that preempted sequences are recomputed. `watermark` is the share of the
        blocks that a newcomer has to leave free, so that it is not the next one to be preempted."""
        self.tables = tables
        self.pool = tables.pool
        self.swapped = SwapSpace(tables, host_pool)
        self.num_reserved = int(watermark * self.pool.num_blocks)

    def get_num_computed_tokens(self, sequence: Sequence) -> int:
        # One token is left to run in any case: the next one is sampled from its logits.
        return min(self.swapped[sequence].num_tokens, sequence.num_tokens - 1)

    def places_of(self, sequence: Sequence) -> list[Place]:
        if sequence in self.tables:
            return [("device", block) for block in self.tables[sequence]]
        return self.swapped[sequence].blocks.copy()

    def allocate_slots(self, sequence: Sequence, num_computed_tokens: int, num_tokens: int) -> bool:
        start = self.tables.place(sequence, num_computed_tokens)
        if sequence in self.tables:
            while not self.tables.grow(sequence, start, num_tokens):
                if len(self.tables) > 1 or not self._drop_latest_swapped(sequence, start + num_tokens):
                    return False
            return True
        if not self._may_start(sequence, start, num_tokens):
            return False
        self.tables.open(sequence, self.swapped.swap_in(sequence))
        grown = self.tables.grow(sequence, start, num_tokens)
        assert grown, "_may_start has counted the blocks"
        return True

    def fits_without(self, sequence: Sequence, num_computed_tokens: int, num_tokens: int,
                     victims: list[Sequence]) -> bool:
        """Exact: counts what `preempt` would free, one victim after the other."""
        if len(victims) == len(self.tables):
            return True                 # alone it fits: it would have been refused on arrival if it did not
        gone: Counter[int] = Counter()              # by block: references that the victims would give up
        host_free = self.swapped.host_pool.num_free
        for victim in victims:
            ran, ahead = self.tables.split(victim)
            private = [block for block in ran if self.pool.ref_count(block) - gone[block] == 1]
            swaps = self.swapped.takes(len(private), host_free)
            gone.update(ahead + (private if swaps else ran))
            host_free -= len(private) if swaps else 0
        num_free = self.pool.num_free + sum(self.pool.ref_count(block) == count for block, count in gone.items())
        start = self.tables.place(sequence, num_computed_tokens)
        needed = blocks_to_start(self.tables, self.swapped[sequence], start, num_tokens, gone)
        return num_free - needed >= self.num_reserved

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        self.tables.fork(parent, child)
        return True

    def preempt(self, sequence: Sequence) -> SequenceStatus:
        """To host memory if it has room, else nothing is kept. Blocks that others use too stay where they are."""
        ran, ahead = self.tables.split(sequence)
        self.tables.close(sequence)
        self.tables.release(ahead)
        if self.swapped.swap_out(sequence, ran):
            return SequenceStatus.SWAPPED
        self.tables.release(ran)
        self.tables.forget(sequence.seq_id)
        return SequenceStatus.WAITING

    def free(self, sequence: Sequence) -> None:
        self.tables.release(self.tables.close(sequence))
        self.swapped.drop(sequence.seq_id)

    def take_copies(self) -> list[SlotCopy]:
        copies, self.tables.copies = self.tables.copies, []
        return copies

    @property
    def usage(self) -> float:
        return self.pool.num_used / self.pool.num_blocks

    def can_ever_hold(self, num_tokens: int) -> bool:
        return self.tables.num_blocks_of(num_tokens) <= self.pool.num_blocks

    def _may_start(self, sequence: Sequence, start: int, num_tokens: int) -> bool:
        """Whether a sequence that is not running may come in, and leave the watermark free."""
        holdings = self.swapped[sequence]
        if len(self.tables):
            needed = blocks_to_start(self.tables, holdings, start, num_tokens, {})
            return self.pool.num_free - needed >= self.num_reserved
        while self.pool.num_free < blocks_to_start(self.tables, holdings, start, num_tokens, {}):
            if not self._drop_latest_swapped(sequence, start + num_tokens):
                return False
        return True

    def _drop_latest_swapped(self, sequence: Sequence, num_tokens: int) -> bool:
        """Nobody but `sequence` could run, and it has no room: whoever was swapped out last loses what it holds.

        Blocks that swapped sequences share are still on the device: they must not keep everybody out for ever. Nothing
        is dropped where it would not help: where `num_tokens` tokens in all would not fit into the empty pool either.
        """
        return self.can_ever_hold(num_tokens) and self.swapped.drop_latest(but=sequence)


def paged_manager(num_blocks: int, block_size: int, num_host_blocks: int = 0,
                  watermark: float = 0.01) -> PagedKVCacheManager:
    """A manager over pools of its own: `num_blocks` on the device, `num_host_blocks` for those who had to leave."""
    tables = BlockTables(BlockPool(num_blocks), block_size)
    return PagedKVCacheManager(tables, BlockPool(num_host_blocks), watermark)
