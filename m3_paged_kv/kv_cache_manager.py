"""Paging: the memory of a sequence is taken block by block, as it grows.

    starts        brings its holdings: what it left in host memory, or nothing; then takes the blocks that are missing
    runs          takes a block whenever its last one is full
    gives way     loses its blocks, and is recomputed; or they move to host memory, and come back when it starts again

Slots [0, num_blocks * block_size) are the device's; the host's follow, so that a swap is a copy like any other.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from m0_basics.request import Sequence, SequenceStatus
from m2_continuous_batching.kv_cache_manager import KVCacheManager, SlotCopy

from .block_pool import BlockPool
from .block_tables import BlockTables, HasBlocks

Place = tuple[str, int]             # ("device", block) or ("host", block)


@dataclass(frozen=True)
class Holdings:
    """What a sequence that is not running brings when it starts: computed tokens, and its blocks in order.

    Of a swapped sequence, the blocks that others use too are still on the device.
    """

    num_tokens: int = 0
    blocks: list[Place] = field(default_factory=list)


class PagedKVCacheManager(KVCacheManager, HasBlocks):
    """Block tables over a pool of device blocks, and a pool of host blocks for those who had to leave."""

    def __init__(self, tables: BlockTables, host_pool: BlockPool, watermark: float = 0.01) -> None:
        """A `host_pool` without blocks means that preempted sequences are recomputed. `watermark` is the share of the
        blocks that a newcomer has to leave free, so that it is not the next one to be thrown out."""
        self.tables = tables
        self.pool = tables.pool
        self.host_pool = host_pool
        self.num_reserved = int(watermark * self.pool.num_blocks)
        self._swapped: dict[int, Holdings] = {}             # by seq_id: sequences in host memory, oldest first

    def get_num_computed_tokens(self, sequence: Sequence) -> int:
        # One token is left to run in any case: the next one is sampled from its logits.
        return min(self._holdings(sequence).num_tokens, sequence.num_tokens - 1)

    def places_of(self, sequence: Sequence) -> list[Place]:
        """Where a sequence's blocks lie, in order; [] if it holds none. Only a swapped one has blocks on the host."""
        if sequence in self.tables:
            return [("device", block) for block in self.tables[sequence]]
        return self._holdings(sequence).blocks.copy()

    def allocate_slots(self, sequence: Sequence, num_computed_tokens: int, num_tokens: int) -> bool:
        start = self.tables.place(sequence, num_computed_tokens)
        if sequence in self.tables:
            while not self.tables.grow(sequence, start, num_tokens):
                if len(self.tables) > 1 or not self._drop_latest_swapped(sequence, start + num_tokens):
                    return False
            return True
        if not self._may_start(sequence, start, num_tokens):
            return False
        self._bring_in(sequence)
        grown = self.tables.grow(sequence, start, num_tokens)
        assert grown, "_may_start has counted the blocks"
        return True

    def fits_without(self, sequence: Sequence, num_computed_tokens: int, num_tokens: int,
                     victims: list[Sequence]) -> bool:
        """Exact: counts what `preempt` would free, one victim after the other."""
        if len(victims) == len(self.tables):
            return True                 # alone it fits: it would have been refused on arrival if it did not
        gone: Counter[int] = Counter()              # by block: references that the victims would give up
        host_free = self.host_pool.num_free
        for victim in victims:
            ran, ahead = self.tables.split(victim)
            private = [block for block in ran if self.pool.ref_count(block) - gone[block] == 1]
            swaps = self._may_swap(len(private), host_free)
            gone.update(ahead + (private if swaps else ran))
            host_free -= len(private) if swaps else 0
        num_free = self.pool.num_free + sum(self.pool.ref_count(block) == count for block, count in gone.items())
        start = self.tables.place(sequence, num_computed_tokens)
        return num_free - self._blocks_to_start(sequence, start, num_tokens, gone) >= self.num_reserved

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        self.tables.fork(parent, child)
        return True

    def preempt(self, sequence: Sequence) -> SequenceStatus:
        """To host memory if it has room, else nothing is kept. Blocks that others use too stay where they are."""
        ran, ahead = self.tables.split(sequence)
        self.tables.close(sequence)
        self.tables.release(ahead)
        num_private = sum(self.pool.ref_count(block) == 1 for block in ran)
        if not self._may_swap(num_private, self.host_pool.num_free):
            self.tables.release(ran)
            self.tables.forget(sequence.seq_id)
            return SequenceStatus.WAITING
        self._swapped[sequence.seq_id] = Holdings(sequence.num_computed_tokens, self._swap_out(ran))
        return SequenceStatus.SWAPPED

    def free(self, sequence: Sequence) -> None:
        self.tables.release(self.tables.close(sequence))
        self._drop_holdings(sequence.seq_id)

    def take_copies(self) -> list[SlotCopy]:
        copies, self.tables.copies = self.tables.copies, []
        return copies

    @property
    def usage(self) -> float:
        return self.pool.num_used / self.pool.num_blocks

    @property
    def num_swapped(self) -> int:
        """Sequences whose cache lies in host memory."""
        return len(self._swapped)

    def can_ever_hold(self, num_tokens: int) -> bool:
        return self.tables.num_blocks_of(num_tokens) <= self.pool.num_blocks

    def _holdings(self, sequence: Sequence) -> Holdings:
        return self._swapped.get(sequence.seq_id, Holdings())

    def _may_swap(self, num_private: int, num_host_free: int) -> bool:
        return self.host_pool.num_blocks > 0 and num_private <= num_host_free

    def _may_start(self, sequence: Sequence, start: int, num_tokens: int) -> bool:
        """Whether a sequence that is not running may come in, and leave the watermark free."""
        if len(self.tables):
            return self.pool.num_free - self._blocks_to_start(sequence, start, num_tokens, {}) >= self.num_reserved
        while self.pool.num_free < self._blocks_to_start(sequence, start, num_tokens, {}):
            if not self._drop_latest_swapped(sequence, start + num_tokens):
                return False
        return True

    def _blocks_to_start(self, sequence: Sequence, start: int, num_tokens: int, gone: Mapping[int, int]) -> int:
        """Free blocks that a sequence takes as it comes in: for what is swapped, for what is new, for a copy.

        `gone` says of blocks how many of their holders will have let go by then.
        """
        blocks = self._holdings(sequence).blocks
        num_on_device = sum(place == "device" for place, _ in blocks)
        first = start // self.tables.block_size                 # the block that the first new token goes into
        place, block = blocks[first] if first < len(blocks) else ("host", 0)
        is_shared = place == "device" and self.pool.ref_count(block) - gone.get(block, 0) > 1
        return self.tables.num_blocks_of(start + num_tokens) - num_on_device + is_shared

    def _drop_latest_swapped(self, sequence: Sequence, num_tokens: int) -> bool:
        """Nobody but `sequence` could run, and it has no room: whoever was swapped out last loses what it holds.

        Blocks that swapped sequences share are still on the device: they must not keep everybody out for ever. Nothing
        is dropped where it would not help: where `num_tokens` tokens in all would not fit into the empty pool either.
        """
        if not self.can_ever_hold(num_tokens):
            return False
        other = next((seq_id for seq_id in reversed(self._swapped) if seq_id != sequence.seq_id), None)
        if other is not None:
            self._drop_holdings(other)
        return other is not None

    def _swap_out(self, blocks: list[int]) -> list[Place]:
        """Move blocks to host memory, from the tail to the head, all but those that others use; where each is then."""
        places: list[Place] = []
        for block in reversed(blocks):
            if self.pool.ref_count(block) > 1:
                places.append(("device", block))
                continue
            host_block = self.host_pool.allocate()
            self._copy_block(("device", block), ("host", host_block))
            self.pool.release(block)
            places.append(("host", host_block))
        return places[::-1]

    def _bring_in(self, sequence: Sequence) -> None:
        """Open the table of a sequence that starts; what it holds in host memory comes back."""
        table: list[int] = []
        for place, block in self._swapped.pop(sequence.seq_id, Holdings()).blocks:
            if place == "host":
                table.append(self.pool.allocate())
                self._copy_block((place, block), ("device", table[-1]))
                self.host_pool.release(block)
            else:
                table.append(block)
        self.tables.open(sequence, table)

    def _drop_holdings(self, seq_id: int) -> None:
        self.tables.forget(seq_id)
        self._release(reversed(self._swapped.pop(seq_id, Holdings()).blocks))

    def _release(self, places: Iterable[Place]) -> None:
        for place, block in places:
            (self.pool if place == "device" else self.host_pool).release(block)

    def _copy_block(self, source: Place, target: Place) -> None:
        size = self.tables.block_size
        self.tables.copies.append(SlotCopy(self._first_slot(source), self._first_slot(target), size))

    def _first_slot(self, place: Place) -> int:
        """Host blocks are numbered after the device's."""
        return (place[1] + (self.pool.num_blocks if place[0] == "host" else 0)) * self.tables.block_size


def paged_manager(num_blocks: int, block_size: int, num_host_blocks: int = 0,
                  watermark: float = 0.01) -> PagedKVCacheManager:
    """A manager over pools of its own: `num_blocks` on the device, `num_host_blocks` for those who had to leave."""
    tables = BlockTables(BlockPool(num_blocks), block_size)
    return PagedKVCacheManager(tables, BlockPool(num_host_blocks), watermark)
