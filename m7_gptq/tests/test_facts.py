"""The computed facts, against sums done by hand; names of results that the documents quote."""
from __future__ import annotations

from typing import Any

import pytest

from m7_gptq.tools.facts import FACTS, spread


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return {name: fact.value for name, fact in FACTS.compute().items()}


def test_the_spread_of_the_rounds() -> None:
    def contender(name: str, *rounds: tuple[float, float]) -> dict[str, Any]:
        return {"name": name, "ratios": [speed / 10 for speed, _ in rounds], "rounds": [
            {"output_throughput": speed, "tpot_ms": {"median": tpot}} for speed, tpot in rounds]}

    found = spread({"comparisons": [{"contenders": [contender("m7-a16", (20, 4), (30, 5), (25, 8))]},
                                    {"contenders": [contender("m7", (5, 10), (4, 8))]}]})
    values = {name: fact.value for name, fact in found.items()}
    assert values["bench.ragged.m7_a16.tokens_per_s.low"] == 20 and values["bench.ragged.m7_a16.ratio.high"] == 3
    assert values["bench.single.m7.ratio.low"] == 0.4 and values["bench.single.m7.tokens_per_s.high"] == 5
    assert values["bench.decode.m7.tokens_per_s.low"] == 100 and values["bench.decode.m7.tokens_per_s.high"] == 125
    assert len(values) == 4 + 6 and spread({}) == {}


def test_what_is_shown_lies_within_its_spread() -> None:
    """The tables' medians, as they are stored."""
    facts = {name: fact.value for name, fact in FACTS.all().items()}
    bases = [name.removesuffix(".low") for name in facts if name.endswith(".low")]
    assert len(bases) > 20
    for name in bases:
        assert facts[f"{name}.low"] <= facts[name] <= facts[f"{name}.high"], name


def test_formats_by_hand(facts: dict[str, float]) -> None:
    """A scale of 16 bits for each group, and a zero point or a minimum."""
    assert facts["bits.4.64"] == 4 + 20 / 64
    assert facts["bits.3.64"] == 3 + 19 / 64
    assert facts["bits.q4_1"] == 4 + 32 / 32
    assert facts["bits.q8_0"] == 8 + 16 / 32


def test_packed_bytes_by_hand(facts: dict[str, float]) -> None:
    """SmolLM2: 106.2 M weights in the layers, 28.3 M in the output matrix, 61 norms of 576."""
    layer = 576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536
    head, norms = 49152 * 576, 61 * 576 * 2
    assert facts["pack.gguf.head_bytes"] == head + 2 * head // 32
    assert facts["pack.gguf.bytes"] == 30 * (layer // 2 + 4 * layer // 32) + facts["pack.gguf.head_bytes"] + norms
    # Nine groups of a row: 288 zero points in a panel of 32 outputs, filled up to whole cache lines of 64.
    filled = 32 * (30 * (960 + 576 + 3072) // 32 + 49152 // 32)
    grids = 3 * (30 * layer + head) // 64
    assert facts["pack.smollm2.bytes"] == (30 * layer + head) // 2 + grids + filled + norms
