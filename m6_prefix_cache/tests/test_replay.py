"""F6.3, F6.6: traces are what they say; Belady's optimum is one; replicas share by the way that requests are routed."""
from __future__ import annotations

import random
from itertools import product

import pytest

from m6_prefix_cache.tools import lookup, routing
from m6_prefix_cache.tools.replay import BLOCK_SIZE, WAYS, hits
from m6_prefix_cache.tools.traces import TRACES, Visit, make_trace


@pytest.mark.parametrize("name", TRACES)
def test_traces_are_the_same_for_the_same_seed(name: str) -> None:
    assert make_trace(name, 20) == make_trace(name, 20)
    assert make_trace(name, 20) != make_trace(name, 20, seed=1)
    assert all(visit.prompt for visit in make_trace(name, 20))


def test_a_turn_brings_all_that_was_said_before_it() -> None:
    visits = make_trace("multi-turn", 60)
    turns = [(visit, visits[visit.after]) for visit in visits if visit.after is not None]
    assert len(turns) > 20
    for visit, earlier in turns:
        assert visit.prompt[:len(earlier.prompt) + len(earlier.answer)] == earlier.prompt + earlier.answer


def test_in_a_large_cache_all_ways_find_the_same() -> None:
    trace = make_trace("few-shot", 30)
    assert len({hits(trace, 5000, way) for way in WAYS if way != "longest-match"}) == 1


@pytest.mark.parametrize("name", TRACES)
def test_in_a_small_one_belady_finds_most(name: str) -> None:
    trace = make_trace(name, 80)
    lru, informed, _, belady = (hits(trace, 150, way) for way in WAYS)
    assert lru <= informed <= belady
    assert informed > lru or lru == belady


def test_belady_by_trying_all() -> None:
    """Three prompts of a block each in a cache of two, every choice of what goes tried."""
    rng = random.Random(3)
    texts = [tuple(rng.randrange(1000) for _ in range(BLOCK_SIZE)) for _ in range(3)]
    order = [0, 1, 2, 0, 1, 2, 2, 0]
    trace = [Visit((*texts[i], 1), ()) for i in order]
    best = 0
    for choices in product(range(2), repeat=len(order)):
        cached, found = list[int](), 0
        for number, choice in zip(order, choices, strict=True):
            if number in cached:
                found += 1
                continue
            if len(cached) == 2:
                del cached[choice]
            cached.append(number)
        best = max(best, found)
    assert hits(trace, 2, "belady") == best * BLOCK_SIZE


def test_routing_by_hand() -> None:
    """Two prompts in turn over two replicas: each in its place, or both in both."""
    rng = random.Random(4)
    a, b = (tuple(rng.randrange(1000) for _ in range(64)) for _ in range(2))
    trace = [Visit((*text, i), ()) for i, text in enumerate([a, a, b, b] * 4)]
    everywhere = routing.route(trace, "round-robin", 2, 100)
    assert everywhere.hit_share == pytest.approx(12 * 64 / (16 * 65))
    assert everywhere.imbalance == 1
    aware = routing.route(trace, "prefix-aware", 2, 100)
    assert aware.hit_share == pytest.approx(14 * 64 / (16 * 65))
    assert aware.imbalance == 1


def test_a_lookup_is_measured_for_every_size() -> None:
    entries = lookup.measure((100, 1000), (64, 256), repeats=2)
    assert [(e["index"], e["blocks"]) for e in entries] == [("radix", 100), ("radix", 1000), ("hash", 100),
                                                           ("hash", 1000)]
    assert all(e["lookup_us_64"] > 0 and e["bytes_per_block"] > 100 for e in entries)
