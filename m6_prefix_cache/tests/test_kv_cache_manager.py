"""F6.1, F6.3, F6.4, F6.5: whatever happens to sequences, each finds its own tokens where its block table says.

The manager keeps books; here is a memory to go with them. Every slot holds the mark of what was written to it last: the
salt and all tokens up to the one whose keys and values it stands for. If a block were shared that holds something else,
handed out while somebody reads it, or copied from the wrong place, some sequence would find a stranger's mark.
"""
from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from m0_basics.request import Sequence, SequenceData, SequenceStatus, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m3_paged_kv.block_pool import BlockPool
from m6_prefix_cache.block_hash import BlockHasher, HashIndex
from m6_prefix_cache.block_pool import CachedBlockPool
from m6_prefix_cache.kv_cache_manager import PrefixKVCacheManager
from m6_prefix_cache.radix_tree import RadixTree

Mark = tuple[str, tuple[int, ...]]
SALTS = ("", "a")


def make_sequence(tokens: list[int], salt: str = "", params: SamplingParams | None = None) -> Sequence:
    return Sequence(next_seq_id(), SequenceData(tokens), params or SamplingParams(), seed=0, cache_salt=salt)


def make_manager(num_blocks: int = 16, block_size: int = 4, kind: str = "radix", num_host_blocks: int = 0,
                 max_cached: int | None = None, steps_ahead: bool = False) -> PrefixKVCacheManager:
    hasher = BlockHasher(block_size, "model")
    index = RadixTree(block_size) if kind == "radix" else HashIndex(hasher)
    return PrefixKVCacheManager(CachedBlockPool(num_blocks, index, max_cached), hasher, BlockPool(num_host_blocks),
                                watermark=0.0, steps_ahead=steps_ahead)


def mark(sequence: Sequence, position: int) -> Mark:
    return sequence.cache_salt, tuple(sequence.data.token_ids[:position + 1])


class PrefixMachine(RuleBasedStateMachine):
    """Queue, start, displace, run in pieces, grow, fork, fail, preempt, resume, free, in any order; few tokens, so that
    much is shared."""

    @initialize(num_blocks=st.integers(3, 14), block_size=st.integers(1, 4), num_host_blocks=st.integers(0, 8),
                kind=st.sampled_from(["radix", "hash"]), max_cached=st.none() | st.integers(0, 6), ahead=st.booleans())
    def begin(self, num_blocks: int, block_size: int, num_host_blocks: int, kind: str,
              max_cached: int | None, ahead: bool) -> None:
        self.manager = make_manager(num_blocks, block_size, kind, num_host_blocks, max_cached, ahead)
        self.newest: dict[int, int] = {}                # by seq_id: where its newest step starts
        self.first: set[int] = set()                    # of sequences that have had one step
        self.queued: list[Sequence] = []
        self.kind, self.size = kind, block_size
        self.memory: dict[int, Mark] = {}
        self.running: list[Sequence] = []
        self.away: list[Sequence] = []

    # ---- what the engine does

    def slot(self, sequence: Sequence, position: int) -> int:
        return self.manager.tables[sequence][position // self.size] * self.size + position % self.size

    def run_step(self, sequence: Sequence, start: int, num_tokens: int) -> None:
        for copy in self.manager.take_copies():
            values = [self.memory.get(copy.source + i) for i in range(copy.num_slots)]
            for i, value in enumerate(values):
                if value is None:
                    self.memory.pop(copy.target + i, None)
                else:
                    self.memory[copy.target + i] = value
        for position in range(start, start + num_tokens):
            self.memory[self.slot(sequence, position)] = mark(sequence, position)
        sequence.num_computed_tokens = start + num_tokens
        self.newest[sequence.seq_id] = start

    def begin_to_run(self, sequence: Sequence, piece: int) -> bool:
        start = self.manager.get_num_computed_tokens(sequence)
        assert start < sequence.num_tokens, "one token is left to run"
        num_tokens = min(piece, sequence.num_tokens - start)
        fits = self.manager.fits_without(sequence, start, num_tokens, [])
        started = self.manager.allocate_slots(sequence, start, num_tokens)
        assert started == fits or not self.running
        if started:
            self.run_first(sequence, start, num_tokens)
        return started

    def run_first(self, sequence: Sequence, start: int, num_tokens: int) -> None:
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)
        self.first.add(sequence.seq_id)
        self.run_step(sequence, start, num_tokens)

    # ---- rules

    @rule(tokens=st.lists(st.integers(1, 2), min_size=1, max_size=20), salt=st.sampled_from(SALTS),
          piece=st.integers(1, 24))
    def start(self, tokens: list[int], salt: str, piece: int) -> None:
        if not self.manager.can_ever_hold(len(tokens)):
            return
        sequence = make_sequence(tokens, salt)
        assert self.manager.get_num_computed_tokens(sequence) == self.brute_force(sequence)
        alone = not self.running
        if not self.begin_to_run(sequence, piece):
            assert not alone, "nobody may be locked out"

    @precondition(lambda self: len(self.queued) < 4)
    @rule(tokens=st.lists(st.integers(1, 2), min_size=1, max_size=20), salt=st.sampled_from(SALTS))
    def queue(self, tokens: list[int], salt: str) -> None:
        if self.manager.can_ever_hold(len(tokens)):
            self.queued.append(make_sequence(tokens, salt))

    @rule(num=st.integers(0, 4))
    def want(self, num: int) -> None:
        """The queue's first so many are looked at."""
        matches = [self.manager.match(sequence) for sequence in self.queued[:num]]
        self.manager.pool.wanted = {b for m in matches for b in (*m.blocks, m.partial) if b is not None}

    @precondition(lambda self: self.queued)
    @rule(data=st.data(), piece=st.integers(1, 24), num_victims=st.integers(0, 3))
    def displace(self, data: st.DataObject, piece: int, num_victims: int) -> None:
        """As `Queues.admit`: where it fits once others have left, they leave, and it starts where it was to start."""
        sequence = data.draw(st.sampled_from(self.queued))
        victims = self.running[:num_victims]
        start = self.manager.get_num_computed_tokens(sequence)
        num_tokens = min(piece, sequence.num_tokens - start)
        if victims and self.manager.fits_without(sequence, start, num_tokens, victims):
            for victim in victims:
                self.send_away(victim)
            assert self.manager.allocate_slots(sequence, start, num_tokens)
            self.run_first(sequence, start, num_tokens)
        elif victims or not self.begin_to_run(sequence, piece):
            return
        self.queued.remove(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """Steps are chosen ahead, and the newest one of a sequence fails: what it was to write is rubbish."""
        sequence = data.draw(st.sampled_from(self.running))
        start = self.newest.get(sequence.seq_id)
        if start is None or not self.manager.steps_ahead:
            return
        for position in range(start, sequence.num_computed_tokens):
            self.memory[self.slot(sequence, position)] = "rubbish", ()
        sequence.num_computed_tokens = start
        self.running.remove(sequence)
        sequence.status = SequenceStatus.FINISHED_ABORTED
        self.manager.free(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), piece=st.integers(1, 8), token=st.integers(1, 2))
    def go_on(self, data: st.DataObject, piece: int, token: int) -> None:
        """The next piece of a prompt, or the token that was sampled."""
        sequence = data.draw(st.sampled_from(self.running))
        if sequence.num_computed_tokens == sequence.num_tokens:
            sequence.append_token_id(token)
        if not self.manager.can_ever_hold(sequence.num_tokens):
            return
        start = sequence.num_computed_tokens
        num_tokens = min(piece, sequence.num_tokens - start)
        if self.manager.allocate_slots(sequence, start, num_tokens):
            self.first.discard(sequence.seq_id)
            self.run_step(sequence, start, num_tokens)
        else:
            assert len(self.running) > 1 or self.manager.pool.num_free < num_tokens

    @precondition(lambda self: any(s.num_computed_tokens == s.num_tokens for s in self.running))
    @rule(data=st.data(), token=st.integers(1, 2))
    def fork(self, data: st.DataObject, token: int) -> None:
        parent = data.draw(st.sampled_from([s for s in self.running if s.num_computed_tokens == s.num_tokens]))
        child = parent.fork(next_seq_id(), 1)
        assert self.manager.fork(parent, child)
        child.num_computed_tokens = parent.num_computed_tokens
        child.append_token_id(token)
        self.running.append(child)
        self.newest.pop(parent.seq_id, None)            # it has run: its token is known

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.send_away(data.draw(st.sampled_from(self.running)))
        self.manager.pool.trim()                        # as at the end of each choice of a step

    def send_away(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        sequence.status = self.manager.preempt(sequence)
        if sequence.status is SequenceStatus.WAITING:
            sequence.num_computed_tokens = 0
        self.away.append(sequence)

    @precondition(lambda self: self.away)
    @rule(data=st.data(), piece=st.integers(1, 24))
    def resume(self, data: st.DataObject, piece: int) -> None:
        sequence = data.draw(st.sampled_from(self.away))
        if sequence.num_tokens == sequence.num_computed_tokens:
            sequence.append_token_id(1)
        if self.manager.can_ever_hold(sequence.num_tokens) and self.begin_to_run(sequence, piece):
            self.away.remove(sequence)

    @precondition(lambda self: self.running or self.away)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running + self.away))
        was_running, num_known = sequence in self.running, sequence.num_computed_tokens // self.size
        (self.running if was_running else self.away).remove(sequence)
        sequence.status = SequenceStatus.FINISHED_STOPPED
        self.manager.free(sequence)
        if self.manager.steps_ahead:                    # the newest step does not count, nor what the first one brought
            num_known = min(num_known, self.newest.get(sequence.seq_id, 0) // self.size)
            num_known = 0 if sequence.seq_id in self.first else num_known
        if was_running and self.manager.pool.max_cached_blocks == self.manager.pool.num_blocks:
            again = make_sequence([*sequence.data.token_ids, 1], sequence.cache_salt)
            assert len(self.manager.match(again).blocks) >= num_known, "what it computed is found by the next"

    # ---- what always holds

    def brute_force(self, sequence: Sequence) -> int:
        """The longest prefix that the blocks in the index hold, by what stands in them."""
        held = [self.marks_of(block) for block in range(self.manager.pool.num_blocks) if block in self.manager.index]
        wanted = [mark(sequence, position) for position in range(sequence.num_tokens - 1)]
        best = 0
        while any(m == wanted[best:best + self.size] and len(m) == self.size for m in held):
            best += self.size
        rest = wanted[best:best + self.size]
        parts = [sum(1 for _ in takewhile_equal(m, rest)) for m in held]
        if self.kind == "hash" and len(rest) < self.size:
            whole = [mark(sequence, p) for p in range(best, min(best + self.size, sequence.num_tokens))]
            parts = [len(rest) for m in held if m == whole and len(whole) == self.size]
        elif self.kind == "hash":
            parts = []
        longest = max(parts, default=0)
        needs_all = self.manager.tables.num_blocks_of(sequence.num_tokens) >= self.manager.pool.num_blocks
        return best + (0 if needs_all else longest)

    def marks_of(self, block: int) -> list[Mark | None]:
        return [self.memory.get(block * self.size + i) for i in range(self.size)]

    @invariant()
    def everybody_finds_its_own(self) -> None:
        for sequence in getattr(self, "running", ()):
            for position in range(sequence.num_computed_tokens):
                pending = any(c.target <= self.slot(sequence, position) < c.target + c.num_slots
                              for c in self.manager.tables.copies)
                assert pending or self.memory[self.slot(sequence, position)] == mark(sequence, position)

    @invariant()
    def who_waits_is_told_what_a_fresh_search_finds(self) -> None:
        """The search goes on from what was found before."""
        for sequence in getattr(self, "queued", ()):
            found = self.manager.match(sequence)
            fresh = self.manager.index.match(sequence, sequence.num_tokens - 1)
            assert found.blocks == fresh.blocks
            if self.manager._may_copy(sequence):
                assert (found.partial, found.num_partial) == (fresh.partial, fresh.num_partial)
            assert list(found.serials) == [self.manager.index.serial(block) for block in found.blocks]

    @invariant()
    def holders_are_counted(self) -> None:
        if not hasattr(self, "manager"):
            return
        pool = self.manager.pool
        holders = Counter(block for s in self.running for block in self.manager.tables[s])
        holders.update(block for s in self.away for place, block in self.manager.places_of(s) if place == "device")
        assert all(pool.ref_count(block) == holders[block] for block in range(pool.num_blocks))
        assert pool.num_free + sum(count > 0 for count in holders.values()) == pool.num_blocks
        assert pool.num_cached <= pool.max_cached_blocks
        assert all(block in pool.index for block in (*pool._spared, *pool._cached)), "none is kept in vain"

    @invariant()
    def the_index_tells_the_truth(self) -> None:
        """What a block in the index holds is what it is found for: its parent's text goes on in it."""
        if hasattr(self, "manager"):
            for block in range(self.manager.pool.num_blocks):
                if block in self.manager.index and not any(
                        c.target // self.size == block for c in self.manager.tables.copies):
                    marks = self.marks_of(block)
                    assert None not in marks
                    assert all(m is not None and marks[-1] is not None and m[1] == marks[-1][1][:len(m[1])]
                               for m in marks)

    def teardown(self) -> None:
        for sequence in [*self.running, *self.away] if hasattr(self, "running") else []:
            self.manager.free(sequence)
        if hasattr(self, "manager"):
            assert self.manager.pool.num_free == self.manager.pool.num_blocks
            assert not self.manager._announced
            assert not self.manager._num_indexed
            assert self.manager.reset()
            assert len(self.manager.index) == 0


def takewhile_equal(a: list[Mark | None], b: list[Mark]) -> list[Mark]:
    shared = []
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared.append(y)
    return shared


PrefixMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPrefixMachine = PrefixMachine.TestCase
