"""The block allocator: growth and copies by hand, and no block lost or held twice under any use."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interview.coding.block_allocator import BlockAllocator, OutOfBlocksError


def test_a_sequence_grows_block_by_block() -> None:
    pool, table = BlockAllocator(3, 2), []
    assert [pool.append_token(table, i) for i in range(5)] == [(0, None), (1, None), (2, None), (3, None), (4, None)]
    assert table == [0, 1, 2]


def test_the_first_write_to_a_shared_block_copies_it() -> None:
    pool, table = BlockAllocator(4, 4), []
    for i in range(6):
        pool.append_token(table, i)
    other = pool.fork(table)
    assert pool.counts[:2] == [2, 2]
    assert pool.append_token(other, 6) == (2 * 4 + 2, (1, 2))
    assert (table, other) == ([0, 1], [0, 2])
    assert pool.counts == [2, 1, 1, 0]
    assert pool.append_token(table, 6) == (1 * 4 + 2, None)         # the last holder writes in place


def test_a_full_shared_block_is_not_copied() -> None:
    pool, table = BlockAllocator(2, 2), []
    for i in range(2):
        pool.append_token(table, i)
    other = pool.fork(table)
    assert pool.append_token(other, 2) == (2, None)
    assert other == [0, 1]


def test_an_empty_pool_changes_nothing() -> None:
    pool, table = BlockAllocator(1, 2), []
    pool.append_token(table, 0)
    other = pool.fork(table)
    with pytest.raises(OutOfBlocksError):
        pool.append_token(other, 1)                                 # a copy is needed
    assert (table, other, pool.counts) == ([0], [0], [2])
    pool.free(table)
    assert pool.append_token(other, 1) == (1, None)
    with pytest.raises(OutOfBlocksError):
        pool.append_token(other, 2)
    assert (other, pool.counts) == ([0], [1])


def test_free_returns_the_head_last_and_refuses_what_is_free() -> None:
    pool, table = BlockAllocator(3, 1), []
    for i in range(3):
        pool.append_token(table, i)
    held = list(table)
    pool.free(table)
    assert (table, pool.counts, pool.free_ids) == ([], [0, 0, 0], [2, 1, 0])
    with pytest.raises(ValueError, match="free already"):
        pool.free(held)
    assert pool.free_ids == [2, 1, 0]


@given(st.lists(st.tuples(st.sampled_from(["grow", "fork", "free"]), st.integers(0, 5)), max_size=60))
def test_blocks_are_conserved(steps: list[tuple[str, int]]) -> None:
    """And the text of every sequence is what was written to it, copies made where they are asked for."""
    pool, block_size = BlockAllocator(6, 2), 2
    memory: dict[int, int] = {}
    sequences: list[tuple[list[int], list[int]]] = [([], [])]       # table, and the tokens that were written
    for number, (action, which) in enumerate(steps):
        if not sequences:
            sequences.append(([], []))
        table, written = sequences[which % len(sequences)]
        if action == "grow":
            try:
                slot, copy = pool.append_token(table, len(written))
            except OutOfBlocksError:
                continue
            if copy:
                for offset in range(block_size):
                    memory[copy[1] * block_size + offset] = memory.get(copy[0] * block_size + offset, -1)
            memory[slot] = number
            written.append(number)
        elif action == "fork":
            sequences.append((pool.fork(table), list(written)))
        else:
            del sequences[which % len(sequences)]
            pool.free(table)
        held = [block for table, _ in sequences for block in table]
        assert all(pool.counts[block] == held.count(block) for block in range(6))
        assert sorted(pool.free_ids) == [block for block in range(6) if block not in held]
        for table, written in sequences:
            slots = [table[i // block_size] * block_size + i % block_size for i in range(len(written))]
            assert [memory[slot] for slot in slots] == written
