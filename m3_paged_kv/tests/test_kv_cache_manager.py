"""F3.1, F3.5, F3.6, F3.10: whatever happens to sequences, each finds its own tokens where its block table says.

The manager keeps books; here is a memory to go with them. Every slot holds the mark of the token that was written
to it last. Copies are made as the engine makes them, before anything is written. If a block were shared and written,
given away too early, or brought back to the wrong place, some sequence would find a stranger's mark.
"""
from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from m0_basics.request import Sequence, SequenceData, SequenceStatus, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m2_continuous_batching.kv_cache_manager import SlotCopy
from m3_paged_kv.holdings import Holdings
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager, paged_manager


def make_sequence(num_tokens: int = 1) -> Sequence:
    return Sequence(next_seq_id(), SequenceData([1] * num_tokens), SamplingParams(), seed=0)


def num_dropped(manager: PagedKVCacheManager, sequence: Sequence) -> int:
    """Tokens that a sequence has forgotten: by so much its later tokens have moved to the front."""
    return -manager.tables.place(sequence, 0)


class PagedMachine(RuleBasedStateMachine):
    """Start, grow, fork, forget, preempt, resume, free, in any order."""

    @initialize(num_blocks=st.integers(2, 10), block_size=st.integers(1, 4), num_host_blocks=st.integers(0, 8),
                watermark=st.sampled_from([0.0, 0.01, 0.2, 0.5]))
    def begin(self, num_blocks: int, block_size: int, num_host_blocks: int, watermark: float) -> None:
        self.manager = paged_manager(num_blocks, block_size, num_host_blocks, watermark)
        self.memory: dict[int, int] = {}
        self.marks = itertools.count()
        self.content: dict[Sequence, list[int]] = {}        # on the device: the mark of each token that is kept
        self.swapped: dict[Sequence, list[int]] = {}

    def slots(self, sequence: Sequence, count: int) -> list[int]:
        table, size = self.manager.tables[sequence], self.manager.tables.block_size
        return [table[i // size] * size + i % size for i in range(count)]

    def copy_and_write(self, sequence: Sequence, num_tokens: int) -> None:
        """A step: the copies, then the new tokens of `sequence`."""
        for copy in self.manager.take_copies():
            values = [self.memory.get(copy.source + i, -1) for i in range(copy.num_slots)]
            self.memory.update(zip(range(copy.target, copy.target + copy.num_slots), values, strict=True))
        content = self.content[sequence]
        for slot in self.slots(sequence, len(content) + num_tokens)[len(content):]:
            content.append(next(self.marks))
            self.memory[slot] = content[-1]
        sequence.num_computed_tokens = len(content) + num_dropped(self.manager, sequence)
        # One more than is computed, as the prompt has one.
        sequence.data.output_token_ids[:] = [1] * sequence.num_computed_tokens

    @rule(num_tokens=st.integers(1, 12))
    def start(self, num_tokens: int) -> None:
        sequence = make_sequence()
        free, nobody_runs = self.manager.pool.num_free, not self.content
        started = self.manager.allocate_slots(sequence, 0, num_tokens)
        needed = self.manager.tables.num_blocks_of(num_tokens)
        if nobody_runs:
            assert started == (needed <= self.manager.pool.num_blocks), "nobody may be locked out"
            self.forget_dropped(started)
        else:
            assert started == (needed + self.manager.num_reserved <= free), "newcomers leave the watermark free"
        if started:
            sequence.status = SequenceStatus.RUNNING
            self.content[sequence] = []
            self.copy_and_write(sequence, num_tokens)

    @precondition(lambda self: self.content)
    @rule(data=st.data(), num_tokens=st.integers(1, 3))
    def grow(self, data: st.DataObject, num_tokens: int) -> None:
        sequence = data.draw(st.sampled_from(list(self.content)))
        before = self.manager.pool.num_free
        alone = len(self.content) == 1
        started = self.manager.allocate_slots(sequence, sequence.num_computed_tokens, num_tokens)
        if started:
            self.copy_and_write(sequence, num_tokens)
        else:
            assert self.manager.pool.num_free == before, "a refusal changes nothing"
            assert not (alone and self.manager.can_ever_hold(len(self.content[sequence]) + num_tokens)), "locked out"
        if alone:
            self.forget_dropped(started)

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(list(self.content)))
        before = self.manager.pool.num_used
        child = parent.fork(next_seq_id(), 1)
        assert self.manager.fork(parent, child)
        assert self.manager.pool.num_used == before, "a fork costs nothing"
        self.content[child] = self.content[parent].copy()

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        """F3.10: full blocks leave from anywhere; the tokens after them are found that much further to the front."""
        sequence = data.draw(st.sampled_from(list(self.content)))
        content, size = self.content[sequence], self.manager.tables.block_size
        full = range((len(content) - 1) // size)
        chosen = data.draw(st.sets(st.sampled_from(full))) if full else set()
        table = self.manager.tables[sequence]
        freed = sum(self.manager.pool.ref_count(table[i]) == 1 for i in chosen)
        before, evicted = self.manager.pool.num_free, num_dropped(self.manager, sequence)
        self.manager.tables.drop(sequence, chosen)
        assert self.manager.pool.num_free == before + freed, "blocks of others stay"
        assert num_dropped(self.manager, sequence) == evicted + len(chosen) * size
        self.content[sequence] = [mark for i, mark in enumerate(content) if i // size not in chosen]
        assert self.manager.tables.place(sequence, sequence.num_computed_tokens) == len(self.content[sequence])

    @precondition(lambda self: self.content)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.send_away(data.draw(st.sampled_from(list(self.content))))

    def send_away(self, sequence: Sequence) -> None:
        shared = [b for b in self.manager.tables[sequence] if self.manager.pool.ref_count(b) > 1]
        status = self.manager.preempt(sequence)
        content = self.content.pop(sequence)
        assert all(self.manager.pool.ref_count(b) for b in shared), "shared blocks stay"
        if status is SequenceStatus.SWAPPED:
            self.swapped[sequence] = content
        else:
            assert status is SequenceStatus.WAITING
            assert self.manager.get_num_computed_tokens(sequence) == num_dropped(self.manager, sequence) == 0

    @precondition(lambda self: self.swapped)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(list(self.swapped)))
        assert (self.manager.get_num_computed_tokens(sequence)
                == len(self.swapped[sequence]) + num_dropped(self.manager, sequence))
        nobody_runs = not self.content
        started = self.manager.allocate_slots(sequence, self.manager.get_num_computed_tokens(sequence), 1)
        if started:
            self.content[sequence] = self.swapped.pop(sequence)
            sequence.num_computed_tokens = len(self.content[sequence]) + num_dropped(self.manager, sequence)
            self.copy_and_write(sequence, 1)
        if nobody_runs:
            assert started or not self.manager.can_ever_hold(len(self.swapped[sequence]) + 1)
            self.forget_dropped(started)

    @precondition(lambda self: self.content)
    @rule(data=st.data(), num_tokens=st.integers(1, 12))
    def displace(self, data: st.DataObject, num_tokens: int) -> None:
        """F3.8: what is said of a newcomer before anybody leaves is what is found afterwards."""
        newcomer = data.draw(st.sampled_from([make_sequence(), *self.swapped]))
        content = self.swapped.get(newcomer, [])
        if content:
            num_tokens = 1
        victims = data.draw(st.lists(st.sampled_from(list(self.content)), unique=True))
        if not self.manager.can_ever_hold(len(content) + num_tokens):
            return
        before = self.manager.pool.num_free, self.manager.swapped.host_pool.num_free
        start = self.manager.get_num_computed_tokens(newcomer)
        expected = self.manager.fits_without(newcomer, start, num_tokens, victims)
        assert (self.manager.pool.num_free, self.manager.swapped.host_pool.num_free) == before, "to ask changes nothing"
        for victim in victims:
            self.send_away(victim)
        assert self.manager.allocate_slots(newcomer, start, num_tokens) == expected
        if expected:
            newcomer.status = SequenceStatus.RUNNING
            self.swapped.pop(newcomer, None)
            self.content[newcomer] = content
            newcomer.num_computed_tokens = len(content) + num_dropped(self.manager, newcomer)
            self.copy_and_write(newcomer, num_tokens)
        self.forget_dropped(expected)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        everyone = [*self.content, *self.swapped]
        if everyone:
            sequence = data.draw(st.sampled_from(everyone))
            self.manager.free(sequence)
            self.manager.free(sequence)                     # it holds nothing any more: nothing happens
            self.content.pop(sequence, None)
            self.swapped.pop(sequence, None)

    def forget_dropped(self, somebody_came: bool) -> None:
        """Sequences in host memory whose pinned blocks were needed: they will be recomputed."""
        left = {s: c for s, c in self.swapped.items() if self.manager.get_num_computed_tokens(s)}
        assert somebody_came or left == self.swapped, "dropped in vain"
        self.swapped = left

    @invariant()
    def everybody_finds_their_own_tokens(self) -> None:
        if hasattr(self, "manager"):
            pending = self.manager.tables.copies
            for sequence, content in self.content.items():
                if not pending:
                    assert [self.memory[slot] for slot in self.slots(sequence, len(content))] == content

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "manager"):
            held = Counter(b for s in self.content for b in self.manager.tables[s])
            kept = [place for holdings in self.manager.swapped._holdings.values() for place in holdings.blocks]
            held.update(block for where, block in kept if where == "device")
            host = Counter(block for where, block in kept if where == "host")
            pool, host_pool = self.manager.pool, self.manager.swapped.host_pool
            assert all(pool.ref_count(b) == held[b] for b in range(pool.num_blocks))
            assert all(host_pool.ref_count(b) == host[b] for b in range(host_pool.num_blocks))
            assert pool.num_free + len(held) == pool.num_blocks
            assert self.manager.usage == pytest.approx(len(held) / pool.num_blocks)
            assert len(self.manager.swapped) == len(self.swapped)

    @invariant()
    def waste_is_below_a_block_each(self) -> None:
        """F3.4: a sequence's table covers its tokens and less than one block more."""
        if hasattr(self, "manager"):
            for sequence, content in self.content.items():
                spare = len(self.manager.tables[sequence]) * self.manager.tables.block_size - len(content)
                assert 0 <= spare < self.manager.tables.block_size


TestPaged = PagedMachine.TestCase
TestPaged.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def started(manager: PagedKVCacheManager, num_tokens: int) -> Sequence:
    sequence = make_sequence()
    assert manager.allocate_slots(sequence, sequence.num_computed_tokens, num_tokens)
    sequence.num_computed_tokens = num_tokens
    sequence.status = SequenceStatus.RUNNING
    return sequence


def test_copy_on_write_by_hand() -> None:
    """F3.5: 6 tokens in blocks of 4: the full block stays shared, the half one is copied by the first to write."""
    manager = paged_manager(8, 4)
    parent = started(manager, 6)
    child = parent.fork(next_seq_id(), 1)
    manager.fork(parent, child)
    assert manager.tables[child] == manager.tables[parent] == [0, 1]
    assert manager.allocate_slots(parent, parent.num_computed_tokens, 1)
    assert manager.take_copies() == [SlotCopy(4, 8, 2)], "the two tokens that block 1 holds"
    assert (manager.tables[parent], manager.tables[child]) == ([0, 2], [0, 1])
    assert manager.allocate_slots(child, child.num_computed_tokens, 1)
    assert manager.take_copies() == [], "alone with its block by now"
    assert manager.pool.num_used == 3


def test_no_copy_at_a_block_boundary() -> None:
    manager = paged_manager(8, 4)
    parent = started(manager, 8)
    child = parent.fork(next_seq_id(), 1)
    manager.fork(parent, child)
    assert manager.allocate_slots(parent, parent.num_computed_tokens, 1)
    assert manager.allocate_slots(child, child.num_computed_tokens, 1)
    assert manager.take_copies() == []
    assert (manager.tables[parent], manager.tables[child]) == ([0, 1, 2], [0, 1, 3])


@pytest.mark.parametrize(("prompt", "output", "n", "block_size"), [(512, 128, 8, 16), (500, 128, 8, 16), (7, 9, 3, 4)])
def test_blocks_held_are_shared_plus_own(prompt: int, output: int, n: int, block_size: int) -> None:
    """F3.5: full blocks of the prompt once, and for each output the blocks from the prompt's last, half one on."""
    manager = paged_manager(4096, block_size)
    parent = started(manager, prompt)
    family = [parent, *(parent.fork(next_seq_id(), i) for i in range(1, n))]
    for child in family[1:]:
        manager.fork(parent, child)
    for _ in range(output - 1):                             # the last token is returned and never stored
        for sequence in family:
            assert manager.allocate_slots(sequence, sequence.num_computed_tokens, 1)
            sequence.num_computed_tokens += 1
    shared = prompt // block_size
    own = -(-(prompt + output - 1) // block_size) - shared
    assert manager.pool.num_used == shared + n * own


def test_swapped_from_the_tail_to_the_head() -> None:
    """F3.6: the shared head stays on the device; the private tail moves, last block first, and comes back in order."""
    manager = paged_manager(8, 4, num_host_blocks=4)
    parent = started(manager, 8)
    child = parent.fork(next_seq_id(), 1)
    manager.fork(parent, child)
    assert manager.allocate_slots(child, child.num_computed_tokens, 7)                 # blocks 2 and 3
    child.num_computed_tokens = 15
    child.data.output_token_ids[:] = [1] * 15
    assert manager.preempt(child) is SequenceStatus.SWAPPED
    host = 8 * 4                                            # the host's slots follow the device's
    assert manager.take_copies() == [SlotCopy(12, host, 4), SlotCopy(8, host + 4, 4)]
    assert (manager.pool.num_used, manager.swapped.host_pool.num_used) == (2, 2)
    assert manager.get_num_computed_tokens(child) == 15
    other = started(manager, 1)                             # takes the block that was freed last
    assert manager.tables[other] == [2]
    assert manager.allocate_slots(child, child.num_computed_tokens, 1)
    assert manager.take_copies() == [SlotCopy(host + 4, 12, 4), SlotCopy(host, 16, 4)]
    assert manager.tables[child] == [0, 1, 3, 4]
    assert manager.swapped.host_pool.num_used == 0


def test_no_room_in_host_memory_means_recompute() -> None:
    manager = paged_manager(8, 4, num_host_blocks=1)
    sequence = started(manager, 8)
    assert manager.preempt(sequence) is SequenceStatus.WAITING
    assert (manager.usage, manager.swapped.host_pool.num_used, manager.take_copies()) == (0.0, 0, [])


@pytest.mark.parametrize("is_running", [True, False])
def test_nobody_is_dropped_in_vain(is_running: bool) -> None:
    """F3.6, F3.8: what the empty pool could not hold either is refused, and whoever is swapped keeps its cache."""
    manager = paged_manager(4, 4, num_host_blocks=4)
    parent = started(manager, 8)
    child = parent.fork(next_seq_id(), 1)
    manager.fork(parent, child)
    for sequence in (parent, child):
        assert manager.preempt(sequence) is SequenceStatus.SWAPPED
    newcomer = started(manager, 4) if is_running else make_sequence()
    free = manager.pool.num_free
    start = newcomer.num_computed_tokens
    assert not manager.allocate_slots(newcomer, start, 17 - start)
    assert (manager.pool.num_free, len(manager.swapped)) == (free, 2)
    assert manager.allocate_slots(newcomer, start, 16 - start), "this is what they are dropped for"
    assert len(manager.swapped) == 0


def test_newcomers_leave_the_watermark_free() -> None:
    manager = paged_manager(10, 4, watermark=0.2)
    started(manager, 4)
    assert not manager.allocate_slots(make_sequence(), 0, 32)
    assert manager.allocate_slots(make_sequence(), 0, 28)


def test_what_victims_would_free_depends_on_host_memory() -> None:
    """F3.8: host memory takes the first victim's block. The other two are recomputed, so what they share comes free."""
    manager = paged_manager(6, 4, num_host_blocks=1)
    alone, parent = started(manager, 4), started(manager, 4)
    child = parent.fork(next_seq_id(), 1)
    manager.fork(parent, child)
    for sequence in (parent, child):
        assert manager.allocate_slots(sequence, sequence.num_computed_tokens, 4)
        sequence.num_computed_tokens = 8
    started(manager, 4)                                     # five blocks are held, one is free
    newcomer = make_sequence()
    assert [manager.fits_without(newcomer, 0, 4 * n, [alone, parent, child]) for n in (5, 6)] == [True, False]
    assert [manager.fits_without(newcomer, 0, 4 * n, [parent, child]) for n in (3, 4)] == [True, False]


def test_blocks_that_somebody_else_brings() -> None:
    """A sequence starts with blocks of others, of the device and of the host; one is on the device again meanwhile."""
    manager = paged_manager(num_blocks=8, block_size=2, num_host_blocks=4, watermark=0)
    sequence, pool, host_pool = make_sequence(7), manager.pool, manager.swapped.host_pool
    shared, brought = [pool.allocate() for _ in range(2)], [host_pool.allocate() for _ in range(2)]
    pool.share(shared[0])
    held = [("device", shared[0]), ("host", brought[0]), ("host", brought[1])]
    manager.swapped.hold(sequence, Holdings(6, held))
    manager.swapped.move_back(sequence, 1, shared[1])
    assert host_pool.num_used == 1
    assert manager.get_num_computed_tokens(sequence) == 6
    assert manager.allocate_slots(sequence, 6, 1)
    assert manager.tables[sequence][:2] == shared
    assert [copy.source // 2 - 8 for copy in manager.take_copies()] == [brought[1]]
    assert host_pool.num_used == 0
    other = pool.allocate()
    manager.tables.replace(sequence, 2, other)
    assert manager.tables[sequence][2] == other
    manager.free(sequence)
    pool.release(shared[0])
    assert pool.num_used == 0
