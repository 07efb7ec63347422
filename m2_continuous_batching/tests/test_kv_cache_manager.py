"""Rows of the KV cache: none held twice, none lost, whatever the order of events (F2.2)."""
from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m2_continuous_batching.kv_cache_manager import RowKVCacheManager, SlotCopy

ROW_SIZE = 16


def make_sequence(num_computed: int = 0) -> Sequence:
    sequence = Sequence(next_seq_id(), SequenceData([1] * ROW_SIZE), SamplingParams(), seed=0)
    sequence.num_computed_tokens = num_computed
    return sequence


class RowMachine(RuleBasedStateMachine):
    """The manager against a plain dictionary of who holds which row."""

    @initialize(num_rows=st.integers(1, 5))
    def begin(self, num_rows: int) -> None:
        self.manager = RowKVCacheManager(num_rows, ROW_SIZE)
        self.num_rows = num_rows
        self.rows: dict[Sequence, int] = {}
        self.copies: list[SlotCopy] = []

    def lowest_free(self) -> int | None:
        return min(set(range(self.num_rows)) - set(self.rows.values()), default=None)

    @rule(num_tokens=st.integers(1, ROW_SIZE))
    def start(self, num_tokens: int) -> None:
        sequence, row = make_sequence(), self.lowest_free()
        assert self.manager.get_num_computed_tokens(sequence) == 0
        assert self.manager.allocate_slots(sequence, sequence.num_computed_tokens, num_tokens) == (row is not None)
        if row is not None:
            self.rows[sequence] = row
            sequence.num_computed_tokens = num_tokens

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """A sequence that has a row keeps it, also where no other row is free."""
        sequence = data.draw(st.sampled_from(list(self.rows)))
        if sequence.num_computed_tokens < ROW_SIZE:
            assert self.manager.allocate_slots(sequence, sequence.num_computed_tokens, 1)
            sequence.num_computed_tokens += 1

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from(list(self.rows)))
        child, row = make_sequence(), self.lowest_free()
        assert self.manager.fork(parent, child) == (row is not None)
        if row is not None:
            self.rows[child] = row
            child.num_computed_tokens = parent.num_computed_tokens
            self.copies.append(SlotCopy(self.rows[parent] * ROW_SIZE, row * ROW_SIZE, parent.num_computed_tokens))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(list(self.rows)))
        self.manager.free(sequence)
        del self.rows[sequence]

    @rule()
    def take_copies(self) -> None:
        """In order, each once, nothing of a fork that found no room."""
        assert self.manager.take_copies() == self.copies
        assert self.manager.take_copies() == []
        self.copies = []

    @invariant()
    def rows_are_where_they_should_be(self) -> None:
        if hasattr(self, "manager"):
            assert {s: self.manager.first_slot(s) for s in self.rows} == {
                s: row * ROW_SIZE for s, row in self.rows.items()}
            assert self.manager.usage == len(self.rows) / self.num_rows


TestRows = RowMachine.TestCase
TestRows.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_lowest_free_row_first() -> None:
    manager = RowKVCacheManager(4, ROW_SIZE)
    sequences = [make_sequence() for _ in range(4)]
    assert all(manager.allocate_slots(s, s.num_computed_tokens, 3) for s in sequences)
    assert [manager.first_slot(s) for s in sequences] == [0, 16, 32, 48]
    for i in (2, 0, 3):
        manager.free(sequences[i])
    again = [make_sequence() for _ in range(3)]
    assert all(manager.allocate_slots(s, s.num_computed_tokens, 3) for s in again)
    assert [manager.first_slot(s) for s in again] == [0, 32, 48]
    assert not manager.allocate_slots(make_sequence(), 0, 1)


def test_copies_of_a_row_that_changes_hands() -> None:
    """A parent may leave, and its row be forked into, before the copies are made: made in order, both are right."""
    manager = RowKVCacheManager(3, 4)
    a, b, child, other = make_sequence(2), make_sequence(3), make_sequence(), make_sequence()
    manager.allocate_slots(a, a.num_computed_tokens, 0)
    manager.allocate_slots(b, b.num_computed_tokens, 0)
    assert manager.fork(a, child)
    manager.free(a)
    assert manager.fork(b, other)
    slots = list("AAxxBBByzzzz")
    for copy in manager.take_copies():
        slots[copy.target:copy.target + copy.num_slots] = slots[copy.source:copy.source + copy.num_slots]
    assert "".join(slots) == "BBBxBBByAAzz"


def test_a_row_is_given_back_once() -> None:
    manager = RowKVCacheManager(2, ROW_SIZE)
    sequence = make_sequence()
    manager.allocate_slots(sequence, sequence.num_computed_tokens, 1)
    manager.free(sequence)
    manager.free(sequence)              # holds nothing any more, as a sequence that waits: nothing is given back twice
    assert manager.usage == 0
    others = [make_sequence(), make_sequence()]
    assert all(manager.allocate_slots(other, other.num_computed_tokens, 1) for other in others)
    assert {manager.first_slot(other) for other in others} == {0, ROW_SIZE}
    assert not manager.allocate_slots(make_sequence(), 0, 1)


def test_too_long_for_a_row() -> None:
    manager = RowKVCacheManager(2, ROW_SIZE)
    assert manager.can_ever_hold(ROW_SIZE)
    assert not manager.can_ever_hold(ROW_SIZE + 1)
    with pytest.raises(AssertionError):
        manager.allocate_slots(make_sequence(ROW_SIZE), ROW_SIZE, 1)
