"""The computed numbers, against sums by hand and other ways to count."""
from __future__ import annotations

import random

import pytest

from interview.tools import facts
from interview.tools.facts import FACTS


@pytest.fixture(scope="module")
def values() -> dict[str, float]:
    return {name: fact.value for name, fact in FACTS.all().items()}     # type: ignore[misc]


def test_seventy_billion_by_hand(values: dict[str, float]) -> None:
    layer = 8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672 + 2 * 8192
    params = 2 * 128256 * 8192 + 80 * layer + 8192
    assert values["llama70.params"] == params
    assert values["llama70.kv_token"] == 2 * 80 * 8 * 128 * 2
    room = 4 * 72e9 - 2 * params
    assert values["llama70.4.fit"] == room // (2048 * 327_680)
    read = 2 * (params - 128256 * 8192) + 218 * (2048 + 1) * 327_680      # the embedding's rows are looked up
    assert values["llama70.4.bfit.ms"] == pytest.approx(read / (4 * 3.35e12) * 1e3, rel=0.001)
    assert values["llama70.4.dollars_per_million"] == pytest.approx(
        8 / 3600 / (218 / (values["llama70.4.bfit.ms"] / 1e3) / 2) * 1e6)


def test_four_bits_by_hand() -> None:
    linear = 30 * (576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536)
    rest = 49152 * 576 + 30 * 2 * 576 + 576
    assert facts._four_bits(facts.SMALL, 64) == pytest.approx(linear * 4.3125 / 8 + rest * 2)


def test_what_travels(values: dict[str, float]) -> None:
    assert values["wire.tp.token"] == 160 * 1.5 * 16384
    assert values["wire.pp.token"] == 3 * 16384
    assert values["wire.ratio"] == values["wire.tp.token"] / values["wire.pp.token"] == 80
    assert values["wire.tp.b64.net100.ms"] == pytest.approx(160 * (0.03 + 1.5 * 64 * 16384 / 12.5e9 * 1e3))


def test_bubbles_by_drawing_the_pipeline(values: dict[str, float]) -> None:
    for batches in (1, 4, 16):
        steps = batches + 3
        busy = sum(0 <= step - stage < batches for step in range(steps) for stage in range(4))
        assert values[f"bubble.4.{batches}"] == pytest.approx(1 - busy / (4 * steps))


def test_touched_experts_by_drawing_them(values: dict[str, float]) -> None:
    rng = random.Random(0)
    for batch in (8, 64):
        seen = [len({e for _ in range(batch) for e in rng.sample(range(128), 8)}) for _ in range(300)]
        assert values[f"moe.qwen3_30b_a3b.touched.{batch}"] == pytest.approx(sum(seen) / 300, rel=0.02)


def test_the_fleet_by_hand(values: dict[str, float]) -> None:
    assert values["fleet.peak"] == pytest.approx(3 * 8_000_000 / 86_400)
    assert values["fleet.running"] == pytest.approx(values["fleet.peak"] * 300 * 0.025)
    step = (2 * (8_030_261_248 - 128256 * 4096) + 128 * 1351 * 131_072) / 3.35e12 / 0.5
    assert values["fleet.step.ms"] == pytest.approx(1e3 * step, rel=0.001)
    assert values["fleet.dollars_per_day"] == 35 * 2 * 24        # whole devices are paid for
    assert values["fleet.devices"] == pytest.approx(
        values["fleet.peak"] * (values["fleet.prefill.ms"] + 300 * 1e3 * step / 128) / 1e3 / 0.7, rel=0.001)


def test_adapters_and_corrections_by_hand(values: dict[str, float]) -> None:
    widths = (4096 + 4096) + 2 * (4096 + 1024) + (4096 + 4096) + 3 * (4096 + 14336)
    assert values["lora.bytes"] == 2 * 32 * 16 * widths
    assert values["static.utilisation"] == 0.47 and values["static.prealloc"] == 0.15625
    assert values["kv.smollm2.wrong"] == 3 * values["kv.smollm2"] and values["kv.qwen"] == values["kv.qwen.wrong"]
    assert values["saved.qwen.embedding"] == 151_936 * 1024


def test_facts_of_milestones_are_theirs(values: dict[str, float]) -> None:
    from m3_paged_kv.tools.facts import FACTS as PAGED
    assert values["m3:block.mean_waste"] == PAGED.compute()["block.mean_waste"].value == 7.5
    assert values["road.m3.ragged-64.over.m2"] > 1
