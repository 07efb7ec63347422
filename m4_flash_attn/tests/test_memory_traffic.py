"""F4.3: what is counted is what the formula says, and the algorithms that were counted are right."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m0_basics.config import ConfigError
from m4_flash_attn.tools.memory_traffic import (
    ALGORITHMS,
    CountingMemory,
    Heads,
    Traffic,
    counted,
    formula,
    run,
    tile_sizes,
)

shapes = st.builds(Heads, num_queries=st.integers(1, 40), num_keys=st.integers(1, 60), head_dim=st.integers(1, 12),
                   group=st.sampled_from([1, 2, 3]))


@pytest.mark.slow
@settings(deadline=None)
@given(algorithm=st.sampled_from(sorted(ALGORITHMS)), shape=shapes, sram_elements=st.integers(62, 900),
       element_bytes=st.sampled_from([1, 2, 4]))
def test_counted_equals_formula_and_the_output_is_right(algorithm: str, shape: Heads, sram_elements: int,
                                                        element_bytes: int) -> None:
    """F4.3: to the byte, for sizes that the tiles do not divide, and on the very run whose output is checked."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, shape.head_dim, generator=generator)
               for n in (shape.rows, shape.num_keys, shape.num_keys))
    out, memory = run(algorithm, q, k, v, sram_elements, shape.group)
    torch.testing.assert_close(out, torch.softmax(q @ k.T * shape.head_dim ** -0.5, -1) @ v)
    expected = formula(algorithm, shape, sram_elements, element_bytes)
    assert Traffic(*(n * element_bytes for n in (memory.loads, memory.stores, memory.peak))) == expected
    assert counted(algorithm, shape, sram_elements, element_bytes) == expected


def test_by_hand() -> None:
    """4 queries, 6 keys, D 2, fast memory of 24: tiles of two rows and two keys, so keys and values are read twice."""
    shape = Heads(4, 6, 2)
    assert tile_sizes(2, 24) == (2, 2)
    loads, stores, operands = 4 * 2 + 2 * (2 * 6 * 2), 4 * 2, 2 * (4 * 2) + 2 * (6 * 2)
    assert counted("tiled", shape, 24, 1) == Traffic(loads, stores, operands)
    assert counted("naive", shape, 24, 1) == Traffic(loads + 2 * 24, stores + 2 * 24, operands + 2 * 24)


def test_peak_grows_linearly_or_with_the_square() -> None:
    """F4.3: twice the length is twice the memory for one, four times (and a little less) for the other."""
    tiled, naive = ([formula(a, Heads(n, n, 64), 16384).peak for n in (2048, 4096)] for a in ("tiled", "naive"))
    assert tiled[1] == 2 * tiled[0] == 2 * (4 * 2048 * 64 * 2)
    assert 3.8 < naive[1] / naive[0] < 4


@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiled_traffic_is_as_theorem_2_says(head_dim: int) -> None:
    """F4.3: Theta(n^2 d^2 / M), not O(n^2 / M): n and d enter squared, the fast memory inversely."""
    def beyond_operands(n: int, d: int, sram: int) -> int:
        return formula("tiled", Heads(n, n, d), sram, 1).total - 2 * n * d

    n, sram = 1 << 22, 1 << 20
    base = beyond_operands(n, head_dim, sram)
    assert base == pytest.approx(10 * n**2 * head_dim**2 / sram, rel=0.02)
    assert beyond_operands(2 * n, head_dim, sram) == pytest.approx(4 * base, rel=0.01)
    assert beyond_operands(n, 2 * head_dim, sram) == pytest.approx(4 * base, rel=0.02)
    assert beyond_operands(n, head_dim, 2 * sram) == pytest.approx(base / 2, rel=0.01)


def test_what_tiling_saves_is_the_scores_alone() -> None:
    """F4.3: S and P, each once there and once back; the reading of keys and values is the same."""
    shape = Heads(100, 300, 16, group=2)
    naive, tiled = (counted(a, shape, 4096, 2) for a in ("naive", "tiled"))
    scores_bytes = 200 * 300 * 2
    assert (naive.loads - tiled.loads, naive.stores - tiled.stores) == (2 * scores_bytes, 2 * scores_bytes)
    assert naive.peak - tiled.peak == 2 * scores_bytes


def test_decode_has_nothing_to_save_but_a_vector() -> None:
    """F4.3: with one query, keys and values are read once either way; S and P add 2 / D."""
    naive, tiled = (counted(a, Heads(1, 2000, 64), 16384) for a in ("naive", "tiled"))
    keys_and_values = 2 * 2000 * 64 * 2
    assert tiled.total == keys_and_values + 2 * 64 * 2
    assert naive.total / tiled.total == pytest.approx(1 + 2 / 64, rel=1e-3)


def test_heads_of_a_group_read_their_keys_once() -> None:
    """F4.3: in decode three heads in one tile read a third of what three heads by themselves do."""
    together, alone = (counted("tiled", Heads(1, 500, 16, group), 4096).loads for group in (3, 1))
    query = 16 * 2
    assert together - 3 * query == alone - query == 2 * 500 * 16 * 2


def test_the_memory_counts_tiles_and_keeps_the_peak() -> None:
    memory = CountingMemory(fast_elements=10)
    memory.place("a", torch.arange(12.0).view(3, 4))
    tile = memory.load("a", range(1, 3), range(2))
    assert tile.tolist() == [[4, 5], [8, 9]]
    tile.zero_()
    assert memory.load("a", range(1, 2)).tolist() == [[4, 5, 6, 7]]
    memory.store("a", tile, range(2), range(2, 4))
    assert memory.load("a", range(3)).tolist() == [[0, 1, 0, 0], [4, 5, 0, 0], [8, 9, 10, 11]]
    assert (memory.loads, memory.stores) == (4 + 4 + 12, 4)
    memory.place("b", torch.zeros(5))
    memory.free("a")
    memory.place("c", torch.zeros(3))
    assert memory.peak == 17
    memory.hold(torch.zeros(6), torch.zeros(4))
    with pytest.raises(AssertionError, match="fast memory"):
        memory.hold(torch.zeros(6), torch.zeros(5))


@pytest.mark.parametrize("call", [counted, formula])
def test_errors_say_what_is_allowed(call) -> None:
    with pytest.raises(ConfigError, match="sram_elements=321 is not valid; allowed: at least 322 for heads of 64"):
        call("tiled", Heads(8, 8, 64), 321)
    with pytest.raises(ConfigError, match="at least 400"):
        call("naive", Heads(1, 400, 64), 399)
    with pytest.raises(ConfigError, match="algorithm='fused' is not valid; allowed: naive or tiled"):
        call("fused", Heads(8, 8, 64), 4096)
