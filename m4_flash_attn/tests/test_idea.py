"""The milestone's idea in 80 lines gives what its engine gives, and runs by itself."""
from __future__ import annotations

from functools import reduce

import pytest
import torch
from torch import Tensor

from m0_basics.tools.testing.idea import run_idea
from m4_flash_attn import idea, online_softmax
from m4_flash_attn.kernels.cpu.bindings import PagedKernels, make_step
from m4_flash_attn.reference import random_paged_batch


@pytest.mark.slow
def test_it_runs_by_itself() -> None:
    printed = run_idea("m4_flash_attn")
    assert "m 5  l 1.5713" in printed
    assert "none above 4,096" in printed


def draw(rows: int, length: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(length)
    return tuple(torch.randn(n, head_dim) * 3 for n in (rows, length, length))


@pytest.mark.parametrize("tile", [1, 7, 64, 300])
@pytest.mark.parametrize("length", [1, 64, 130])
def test_same_output_as_the_engines_tiles(length: int, tile: int) -> None:
    """Against `tiled_attention` and `split_kv_attention`: rows are queries of one head."""
    q, k, v = draw(5, length, 16)
    out = idea.finish(idea.look_at(q, k, v, tile))
    heads = [x.unsqueeze(1) for x in (q, k, v)]
    if length >= 5:
        theirs = online_softmax.tiled_attention(*heads, tile_q=2, tile_k=tile, causal=False)
        torch.testing.assert_close(out, theirs.squeeze(1), rtol=1e-5, atol=1e-5)
        theirs = online_softmax.split_kv_attention(*heads, 3, tile, causal=False)
        torch.testing.assert_close(out, theirs.squeeze(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, torch.softmax(q @ k.T / 4, dim=1) @ v, rtol=1e-5, atol=1e-5)


def test_same_states_as_the_engines() -> None:
    """After each tile, and after merging all of them in any order."""
    q, k, v = draw(5, 60, 16)
    scores = q @ k.T
    ours, theirs = idea.State(torch.full((5,), float("-inf")), torch.zeros(5), torch.zeros(5, 16)), (
        online_softmax.empty_state((5,), 16, v))
    parts = []
    for tile in torch.arange(60).split(9):
        ours = idea.update(ours, scores[:, tile], v[tile])
        theirs = online_softmax.update(theirs, scores[:, tile], v[tile])
        assert all(torch.equal(a, getattr(theirs, name)) for name, a in ours._asdict().items())
        nothing = idea.State(torch.full((5,), float("-inf")), torch.zeros(5), torch.zeros(5, 16))
        parts.append(idea.update(nothing, scores[:, tile], v[tile]))
    for order in (parts, parts[::-1], parts[3:] + parts[:3]):
        torch.testing.assert_close(tuple(reduce(idea.merge, order)), tuple(ours), rtol=1e-5, atol=1e-5)


def test_same_output_as_the_cpu_kernels() -> None:
    """Decodes over a paged cache: the query heads that share a key-value head are the rows of the idea."""
    batch = random_paged_batch([(0, 1), (30, 1), (99, 1)], num_heads=6, num_kv_heads=2, head_dim=32, block_size=8)
    kernels = PagedKernels(6, 2, 32, 8, torch.float32, batch.scale)
    step = make_step(batch.query_start_loc, batch.seq_lens, batch.block_table, batch.slot_mapping)
    out = kernels.attend(step, batch.q, batch.k_cache, batch.v_cache).view(3, 6, 32)
    for b, length in enumerate(batch.seq_lens.tolist()):
        tokens = torch.arange(length)
        slots = batch.block_table[b].long()[tokens // 8] * 8 + tokens % 8
        for head in range(2):
            state = idea.look_at(batch.q[b, 3 * head:3 * head + 3], batch.k_cache[slots, head],
                                 batch.v_cache[slots, head], tile=16)
            torch.testing.assert_close(out[b, 3 * head:3 * head + 3], idea.finish(state), rtol=1e-5, atol=1e-5)
