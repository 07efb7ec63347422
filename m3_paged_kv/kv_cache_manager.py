"""Paging: a sequence's cache is a list of blocks, allocated as it grows, shared where two sequences agree.

    table of A   [ 4 | 1 | 7 ]      token i lies in slot  table[i // block_size] * block_size + i % block_size
    table of B   [ 4 | 1 | 2 ]      B was forked from A: blocks 4 and 1 are the same memory

A shared block is only read. Before a sequence writes into one, it gets a copy of its own (copy-on-write).
A sequence that has to give way either loses its blocks, and is recomputed, or has them moved to host memory.
One that may forget gives up blocks from the middle: its later tokens then lie that much further to the front.
Slots [0, num_blocks * block_size) are the device's; the host's follow, so that a swap is a copy like any other.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from m0_basics.request import Sequence, SequenceStatus
from m2_continuous_batching.kv_cache_manager import KVCacheManager, SlotCopy

from .block_pool import BlockPool

Place = tuple[str, int]             # ("device", block) or ("host", block)


@dataclass(frozen=True)
class Swapped:
    """A sequence in host memory. Its blocks in order; those that others use too are still on the device."""

    num_tokens: int
    blocks: list[Place] = field(default_factory=list)


class PagedKVCacheManager(KVCacheManager):
    """Block tables over a pool of device blocks, and a pool of host blocks for those who had to leave."""

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0, watermark: float = 0.01) -> None:
        """`num_host_blocks` 0 means that preempted sequences are recomputed. `watermark` is the share of the blocks
        that a newcomer has to leave free, so that it is not the next one to be thrown out."""
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.host_pool = BlockPool(num_host_blocks)
        self.num_reserved = int(watermark * num_blocks)
        self._tables: dict[int, list[int]] = {}             # by seq_id: sequences on the device
        self._swapped: dict[int, Swapped] = {}              # by seq_id: sequences in host memory, oldest first
        self._num_evicted: dict[int, int] = {}              # by seq_id: tokens of sequences that have forgotten some
        self._copies: list[SlotCopy] = []

    def get_num_computed_tokens(self, sequence: Sequence) -> int:
        swapped = self._swapped.get(sequence.seq_id, Swapped(0))
        # One token is left to run in any case: the next one is sampled from its logits.
        return min(swapped.num_tokens, sequence.num_tokens - 1)

    def block_table(self, sequence: Sequence) -> list[int]:
        """The sequence's blocks, in order. Read only."""
        return self._tables[sequence.seq_id]

    def places_of(self, sequence: Sequence) -> list[Place]:
        """Where a sequence's blocks lie, in order; [] if it holds none. Only a swapped one has blocks on the host."""
        if (table := self._tables.get(sequence.seq_id)) is not None:
            return [("device", block) for block in table]
        return self._swapped.get(sequence.seq_id, Swapped(0)).blocks.copy()

    def num_evicted(self, sequence: Sequence) -> int:
        """Computed tokens that the sequence has forgotten: position p lies at place p - num_evicted of its table."""
        return self._num_evicted.get(sequence.seq_id, 0)

    def num_kept(self, sequence: Sequence) -> int:
        """Computed tokens whose keys and values are still there."""
        return sequence.num_computed_tokens - self.num_evicted(sequence)

    def evict(self, sequence: Sequence, indices: Iterable[int]) -> None:
        """Let a running sequence forget the tokens in some of its blocks, named by their index in its table.

        They have all run, and the newest token is not among them.
        """
        table, chosen = self._tables[sequence.seq_id], sorted(set(indices), reverse=True)
        if not chosen:
            return
        assert chosen[-1] >= 0 and (chosen[0] + 1) * self.block_size < self.num_kept(sequence)
        for index in chosen:
            self.pool.release(table.pop(index))
        self._num_evicted[sequence.seq_id] = self.num_evicted(sequence) + len(chosen) * self.block_size

    def allocate_slots(self, sequence: Sequence, num_tokens: int) -> bool:
        if (table := self._tables.get(sequence.seq_id)) is not None:
            start = self.num_kept(sequence)
            while not self._grow(table, start, num_tokens):
                if len(self._tables) > 1 or not self._drop_latest_swapped(sequence, start + num_tokens):
                    return False
            return True
        if not self._may_start(sequence, num_tokens):
            return False
        start = self.get_num_computed_tokens(sequence) - self.num_evicted(sequence)
        self._tables[sequence.seq_id] = table = self._swap_in(sequence)
        grown = self._grow(table, start, num_tokens)
        assert grown, "_may_start has counted the blocks"
        return True

    def fits_without(self, sequence: Sequence, num_tokens: int, victims: list[Sequence]) -> bool:
        """Exact: counts what `preempt` would free, one victim after the other."""
        if len(victims) == len(self._tables):
            return True                 # alone it fits: it would have been refused on arrival if it did not
        gone: Counter[int] = Counter()              # by block: references that the victims would give up
        host_free = self.host_pool.num_free
        for victim in victims:
            ran, ahead = self._split_table(victim)
            private = [block for block in ran if self.pool.ref_count(block) - gone[block] == 1]
            swaps = self._may_swap(len(private), host_free)
            gone.update(ahead + (private if swaps else ran))
            host_free -= len(private) if swaps else 0
        num_free = self.pool.num_free + sum(self.pool.ref_count(block) == count for block, count in gone.items())
        return num_free - self._blocks_to_start(sequence, num_tokens, gone) >= self.num_reserved

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        blocks = self._tables[parent.seq_id][:self.num_blocks_of(self.num_kept(parent))]
        for block in blocks:
            self.pool.share(block)
        self._tables[child.seq_id] = blocks
        if parent.seq_id in self._num_evicted:
            self._num_evicted[child.seq_id] = self._num_evicted[parent.seq_id]
        return True

    def preempt(self, sequence: Sequence) -> SequenceStatus:
        """To host memory if it has room, else nothing is kept. Blocks that others use too stay where they are."""
        blocks, ahead = self._split_table(sequence)
        del self._tables[sequence.seq_id]
        self._release(("device", block) for block in reversed(ahead))
        num_private = sum(self.pool.ref_count(block) == 1 for block in blocks)
        if not self._may_swap(num_private, self.host_pool.num_free):
            self._release(("device", block) for block in blocks)
            self._num_evicted.pop(sequence.seq_id, None)            # recomputed, it has everything again
            return SequenceStatus.WAITING
        places: list[Place] = []
        for block in reversed(blocks):                          # from the tail to the head
            if self.pool.ref_count(block) > 1:
                places.append(("device", block))
                continue
            host_block = self.host_pool.allocate()
            self._copy_block(("device", block), ("host", host_block))
            self.pool.release(block)
            places.append(("host", host_block))
        self._swapped[sequence.seq_id] = Swapped(sequence.num_computed_tokens, places[::-1])
        return SequenceStatus.SWAPPED

    def free(self, sequence: Sequence) -> None:
        self._release(("device", block) for block in self._tables.pop(sequence.seq_id, []))
        self._forget_swapped(sequence.seq_id)

    def take_copies(self) -> list[SlotCopy]:
        copies, self._copies = self._copies, []
        return copies

    @property
    def usage(self) -> float:
        return self.pool.num_used / self.pool.num_blocks

    @property
    def num_swapped(self) -> int:
        """Sequences whose cache lies in host memory."""
        return len(self._swapped)

    def can_ever_hold(self, num_tokens: int) -> bool:
        return self.num_blocks_of(num_tokens) <= self.pool.num_blocks

    def num_blocks_of(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def _split_table(self, sequence: Sequence) -> tuple[list[int], list[int]]:
        """Blocks of the tokens that have run, and those allocated for tokens that have not."""
        table, num_ran = self._tables[sequence.seq_id], self.num_blocks_of(self.num_kept(sequence))
        return table[:num_ran], table[num_ran:]

    def _may_swap(self, num_private: int, num_host_free: int) -> bool:
        return self.host_pool.num_blocks > 0 and num_private <= num_host_free

    def _grow(self, table: list[int], start: int, num_tokens: int) -> bool:
        """Make the slots [start, start + num_tokens) of a table writable: own blocks for all of them."""
        num_new = self.num_blocks_of(start + num_tokens) - len(table)
        first = start // self.block_size                        # the block that the first new token goes into
        must_copy = first < len(table) and self.pool.ref_count(table[first]) > 1
        if num_new <= 0 and not must_copy:
            return True                                         # most steps: the last block has room
        if num_new + must_copy > self.pool.num_free:
            return False
        if must_copy:
            own = self.pool.allocate()
            self._copies.append(SlotCopy(table[first] * self.block_size, own * self.block_size,
                                         start % self.block_size))
            self.pool.release(table[first])
            table[first] = own
        table += [self.pool.allocate() for _ in range(num_new)]
        return True

    def _may_start(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether a sequence that holds no table now may come in, and leave the watermark free."""
        if self._tables:
            return self.pool.num_free - self._blocks_to_start(sequence, num_tokens, {}) >= self.num_reserved
        start = self.get_num_computed_tokens(sequence) - self.num_evicted(sequence)
        while self.pool.num_free < self._blocks_to_start(sequence, num_tokens, {}):
            if not self._drop_latest_swapped(sequence, start + num_tokens):
                return False
        return True

    def _drop_latest_swapped(self, sequence: Sequence, num_tokens: int) -> bool:
        """Nobody but `sequence` could run, and it has no room: whoever was swapped out last gives up what it holds.

        Blocks that swapped sequences share are still on the device. They must not lock everybody out. But nobody gives
        anything up in vain: not for `num_tokens` tokens in all that would not fit into the empty pool either.
        """
        if not self.can_ever_hold(num_tokens):
            return False
        other = next((seq_id for seq_id in reversed(self._swapped) if seq_id != sequence.seq_id), None)
        if other is not None:
            self._forget_swapped(other)
        return other is not None

    def _blocks_to_start(self, sequence: Sequence, num_tokens: int, gone: Mapping[int, int]) -> int:
        """Free blocks that a sequence takes as it comes in: for what is swapped, for what is new, for a copy.

        `gone` says of blocks how many of their holders will have let go by then.
        """
        swapped = self._swapped.get(sequence.seq_id, Swapped(0))
        on_device = [block for place, block in swapped.blocks if place == "device"]
        start = self.get_num_computed_tokens(sequence) - self.num_evicted(sequence)
        first = start // self.block_size                        # the block that the first new token goes into
        place, block = swapped.blocks[first] if first < len(swapped.blocks) else ("host", 0)
        is_shared = place == "device" and self.pool.ref_count(block) - gone.get(block, 0) > 1
        return self.num_blocks_of(start + num_tokens) - len(on_device) + is_shared

    def _swap_in(self, sequence: Sequence) -> list[int]:
        """The table of a sequence that comes in, its blocks in host memory brought back; [] if it has none."""
        table: list[int] = []
        for place, block in self._swapped.pop(sequence.seq_id, Swapped(0)).blocks:
            if place == "host":
                table.append(self.pool.allocate())
                self._copy_block((place, block), ("device", table[-1]))
                self.host_pool.release(block)
            else:
                table.append(block)
        return table

    def _forget_swapped(self, seq_id: int) -> None:
        self._num_evicted.pop(seq_id, None)
        if (swapped := self._swapped.pop(seq_id, None)) is not None:
            self._release(swapped.blocks)

    def _release(self, places: Iterable[Place]) -> None:
        for place, block in places:
            (self.pool if place == "device" else self.host_pool).release(block)

    def _copy_block(self, source: Place, target: Place) -> None:
        self._copies.append(SlotCopy(self._first_slot(source), self._first_slot(target), self.block_size))

    def _first_slot(self, place: Place) -> int:
        """Host blocks are numbered after the device's."""
        return (place[1] + (self.pool.num_blocks if place[0] == "host" else 0)) * self.block_size
