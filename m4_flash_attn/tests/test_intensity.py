"""FLOPs per byte, by hand and by the limits they tend to."""
from __future__ import annotations

import pytest

from m4_flash_attn.tools.intensity import attainable, attention_part, linear_part
from m4_flash_attn.tools.memory_traffic import Heads

SRAM = 1 << 16


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decode_attention_has_the_group_size_as_intensity(group: int, head_dim: int) -> None:
    """In 16 bits each key element is two bytes and meets G queries for two FLOPs each. The context does not matter."""
    for num_keys in (1000, 30_000):
        part = attention_part(Heads(1, num_keys, head_dim, group), SRAM)
        assert part.flops == 4 * group * num_keys * head_dim
        assert part.intensity == pytest.approx(group, rel=0.01)


def test_linear_layers_gain_from_the_batch() -> None:
    """3 tokens, 4 in, 5 out: 120 FLOPs over 20 weights and 27 activations. For few tokens it is their number."""
    assert (linear_part(3, 4, 5).flops, linear_part(3, 4, 5).num_bytes) == (120, 94)
    assert linear_part(8, 4096, 4096).intensity == pytest.approx(8, rel=0.01)


def test_prefill_attention_gains_from_queries_that_share_a_tile() -> None:
    """With the tiled algorithm it tends to the rows of a tile; the naive one stays below D / 2."""
    prompt = Heads(32768, 32768, 64)
    tiled, naive = attention_part(prompt, SRAM), attention_part(prompt, SRAM, "naive")
    assert tiled.flops == naive.flops == 4 * 32768 * 32768 * 64
    assert tiled.intensity == pytest.approx(SRAM // (5 * 64 + 2), rel=0.02)
    assert naive.intensity < 32 < tiled.intensity


def test_attainable_is_the_lower_roof() -> None:
    assert (attainable(2, 100, 10), attainable(10, 100, 10), attainable(50, 100, 10)) == (20, 100, 100)
