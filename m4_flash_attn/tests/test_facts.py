"""The computed facts, against sums done by hand."""
from __future__ import annotations

import pytest

from m4_flash_attn.tools.facts import FACTS


def values() -> dict[str, int | float | str]:
    return {name: fact.value for name, fact in FACTS.compute().items()}


def test_bytes_by_hand() -> None:
    """F4.3: 116,224 elements of shared memory over 5 x 128 + 2; 23 tiles of rows read 4,096 keys and values."""
    facts = values()
    assert facts["traffic.rows"] == 116_224 // 642 == 181
    elements = 2 * 4096 * 128 + 23 * 2 * 4096 * 128                     # q and o once, k and v for each tile
    assert facts["traffic.4096.tiled.bytes"] == 2 * elements
    assert facts["traffic.4096.naive.bytes"] == 2 * (elements + 4 * 4096 * 4096)
    assert facts["traffic.4096.tiled.peak"] == 2 * 4 * 4096 * 128
    assert facts["traffic.4096.scores_bytes"] == facts["traffic.4096.naive.peak"] - facts["traffic.4096.tiled.peak"]
    assert facts["traffic.4096.peak_ratio"] == 1 + 4096 / 256


def test_one_ratio_grows_and_the_other_does_not() -> None:
    """F4.3: memory is 1 + n / (2 D), traffic tends to 1 + 2 rows / D."""
    facts = values()
    lengths = (1024, 2048, 4096, 8192, 16_384, 65_536)
    assert [facts[f"traffic.{n}.peak_ratio"] for n in lengths] == [1 + n / 256 for n in lengths]
    assert facts["traffic.65536.ratio"] == pytest.approx(1 + 2 * 181 / 128, rel=0.01)
    assert facts["traffic.d64.ratio"] == pytest.approx(1 + 2 * 360 / 64, rel=0.04)
    assert facts["decode.traffic_ratio.g1"] == pytest.approx(1 + 4 / (2 * 128), rel=1e-3)
    assert facts["traffic.d128.over_d64"] == pytest.approx(4, rel=0.04), "the square of the head size, for a given M"


def test_intensities_by_hand() -> None:
    """Decode: G FLOPs per byte in 16 bits. A linear layer: about its rows."""
    facts = values()
    for name, group in (("smollm2", 3), ("qwen3_0_6b", 2), ("llama_3_1_8b", 4)):
        assert facts[f"intensity.decode.{name}"] == pytest.approx(group, rel=0.01)
    assert facts["intensity.linear.1"] == pytest.approx(1, rel=0.01)
    assert facts["intensity.prefill.4096.naive"] < 64 < facts["intensity.prefill.4096.tiled"] < facts["h100.ridge"]
    assert facts["weights.smollm2.bytes"] == 2 * 134_515_008


def test_long_contexts_by_hand() -> None:
    """Llama-3.1-8B: 131,072 B of keys and values a token, read once per token at 3,350 GB/s."""
    facts = values()
    assert facts["llama.kv.131072.bytes"] == 131_072 ** 2
    more_ms = (131_072 - 8192) * 131_072 / 3350e9 * 1e3
    assert facts["llama.decode.131072.ms"] == pytest.approx(facts["llama.decode.8192.ms"] + more_ms)
    shares = [facts[f"llama.prefill.{n}.attention_share"] for n in (512, 8192, 32_768, 131_072)]
    assert shares == sorted(shares)
    assert shares[0] < 0.02 < 0.5 < shares[-1]
    assert facts["ring.min_tokens"] == pytest.approx(989.4e12 / 450e9 * 8 / 32)


def test_packing_windows_and_recordings() -> None:
    """F4.4, F4.6, F4.7: padding is to the longest prompt, 256; a window by brute force; sizes 1, 2, 4, 8, 16, 32."""
    facts = values()
    assert facts["packing.padded"] == 64 * 256
    assert facts["packing.used"] == facts["packing.tokens"] / facts["packing.padded"]
    assert facts["packing.pairs"] < facts["packing.padded_pairs"] / 4 < facts["packing.diagonal_pairs"]
    seen = sum(min(i, 4100) for i in range(1, 131_073))
    assert facts["window.pairs_share"] == pytest.approx(seen / (131_072 * 131_073 / 2))
    assert facts["window.kv_share"] == 4100 / 131_072
    assert facts["graph.sizes"] == 20
    padded = sum(next(s for s in (1, 2, 4, 8, *range(16, 257, 16)) if s >= b) for b in range(1, 257))
    assert facts["graph.padding"] == pytest.approx(1 - 256 * 257 / 2 / padded)
