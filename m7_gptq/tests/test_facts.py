"""The computed facts, against sums done by hand; names of results that the documents quote."""
from __future__ import annotations

from typing import Any

import pytest

from m7_gptq.tools import facts as facts_module
from m7_gptq.tools.facts import FACTS, quality_results


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


def test_quality_rows_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """"4 bits: GPTQ, textbook" is quality.4.64.textbook; the gap that it closes is computed from three rows."""
    options = {"bits": 4, "group_size": 64}
    rows = {"about": {}, "full precision": {"perplexity": {"test": 10.0}},
            "4 bits: nearest": {"options": options, "seconds": 1.0, "perplexity": {"test": 18.0}},
            "4 bits: GPTQ, textbook": {"options": options, "seconds": 2.0, "perplexity": {"test": 12.0}},
            "4 bits: another": {"options": options, "seconds": 2.0, "perplexity": {"test": 12.0}}}
    names = quality_results(rows)
    assert names["quality.full.ppl"].path == "full precision.perplexity.test"
    assert names["quality.4.64.textbook.ppl"].path == "4 bits: GPTQ, textbook.perplexity.test"
    assert not any("another" in result.path for result in names.values())
    monkeypatch.setattr(facts_module, "_stored", lambda name: rows)
    gaps = facts_module.gaps()
    assert gaps["quality.4.64.textbook.closed"].value == 0.75
    assert gaps["quality.4.64.rtn.closed"].value == 0
