"""F3.1: no block is lost or held twice, and a double free raises."""
from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from m3_paged_kv.block_pool import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """The pool against a plain count of holders."""

    @initialize(num_blocks=st.integers(1, 8))
    def begin(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.holders: Counter[int] = Counter()

    @precondition(lambda self: self.pool.num_free)
    @rule()
    def allocate(self) -> None:
        block = self.pool.allocate()
        assert 0 <= block < self.pool.num_blocks
        assert self.holders[block] == 0, "handed out twice"
        self.holders[block] = 1

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(0, self.pool.num_blocks - 1))
        if self.holders[block]:
            self.pool.share(block)
            self.holders[block] += 1
        else:
            with pytest.raises(ValueError, match=f"block {block} is free"):
                self.pool.share(block)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(0, self.pool.num_blocks - 1))
        if self.holders[block]:
            self.pool.release(block)
            self.holders[block] -= 1
        else:
            with pytest.raises(ValueError, match=f"block {block} is free already"):
                self.pool.release(block)

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "pool"):
            held = +self.holders
            assert self.pool.num_used == len(held)
            assert self.pool.num_free + self.pool.num_used == self.pool.num_blocks
            assert all(self.pool.ref_count(b) == self.holders[b] for b in range(self.pool.num_blocks))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_lowest_block_first_then_the_one_freed_last() -> None:
    pool = BlockPool(4)
    assert [pool.allocate() for _ in range(4)] == [0, 1, 2, 3]
    pool.release(1)
    pool.release(3)
    assert [pool.allocate(), pool.allocate()] == [3, 1]
