"""The reference that every kernel is compared with: against loops over plain numbers, and by hand."""
from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from m4_flash_attn.reference import MIXED, PagedBatch, paged_attention_reference, random_paged_batch, visible

MASKS = [(None, 0), (1, 0), (5, 0), (5, 2), (16, 4), (1000, 3)]


def attend_one(query: list[float], keys: list[list[float]], values: list[list[float]], scale: float) -> list[float]:
    weights = [math.exp(scale * sum(a * b for a, b in zip(query, key, strict=True))) for key in keys]
    columns = zip(*values, strict=True)
    return [sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights) for column in columns]


def written_out(batch: PagedBatch, window: int | None, num_sinks: int) -> torch.Tensor:
    """Loops over numbers, no tensor arithmetic; the slots by the textbook formula."""
    q, keys, values = (x.double().tolist() for x in (batch.q, batch.k_cache, batch.v_cache))
    table, starts, size = batch.block_table.tolist(), batch.query_start_loc.tolist(), batch.block_size
    group = batch.q.shape[1] // batch.k.shape[1]
    out = []
    for sequence, length in enumerate(batch.seq_lens.tolist()):
        first = length - (starts[sequence + 1] - starts[sequence])
        for position in range(first, length):
            seen = [table[sequence][j // size] * size + j % size for j in range(position + 1)
                    if window is None or position - j < window or j < num_sinks]
            out.append([attend_one(query, [keys[s][h // group] for s in seen], [values[s][h // group] for s in seen],
                                   batch.scale) for h, query in enumerate(q[len(out)])])
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize(("window", "num_sinks"), MASKS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "block_size"), [(4, 2, 4), (3, 3, 16), (6, 1, 1)])
def test_equals_loops_over_plain_numbers(num_heads: int, num_kv_heads: int, block_size: int, window: int | None,
                                         num_sinks: int) -> None:
    """F4.6: causal, sliding window and sinks. Unused slots hold NaN, so none of them was read."""
    batch = random_paged_batch(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=4, block_size=block_size)
    torch.testing.assert_close(batch.expected(window, num_sinks), written_out(batch, window, num_sinks))


def test_mask_by_hand() -> None:
    """F4.6: positions 3 and 5 of six tokens, a window of two (the query's own token counts), one sink."""
    mask = visible(torch.tensor([3, 5]), torch.arange(6), window=2, num_sinks=1)
    assert mask.int().tolist() == [[1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1]]


def test_a_window_as_long_as_the_context_changes_nothing() -> None:
    batch = random_paged_batch()
    longest = int(batch.seq_lens.max())
    assert torch.equal(batch.expected(), batch.expected(window=longest))
    assert not torch.equal(batch.expected(), batch.expected(window=longest - 1))


def test_a_row_without_keys_is_zero_and_disturbs_nobody() -> None:
    """As in a padded batch: the last sequence has a query, no key, and no block."""
    batch = random_paged_batch([(4, 1), (0, 3), (0, 1)])
    lengths = batch.seq_lens.clone()
    lengths[-1] = 0
    table = batch.block_table.clone()
    table[-1] = -1
    out = replace(batch, seq_lens=lengths, block_table=table).expected()
    assert not out[-1].any()
    assert torch.equal(out[:-1], batch.expected()[:-1])


def test_poison_comes_through() -> None:
    """A reference that hides a NaN it has read would hide a wrong table."""
    batch = random_paged_batch([(9, 1), (3, 2)], block_size=4)
    used = int(batch.block_table[0, 0]) * 4
    batch.v_cache[used] = float("nan")
    out = batch.expected()
    assert out[0].isnan().all()
    assert not out[1:].isnan().any()


def test_float32_is_near_float64() -> None:
    batch = random_paged_batch()
    single = paged_attention_reference(batch.q, batch.k_cache, batch.v_cache, batch.query_start_loc.tolist(),
                                       batch.seq_lens, batch.block_table, batch.block_size, batch.scale,
                                       compute_dtype=torch.float32)
    assert single.dtype is torch.float32
    torch.testing.assert_close(single.double(), batch.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_batch_is_laid_out_as_documented(dtype: torch.dtype) -> None:
    batch = random_paged_batch(block_size=8, dtype=dtype, seed=3)
    lengths = [computed + new for computed, new in MIXED]
    assert batch.seq_lens.tolist() == lengths
    assert batch.query_start_loc.diff().tolist() == [new for _, new in MIXED]
    assert batch.max_query_len == max(new for _, new in MIXED)
    counts = (batch.block_table >= 0).sum(1).tolist()
    assert counts == [math.ceil(length / 8) for length in lengths]
    used = batch.block_table[batch.block_table >= 0].tolist()
    assert len(set(used)) == len(used) < batch.k_cache.shape[0] // 8
    assert used != sorted(used)
    for cache, new in ((batch.k_cache, batch.k), (batch.v_cache, batch.v)):
        written = ~cache.isnan().flatten(1)
        assert int(written.all(1).sum()) == int(written.any(1).sum()) == sum(lengths)
        assert torch.equal(cache[batch.slot_mapping], new)
    assert not batch.q.is_contiguous()
    assert {x.dtype for x in (batch.query_start_loc, batch.seq_lens, batch.block_table, batch.slot_mapping)} == {
        torch.int32}
    assert {x.dtype for x in (batch.q, batch.k, batch.k_cache, batch.v_cache)} == {dtype}
