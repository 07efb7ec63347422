"""The computed facts, against sums done by hand."""
from __future__ import annotations

import pytest

from m3_paged_kv.facts import FACTS


def test_by_hand() -> None:
    """F3.4, F3.5: 640 of 4,096 slots; blocks of 16 x 23,040 B; 32 shared blocks, 8 own ones for each of 8 outputs."""
    facts = {name: fact.value for name, fact in FACTS.all().items()}
    assert facts["rows.example"] == pytest.approx(0.15625)
    assert facts["blocks.example"] == 1.0
    assert facts["block.bytes"] == 16 * 23_040
    assert facts["block.mean_waste"] == 7.5
    assert facts["block.waste_of_500"] == pytest.approx(0.015)
    assert (facts["sharing.held"], facts["sharing.copied"]) == (32 + 8 * 8, 8 * 40)
    assert facts["sharing.saved"] == pytest.approx(0.7)
    assert facts["blocks.ragged.1"] == 1.0
    sizes = [facts[f"blocks.ragged.{size}"] for size in (1, 4, 8, 16, 32, 128)]
    assert sizes == sorted(sizes, reverse=True)
