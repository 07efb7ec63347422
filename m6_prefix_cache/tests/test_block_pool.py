"""F6.3: held, cached, free: every block is in one of the three, and the right one is evicted."""
from __future__ import annotations

import random

import pytest

from m6_prefix_cache.block_hash import BlockHasher, HashIndex
from m6_prefix_cache.block_pool import CachedBlockPool
from m6_prefix_cache.tests.test_indexes import make_sequence


def make(num_blocks: int, num_known: int, max_cached: int | None = None) -> CachedBlockPool:
    """A pool of which the first `num_known` blocks are held once and in the index, each the beginning of a text."""
    index = HashIndex(BlockHasher(1, "model"))
    pool = CachedBlockPool(num_blocks, index, max_cached)
    for number in range(num_known):
        block = pool.allocate()
        assert block == number
        assert index.insert(make_sequence([number]), 0, None, block) == block
    return pool


def test_what_may_be_found_is_kept_and_what_may_not_is_free() -> None:
    pool = make(3, 2)
    unknown = pool.allocate()
    for block in (0, 1, unknown):
        pool.release(block)
    assert (pool.num_free, pool.num_cached) == (3, 2)
    assert [pool.allocate() for _ in range(3)] == [unknown, 0, 1], "what is free first, then the oldest"
    assert (pool.num_free, pool.num_cached, pool.num_evicted) == (0, 0, 2)
    assert len(pool.index) == 0


def test_a_block_with_two_holders_is_released_twice() -> None:
    pool = make(2, 1)
    pool.share(0)
    pool.release(0)
    assert (pool.ref_count(0), pool.num_cached) == (1, 0)
    pool.release(0)
    assert (pool.ref_count(0), pool.num_cached) == (0, 1)
    with pytest.raises(ValueError, match="cannot be freed twice"):
        pool.release(0)


def test_a_cached_block_is_revived_and_is_the_newest_then() -> None:
    pool = make(3, 3)
    for block in range(3):
        pool.release(block)
    pool.share(0)
    assert (pool.ref_count(0), pool.num_free) == (1, 2)
    pool.release(0)
    assert [pool.allocate() for _ in range(3)] == [1, 2, 0]
    with pytest.raises(ValueError, match="cannot be shared"):
        make(1, 0).share(0)


def test_wanted_blocks_go_last_in_their_order() -> None:
    pool = make(5, 5)
    for block in range(5):
        pool.release(block)
    pool.wanted = {0, 2}
    assert [pool.allocate() for _ in range(5)] == [1, 3, 4, 0, 2]


def test_who_was_spared_is_the_oldest_again_when_nobody_wants_it() -> None:
    pool = make(5, 5)
    for block in range(5):
        pool.release(block)
    pool.wanted = {0, 1}
    assert pool.allocate() == 2
    pool.wanted = set()
    assert [pool.allocate() for _ in range(4)] == [0, 1, 3, 4]


def test_who_was_evicted_is_not_wanted_any_more() -> None:
    """What the block holds next is not what a request was waiting for: it is not spared for it."""
    pool = make(2, 2)
    for block in range(2):
        pool.release(block)
    pool.wanted = {0, 1}
    assert pool.allocate() == 0
    assert pool.index.insert(make_sequence([7]), 0, None, 0) == 0
    pool.release(0)
    assert [pool.allocate() for _ in range(2)] == [0, 1]


def test_the_cap_is_kept_when_it_is_asked_for() -> None:
    pool = make(4, 4, max_cached=2)
    for block in range(4):
        pool.release(block)
    assert pool.num_cached == 4, "not while a step is chosen"
    pool.trim()
    assert (pool.num_cached, pool.num_free, 0 in pool.index, 3 in pool.index) == (2, 4, False, True)


def test_clearing_leaves_nothing_to_find() -> None:
    pool = make(4, 3)
    pool.release(1)
    pool.release(2)
    pool.wanted = {1}
    pool.clear()
    assert (len(pool.index), pool.num_cached, pool.num_free, pool.ref_count(0)) == (0, 0, 3, 1)
    pool.release(0)
    assert pool.num_free == 4


def test_every_block_is_in_one_state() -> None:
    """A thousand operations at random against plain lists."""
    dice, pool = random.Random(5), make(6, 0)
    held, next_text = list[int](), 0
    for _ in range(1000):
        if pool.num_free and dice.random() < 0.5:
            block = pool.allocate()
            assert block not in held
            held.append(block)
            if dice.random() < 0.7:
                next_text += 1
                pool.index.insert(make_sequence([next_text]), 0, None, block)
        elif held:
            block = dice.choice(held)
            if dice.random() < 0.3:
                pool.share(block)
                held.append(block)
            else:
                held.remove(block)
                pool.release(block)
        if dice.random() < 0.1:
            pool.wanted = {b for b in range(6) if dice.random() < 0.4}
        assert all(pool.ref_count(block) == held.count(block) for block in range(6))
        assert pool.num_free == 6 - len(set(held))
        assert len(pool.index) <= 6
