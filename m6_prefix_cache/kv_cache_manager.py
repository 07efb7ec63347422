"""Prefix caching: a sequence that starts brings the blocks of what others have computed before it.

    starts        finds its longest known prefix, holds those blocks, and runs the rest: one token at least
    runs          each block that it fills may be found by others from then on
    ends          lets go of its blocks; those that may be found stay as they are until their room is needed

To m3's manager, which does the rest, a prefix that was found is what a swapped sequence brings: blocks of the device.
"""
from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace
from weakref import WeakKeyDictionary

from m0_basics.request import Sequence, SequenceStatus
from m2_continuous_batching.kv_cache_manager import KVCacheManager, SlotCopy
from m3_paged_kv.block_pool import Pool
from m3_paged_kv.block_tables import BlockTables, HasBlocks, Place
from m3_paged_kv.holdings import Holdings
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager

from .block_hash import BlockHash, BlockHasher
from .block_pool import CachedBlockPool
from .lower_tier import LowerTier
from .prefix_index import NOTHING, Match, PrefixIndex


class PrefixKVCacheManager(KVCacheManager, HasBlocks):
    """m3's manager, over a pool that forgets late and an index that finds."""

    def __init__(self, pool: CachedBlockPool, hasher: BlockHasher, host_pool: Pool, watermark: float = 0.01,
                 steps_ahead: bool = False, below: LowerTier | None = None) -> None:
        """`steps_ahead`: a step may be chosen before the one before it has run, as async scheduling does.

        `below`: a tier that brings blocks into those of `host_pool`.
        """
        self.pool = pool
        self.index: PrefixIndex = pool.index
        self.hasher = hasher
        self.tables = BlockTables(pool, hasher.block_size)
        self.paged = PagedKVCacheManager(self.tables, host_pool, watermark)
        self.steps_ahead, self.below = steps_ahead, below
        self._matches: WeakKeyDictionary[Sequence, tuple[int, int, Match]] = WeakKeyDictionary()
        self._num_indexed: dict[int, int] = {}          # by seq_id: blocks of its table that were put into the index
        self._start: dict[int, int] = {}                # by seq_id: of its newest step
        self._announced: dict[BlockHash, int] = {}      # blocks that running sequences will fill: by whom (seq_id)
        self._waits_for: WeakKeyDictionary[Sequence, BlockHash] = WeakKeyDictionary()

    # ---- what a sequence finds

    def match(self, sequence: Sequence) -> Match:
        """The longest known prefix of a sequence that is not running; one token is left to run in any case."""
        seen = self._matches.get(sequence)
        if seen is not None and seen[:2] == (self.index.version, sequence.num_tokens):
            return seen[2]
        match = NOTHING
        if self._may_match(sequence):
            match = self.index.match(sequence, sequence.num_tokens - 1, seen[2] if seen else NOTHING)
        if match.partial is not None and not self._may_copy(sequence):
            match = replace(match, partial=None, num_partial=0)
        self._matches[sequence] = (self.index.version, sequence.num_tokens, match)
        return match

    def get_num_computed_tokens(self, sequence: Sequence) -> int:
        self._take_from_below(sequence)
        return max(self.paged.get_num_computed_tokens(sequence), self.match(sequence).num_tokens(self.index.block_size))

    def prefetch(self, sequence: Sequence) -> None:
        """A sequence may start soon: let the tier below bring what it has behind the sequence's match."""
        if self.below is not None and self._may_match(sequence) and not self.paged.swapped[sequence].num_tokens:
            num_known = len(self.match(sequence).blocks)
            self.below.prefetch(sequence, num_known, (sequence.num_tokens - 1) // self.index.block_size)

    def wait_for_below(self, sequences: Items[Sequence]) -> None:
        """If all that these wait for is the tier below, wait for the first of them."""
        if self.below is not None and all(map(self.below.is_reading, sequences)):
            for sequence in sequences[:1]:
                self.below.wait(sequence)

    def _take_from_below(self, sequence: Sequence) -> None:
        """Let a sequence that has not started hold what was brought for it, as one that was swapped out."""
        if self.below is None:
            return
        first, brought = self.below.take(sequence)
        known = self.match(sequence).blocks
        # Of no use is what the device has by now, and all of it if what it stood on is gone.
        is_of_use = first <= len(known) and not self.paged.swapped[sequence].num_tokens
        used = brought[len(known) - first:] if is_of_use else []
        for block in brought[:len(brought) - len(used)]:
            self.paged.swapped.host_pool.release(block)
        if used:
            for block in known:
                self.pool.share(block)
            held = [*(("device", block) for block in known), *(("host", block) for block in used)]
            self.paged.swapped.hold(sequence, Holdings(len(held) * self.index.block_size, held))

    def should_wait(self, sequence: Sequence) -> bool:
        """What it needs next is on its way: read from below, or filled by another, so that it is computed once."""
        if self.below is not None and self.below.is_reading(sequence):
            return True
        if self._waits_for.get(sequence) in self._announced:
            return True
        if not self._announced or self.paged.swapped[sequence].num_tokens or not self._may_match(sequence):
            return False
        number = len(self.match(sequence).blocks)
        if (number + 1) * self.index.block_size > sequence.num_tokens:
            return False
        self._waits_for[sequence] = self.hasher.hashes(sequence, number + 1)[number]
        return self._waits_for[sequence] in self._announced

    @staticmethod
    def _may_match(sequence: Sequence) -> bool:
        """The log-probabilities of a prompt come from running it, once."""
        params = sequence.sampling_params
        return params.prompt_logprobs is None or bool(sequence.output_token_ids)

    def _may_copy(self, sequence: Sequence) -> bool:
        """While a block is copied there are two of it: a sequence that needs the whole pool could never start."""
        return self.tables.num_blocks_of(sequence.num_tokens) < self.pool.num_blocks

    # ---- starting and running

    def allocate_slots(self, sequence: Sequence, num_computed_tokens: int, num_tokens: int) -> bool:
        if sequence in self.tables:
            self._index_blocks(sequence, num_computed_tokens)
            return self._note(sequence, num_computed_tokens,
                              self.paged.allocate_slots(sequence, num_computed_tokens, num_tokens))
        if self._is_swapped(sequence, num_computed_tokens):
            if not self.paged.fits_without(sequence, num_computed_tokens, num_tokens, []):
                return False
            self._merge_swapped(sequence)
            started = self.paged.allocate_slots(sequence, num_computed_tokens, num_tokens)
        else:
            pinned = self._hold(sequence, num_computed_tokens)
            started = self.paged.allocate_slots(sequence, num_computed_tokens, num_tokens)
            self._let_go(sequence, pinned, was_used=started)
        if started:
            self._num_indexed[sequence.seq_id] = 0
            self._announce(sequence)
        return self._note(sequence, num_computed_tokens, started)

    def fits_without(self, sequence: Sequence, num_computed_tokens: int, num_tokens: int,
                     victims: list[Sequence]) -> bool:
        if self._is_swapped(sequence, num_computed_tokens):
            return self.paged.fits_without(sequence, num_computed_tokens, num_tokens, victims)
        pinned = self._hold(sequence, num_computed_tokens)
        fits = self.paged.fits_without(sequence, num_computed_tokens, num_tokens, victims)
        self._let_go(sequence, pinned, was_used=False)
        return fits

    def _is_swapped(self, sequence: Sequence, start: int) -> bool:
        """Whether a sequence starts from what it holds in host memory; else that is of no use any more."""
        return bool(start) and start == self.paged.get_num_computed_tokens(sequence)

    def _hold(self, sequence: Sequence, start: int) -> int | None:
        """Let a sequence hold the blocks of its first `start` tokens. Returns one that is held twice, to be copied."""
        self.paged.swapped.drop(sequence.seq_id)
        if not start:
            return None
        match, num_whole = self.match(sequence), start // self.index.block_size
        assert match.num_tokens(self.index.block_size) >= start, "nothing goes while a step is chosen"
        blocks, pinned = list(match.blocks[:num_whole]), None
        if start % self.index.block_size:
            pinned = match.blocks[num_whole] if num_whole < len(match.blocks) else match.partial
            assert pinned is not None
            blocks.append(pinned)
            self.pool.share(pinned)
        for block in blocks:
            self.pool.share(block)
        self.paged.swapped.hold(sequence, Holdings(start, [("device", block) for block in blocks]))
        return pinned

    def _let_go(self, sequence: Sequence, pinned: int | None, was_used: bool) -> None:
        """Undo `_hold`, as far as the sequence has not started with it: the tail of the prefix first."""
        if pinned is not None:
            self.pool.release(pinned)
        if not was_used:
            self.paged.swapped.drop(sequence.seq_id)

    def _merge_swapped(self, sequence: Sequence) -> None:
        """What a swapped sequence holds on the host and others have on the device is held there: one copy of it."""
        held = self.paged.swapped[sequence].blocks
        for number, block in enumerate(self.match(sequence).blocks[:len(held)]):
            if held[number][0] == "host":
                self.pool.share(block)
                self.paged.swapped.move_back(sequence, number, block)

    # ---- what others may find

    def _note(self, sequence: Sequence, start: int, has_room: bool) -> bool:
        """A step is chosen that runs from `start` on. A newcomer's first one: what it brings may still be copied."""
        if has_room:
            self._start[sequence.seq_id] = start if sequence.seq_id in self._start else 0
        return has_room

    def _index_blocks(self, sequence: Sequence, num_computed_tokens: int) -> None:
        """Put the blocks that a running sequence has filled into the index.

        A block that is known already takes the place of the sequence's own. Where steps are chosen ahead, the newest
        one may not have run yet, and may fail: then only what lies before it counts.
        """
        if self.steps_ahead:
            num_computed_tokens = min(num_computed_tokens, self._start.get(sequence.seq_id, 0))
        table, first = self.tables[sequence], self._num_indexed.get(sequence.seq_id, 0)
        last = min(num_computed_tokens, sequence.num_tokens) // self.index.block_size
        for number in range(first, last):
            own = table[number]
            known = self.index.insert(sequence, number, table[number - 1] if number else None, own)
            self._withdraw(sequence, number)
            if known is not None and known != own:
                self.pool.share(known)
                self.tables.replace(sequence, number, known)
        self._num_indexed[sequence.seq_id] = max(first, last)

    def _announce(self, sequence: Sequence) -> None:
        """Others may wait for the blocks that a sequence is about to fill."""
        num_blocks = sequence.num_tokens // self.index.block_size
        for block_hash in self.hasher.hashes(sequence, num_blocks)[len(self.match(sequence).blocks):num_blocks]:
            self._announced.setdefault(block_hash, sequence.seq_id)

    def _withdraw(self, sequence: Sequence, number: int) -> None:
        block_hash = self.hasher.hashes(sequence, number + 1)[number]
        if self._announced.get(block_hash) == sequence.seq_id:
            del self._announced[block_hash]

    def _leave(self, sequence: Sequence) -> None:
        """A sequence is about to give up its table."""
        if sequence in self.tables:
            self._index_blocks(sequence, sequence.num_computed_tokens)
            for number in range(self._num_indexed[sequence.seq_id], sequence.num_tokens // self.index.block_size):
                self._withdraw(sequence, number)
        self._num_indexed.pop(sequence.seq_id, None)
        self._start.pop(sequence.seq_id, None)

    # ---- leaving, and what m3's manager does alone

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        self._index_blocks(parent, parent.num_computed_tokens)
        if not self.paged.fork(parent, child):
            return False
        self._num_indexed[child.seq_id] = self._num_indexed[parent.seq_id]
        self._start[child.seq_id] = self._start[parent.seq_id]
        return True

    def preempt(self, sequence: Sequence) -> SequenceStatus:
        self._leave(sequence)
        return self.paged.preempt(sequence)

    def free(self, sequence: Sequence) -> None:
        if self.below is not None:
            self.below.give_up(sequence)
            if sequence in self.tables:
                self._index_blocks(sequence, sequence.num_computed_tokens)
                self.below.keep(sequence, self.tables[sequence][:self._num_indexed[sequence.seq_id]])
        self._leave(sequence)
        self.paged.free(sequence)
        self.pool.trim()

    def places_of(self, sequence: Sequence) -> list[Place]:
        return self.paged.places_of(sequence)

    def take_copies(self) -> list[SlotCopy]:
        self.pool.trim()
        return self.paged.take_copies()

    def reset(self) -> bool:
        """Forget what is cached. False: some of it is held, by sequences that have not ended; nothing has changed."""
        if len(self.tables) or len(self.paged.swapped):
            return False
        self.pool.clear()
        return True

    @property
    def usage(self) -> float:
        return self.paged.usage

    def can_ever_hold(self, num_tokens: int) -> bool:
        return self.paged.can_ever_hold(num_tokens)
