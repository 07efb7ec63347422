"""The computed facts, against sums done by hand."""
from __future__ import annotations

import pytest

from m5_chunked_prefill.tools.facts import FACTS, expected_tokens


def values() -> dict[str, int | float | str]:
    return {name: fact.value for name, fact in FACTS.compute().items()}


def test_chunks_by_hand() -> None:
    """F5.1: 1,000 = 3 x 256 + 232. 6,000 tokens: 23 chunks and one of 112; a chunk reads all before it and itself."""
    facts = values()
    assert (facts["chunk.example.steps"], facts["chunk.example.last"]) == (4, 232)
    assert facts["chunk.giant.steps"] == 24
    assert facts["chunk.giant.cache_reads"] == (256 * 23 * 24 // 2 + 6000) / 6000
    assert facts["chunk.giant.weight_bytes"] == 24 * 2 * 134_515_008


def test_rooms_by_hand() -> None:
    """An 8B model on an H100: 16.06 GB of weights, of which the 1.05 of the embeddings are looked up, and 64 x 1,024 x
    131,072 B of cache, at 3,350 GB/s."""
    facts = values()
    assert facts["h100.decode.64.ms"] == pytest.approx((16.06 - 1.05 + 64 * 1024 * 131_072e-9) / 3350 * 1e3, rel=0.02)
    assert facts["h100.mixed.512.ratio"] == facts["h100.mixed.512.ms"] / facts["h100.decode.64.ms"]
    assert 1 <= facts["h100.mixed.512.ratio"] < facts["h100.mixed.2048.ratio"]
    assert facts["h100.free_chunk"] < 989.4e12 * facts["h100.decode.64.ms"] * 1.05e-3 / (2 * 7.5e9)
    assert facts["h100.prefill.6000.ms"] == pytest.approx(
        (6000 * 2 * 7.5e9 + 6000 ** 2 / 2 * 4 * 32 * 4096) / 989.4e12 * 1e3, rel=0.1)


def test_guesses_by_hand() -> None:
    """1 + p + p^2 + ... + p^k, and the best k by trying all of them."""
    facts = values()
    assert facts["spec.tokens.80.4"] == pytest.approx(1 + 0.8 + 0.64 + 0.512 + 0.4096)
    assert expected_tokens(0.5, 0) == 1
    rates = {k: sum(0.8 ** j for j in range(k + 1)) / (1 + 0.27 * k) for k in range(21)}
    assert facts["spec.best_k.80.27"] == max(rates, key=lambda k: rates[k])
    assert facts["spec.speedup.80.27"] == pytest.approx(max(rates.values()))
    assert facts["accept.rejection"] == pytest.approx(0.4 + 0.25 + 0.15 + 0.05)
    assert facts["accept.same_draw"] == pytest.approx(0.4 + (0.65 - 0.5) + (0.9 - 0.8) + (1 - 0.95))


def test_thoughts_by_hand() -> None:
    """10,000 tokens of 131,072 B; 72 GB less the weights hold so many of them."""
    facts = values()
    assert facts["thought.kv_bytes"] == 10_000 * 131_072
    assert facts["thought.fit"] == int((72e9 - 2 * 8_030_261_248) / (10_000 * 131_072))
