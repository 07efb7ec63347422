"""The computed facts, against sums done by hand; names of results that the documents quote."""
from __future__ import annotations

from typing import Any

import pytest

from m7_gptq.tools.facts import FACTS


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return {name: fact.value for name, fact in FACTS.compute().items()}


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
    orders = 4 * (30 * (3 * 576 + 1536) + 576)
    # Nine groups of a row: 288 zero points in a panel of 32 outputs, filled up to whole cache lines of 64.
    filled = 32 * (30 * (960 + 576 + 3072) // 32 + 49152 // 32)
    grids = 3 * (30 * layer + head) // 64
    assert facts["pack.smollm2.bytes"] == (30 * layer + head) // 2 + grids + filled + norms + orders
