"""Attention of many new tokens per sequence over the paged cache: prompts, chunks of prompts, mixed steps.

One program per (tile of queries, KV head, sequence). The new tokens are the last of their sequence, so query i of n
stands at position seq_len - n + i, and a prompt, a chunk behind a cached prefix and a single new token differ in
numbers only.

    keys     [ computed before ...... | new ....... ]  seq_len
    queries                            [ tile | tile ]  n

T tokens in the step, B sequences, H_q / H_kv query / key-value heads, GROUP = H_q / H_kv, D head size. The letters of
tiles are in `tiles.py`.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MAX_GROUP, NUM_STAGES, capability, check_rows, compute_dtype
from .tiles import attend_tiles, normalise, visible_tiles


# The stride grows with the context: no compilation for every width. Nor for every place at which these sequences begin
# behind the decodes of a mixed step.
@triton.jit(do_not_specialize=["table_stride"],
            do_not_specialize_on_alignment=["query_starts_ptr", "seq_lens_ptr", "table_ptr"])
def paged_prefill_kernel(q_ptr, k_ptr, v_ptr, out_ptr, query_starts_ptr, seq_lens_ptr, table_ptr,
                         q_token_stride, q_head_stride, slot_stride, kv_head_stride, out_token_stride, out_head_stride,
                         table_stride, scale_log2, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                         WINDOW: tl.constexpr, NUM_SINKS: tl.constexpr, COMPUTE: tl.constexpr):
    """q, out [T, H_q, D]; k, v [num_slots, H_kv, D]; query_starts [B + 1]; seq_lens [B]; table [B, max_blocks]."""
    # 1. Which queries: QUERIES of them fit into the tile, with all heads of the group.
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    first_query, kv_head, sequence = tl.program_id(0) * QUERIES, tl.program_id(1), tl.program_id(2)
    start = tl.load(query_starts_ptr + sequence)
    num_queries = tl.load(query_starts_ptr + sequence + 1) - start
    if first_query >= num_queries:          # the grid is made for the longest sequence
        return
    seq_len = tl.load(seq_lens_ptr + sequence)
    rows = tl.arange(0, BLOCK_M)
    queries, heads = first_query + rows // GROUP, kv_head * GROUP + rows % GROUP
    positions = seq_len - num_queries + queries
    valid = (rows < QUERIES * GROUP) & (queries < num_queries)      # 64 rows hold 21 queries of 3 heads, and one spare

    # 2. The tile of queries is loaded once and stays in registers or shared memory.
    tokens = (start + queries).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (dims[None, :] < HEAD_DIM)
    q_offsets = tokens[:, None] * q_token_stride + heads[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=mask, other=0.0).to(COMPUTE)

    # 3. All keys up to the last query's position, tile by tile.
    first_position = seq_len - num_queries + first_query
    last_position = tl.minimum(first_position + QUERIES, seq_len) - 1
    num_tiles, num_sink_tiles, num_skipped = visible_tiles(first_position, last_position, WINDOW, NUM_SINKS, BLOCK_N)
    _, row_sum, acc = attend_tiles(
        q, positions, 0, num_tiles, num_sink_tiles, num_skipped, seq_len, k_ptr + kv_head * kv_head_stride,
        v_ptr + kv_head * kv_head_stride, table_ptr + sequence.to(tl.int64) * table_stride, slot_stride, scale_log2,
        HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_SIZE, WINDOW, NUM_SINKS, COMPUTE)

    # 4. One division per row, at the very end.
    out_offsets = tokens[:, None] * out_token_stride + heads[:, None] * out_head_stride + dims[None, :]
    tl.store(out_ptr + out_offsets, normalise(acc, row_sum).to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Tiles:
    """Sides of the tiles, and what each program gets."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int         # how far ahead loads run: see NUM_STAGES


def prefill_tiles(head_dim: int, dtype: torch.dtype, compute_capability: tuple[int, int]) -> Tiles:
    """Tiles that fit into registers and shared memory, as the compilation test checks."""
    if dtype is torch.float32:              # no tensor cores: products of float32 fill the registers
        return Tiles(32, 32, 4, 1) if head_dim <= 64 else Tiles(32, 16, 8, 1)
    # Data centre GPUs from Hopper on multiply from shared memory, and have more of it; on all others the keys' tile has
    # to fit into the registers as well.
    block_n = 64 if head_dim <= 64 or compute_capability[0] in (9, 10) else 32
    return Tiles(128, block_n, 8, NUM_STAGES)


def paged_prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, query_starts: Tensor, seq_lens: Tensor,
                  block_table: Tensor, block_size: int, max_query_len: int, scale: float, window: int | None = None,
                  num_sinks: int = 0, out: Tensor | None = None) -> Tensor:
    """Causal attention of the new tokens over their sequences: q [T, H_q, D] -> [T, H_q, D], contiguous.

    k_cache, v_cache [num_slots, H_kv, D] of one layer, the step's tokens stored already; query_starts [B + 1],
    seq_lens [B] and block_table [B, max_blocks] int32. No sequence has more than `max_query_len` new tokens. A query
    sees `window` keys, its own included, and the first `num_sinks`; all where it is None. `out`, of q's shape and
    contiguous, is written where it is given: the rows of these sequences, which may begin behind others' tokens.
    """
    check_rows(q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    assert k_cache.stride() == v_cache.stride()
    num_heads, num_kv_heads, head_dim = q.shape[1], k_cache.shape[1], q.shape[2]
    group = num_heads // num_kv_heads
    assert group <= MAX_GROUP
    tiles = prefill_tiles(head_dim, q.dtype, capability(q.device))
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    grid = (triton.cdiv(max_query_len, tiles.block_m // group), num_kv_heads, len(seq_lens))
    paged_prefill_kernel[grid](
        q, k_cache, v_cache, out, query_starts, seq_lens, block_table, q.stride(0), q.stride(1), k_cache.stride(0),
        k_cache.stride(1), out.stride(0), out.stride(1), block_table.stride(0), scale * math.log2(math.e),
        GROUP=group, HEAD_DIM=head_dim, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        BLOCK_D=triton.next_power_of_2(head_dim), BLOCK_SIZE=block_size, WINDOW=window or 0, NUM_SINKS=num_sinks,
        COMPUTE=compute_dtype(q.dtype), num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    return out
