"""The computed facts, against sums done by hand."""
from __future__ import annotations

import pytest

from m6_prefix_cache.tools.facts import FACTS


def values() -> dict[str, int | float | str]:
    return {name: fact.value for name, fact in FACTS.compute().items()}


@pytest.fixture(scope="module")
def facts() -> dict[str, int | float | str]:
    return values()


def test_savings_by_hand(facts: dict[str, float]) -> None:
    """1,200 tokens: 106 M weights are multiplied for each token, the rest is attention, which the last tokens have most
    of: half of the tokens are less than half of the work that is saved."""
    assert facts["block.example.whole"] == 75
    assert facts["block.kv_bytes"] == 16 * 30 * 2 * 3 * 64 * 2
    assert 1.6 < facts["save.50"] < 2 < facts["save.80"] < 5 < 12 < facts["save.95"] < 20


def test_tiers_by_hand(facts: dict[str, float]) -> None:
    """131,072 B a token; 7 B weights in the layers, twice as many operations a token, at half of 989 TFLOP/s."""
    assert facts["kv.token_bytes"] == 131_072
    assert facts["tier.500.compute.ms"] == pytest.approx(500 * 2 * 7e9 / 494.7e12 * 1e3, rel=0.05)
    assert facts["tier.8000.nvme.ms"] == pytest.approx(8000 * 131_072 / 7e9 * 1e3)
    assert facts["tier.8000.break_even"] == pytest.approx(8000 * 131_072 / facts["tier.8000.compute.ms"] / 1e6)
    assert facts["tier.500.break_even"] > facts["tier.2000.break_even"] > facts["tier.32000.break_even"]
    assert facts["agent.kv_bytes"] == 20_000 * 131_072


def test_cascade_by_hand(facts: dict[str, float]) -> None:
    assert facts["cascade.plain_bytes"] == 64 * 2200 * 131_072
    assert facts["cascade.shared_bytes"] == (2000 + 64 * 200) * 131_072
    assert facts["cascade.gain"] == pytest.approx(facts["cascade.plain.ms"] / facts["cascade.shared.ms"])


def test_hybrid_by_hand(facts: dict[str, float]) -> None:
    """36 layers of 32 heads of 128 x 128 numbers; 12 layers of keys and values, 2 heads of 256."""
    assert facts["hybrid.state_bytes"] == 36 * 32 * 128 * 128 * 2
    assert facts["hybrid.token_bytes"] == 12 * 2 * 2 * 256 * 2
    assert facts["hybrid.state_in_tokens"] == 1536
    assert facts["hybrid.every_block"] == 96


def test_collisions_by_hand(facts: dict[str, float]) -> None:
    """The birthday bound: 1 % among 9,268 hashes of 32 bits, and 65,536 times as many of 64."""
    assert facts["collide.32.blocks"] == 9268
    assert facts["collide.64.blocks"] == pytest.approx(9268 * 65_536, rel=1e-4)
    assert facts["collide.64.million"] == pytest.approx(2.7e-8, rel=0.01)


def test_replicas(facts: dict[str, float]) -> None:
    """A sticky router finds more than one that asks each in turn, and loads them less evenly; the third is between."""
    assert facts["route.sticky.hits"] > facts["route.round_robin.hits"]
    assert facts["route.prefix_aware.hits"] > facts["route.round_robin.hits"]
    assert facts["route.sticky.imbalance"] > facts["route.prefix_aware.imbalance"]
    assert 1 <= facts["route.prefix_aware.imbalance"] < 1.4
