"""Attention of one new token per sequence over the paged cache, the keys split among programs.

A decoding batch has too few (sequence, KV head) pairs to fill a GPU: one sequence and 8 KV heads would keep 8 of 132
multiprocessors busy. So the keys of each sequence are cut into parts, each part is reduced to (m, l, O), and these are
merged. The merge is the online softmax once more, over parts instead of tiles, and as exact (Flash-Decoding):

    m = max m_i      l = sum l_i exp(m_i - m)      out = sum O_i exp(m_i - m) / l

    keys   [ tiles of split 0 | tiles of split 1 | tiles of split 2 ]  ->  (m, l, O) x 3  ->  out

A part has KEYS_PER_SPLIT keys, always cut at the same places and merged in their order: a row's result is the same
bits whatever the batch. The number of splits is part of the grid, the lengths are read on the device: a CUDA graph may
hold the launch.

B sequences, H_q / H_kv query / key-value heads, GROUP = H_q / H_kv, D head size, S splits.
"""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MAX_GROUP, NUM_STAGES, check_rows, compute_dtype
from .tiles import attend_tiles, normalise, visible_tiles

_BLOCK_N = 64
KEYS_PER_SPLIT = 256            # fewer, and merging would cost more than the parallelism gains


@triton.jit(do_not_specialize=["table_stride"])     # it grows with the context: no compilation for every width
def paged_decode_kernel(q_ptr, k_ptr, v_ptr, out_ptr, max_ptr, sum_ptr, seq_lens_ptr, table_ptr, q_token_stride,
                        q_head_stride, slot_stride, kv_head_stride, table_stride, scale_log2, GROUP: tl.constexpr,
                        HEAD_DIM: tl.constexpr, TILES_PER_SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
                        BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
                        NUM_SINKS: tl.constexpr, MERGED: tl.constexpr, COMPUTE: tl.constexpr):
    """q [B, H_q, D]; k, v [num_slots, H_kv, D]; seq_lens [B]; table [B, max_blocks]; m, l [B, H_q, S] float32.

    out [B, H_q, S, D]: the float32 parts that `merge_kernel` merges; the result where there is but one, not MERGED.
    """
    # 1. The query: one row per head of the group.
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + sequence)
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + rows
    mask = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_offsets = sequence * q_token_stride + heads[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=mask, other=0.0).to(COMPUTE)

    # 2. This split's tiles; none where the sequence is shorter than others, or where the row is padding: `merge_kernel`
    # does not look at those.
    position = seq_len - 1
    num_tiles, num_sink_tiles, num_skipped = visible_tiles(position, position, WINDOW, NUM_SINKS, BLOCK_N)
    first = split * TILES_PER_SPLIT
    stop = tl.minimum(first + TILES_PER_SPLIT, num_tiles)

    # 3. The online softmax over the share.
    positions = tl.zeros([BLOCK_M], tl.int32) + position
    row_max, row_sum, acc = attend_tiles(
        q, positions, first, stop, num_sink_tiles, num_skipped, seq_len, k_ptr + kv_head * kv_head_stride,
        v_ptr + kv_head * kv_head_stride, table_ptr + sequence * table_stride, slot_stride, scale_log2, HEAD_DIM,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_SIZE, WINDOW, NUM_SINKS, COMPUTE)

    # 4. A single split is done. Several leave O undivided: it is divided by the sum over all of them.
    parts = (sequence * tl.num_programs(1) * GROUP + heads) * tl.num_programs(2) + split
    if MERGED:
        tl.store(max_ptr + parts, row_max, mask=rows < GROUP)
        tl.store(sum_ptr + parts, row_sum, mask=rows < GROUP)
    else:
        acc = normalise(acc, row_sum)
    tl.store(out_ptr + parts[:, None] * HEAD_DIM + dims[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(parts_ptr, max_ptr, sum_ptr, out_ptr, seq_lens_ptr, num_splits, NUM_HEADS: tl.constexpr,
                 HEAD_DIM: tl.constexpr, TILES_PER_SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                 WINDOW: tl.constexpr, NUM_SINKS: tl.constexpr):
    """parts [B, H_q, S, D], m, l [B, H_q, S], all float32 -> out [B, H_q, D]. One program per sequence and head."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    position = tl.load(seq_lens_ptr + row // NUM_HEADS) - 1
    num_tiles, _, _ = visible_tiles(position, position, WINDOW, NUM_SINKS, BLOCK_N)
    # Part after part, in their order; both sides are scaled to the larger maximum.
    row_max, row_sum = float("-inf"), 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for split in range(tl.cdiv(num_tiles, TILES_PER_SPLIT)):
        part = row * num_splits + split
        part_max = tl.load(max_ptr + part)
        largest = tl.maximum(row_max, part_max)
        known, new = tl.exp2(row_max - largest), tl.exp2(part_max - largest)
        row_sum = row_sum * known + tl.load(sum_ptr + part) * new
        acc = acc * known + tl.load(parts_ptr + part * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0) * new
        row_max = largest
    # Divide once; a row of padding has no parts and becomes 0.
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)
    tl.store(out_ptr + row * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def most_tiles(max_seq_len: int, window: int | None, num_sinks: int, block_n: int) -> int:
    """Tiles of keys that a token may see at most: with a window those of the window and of the sinks, which begin and
    end within tiles."""
    tiles = -(-max_seq_len // block_n)
    return tiles if window is None else min(tiles, -(-window // block_n) + 1 + -(-num_sinks // block_n))


def paged_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, block_table: Tensor, block_size: int,
                 max_seq_len: int, scale: float, window: int | None = None, num_sinks: int = 0,
                 keys_per_split: int = KEYS_PER_SPLIT, out: Tensor | None = None) -> Tensor:
    """Attention of each sequence's newest token over the sequence: q [B, H_q, D] -> [B, H_q, D], contiguous.

    k_cache, v_cache [num_slots, H_kv, D] of one layer, the newest token stored already; seq_lens [B] and block_table
    [B, max_blocks] int32. A query sees `window` keys, its own included, and the first `num_sinks`; all where it is
    None. No sequence is longer than `max_seq_len`. `keys_per_split` is a multiple of 64. A row of
    seq_len 0 becomes 0. `out`, contiguous, is written where it is given.
    """
    check_rows(q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    assert k_cache.stride() == v_cache.stride()
    (num_sequences, num_heads, head_dim), num_kv_heads = q.shape, k_cache.shape[1]
    block_n = _BLOCK_N if q.dtype.itemsize == 2 else _BLOCK_N // 2
    tiles_per_split = keys_per_split // block_n
    num_splits = max(1, triton.cdiv(most_tiles(max_seq_len, window, num_sinks, block_n), tiles_per_split))
    group, block_d = num_heads // num_kv_heads, triton.next_power_of_2(head_dim)
    assert group <= MAX_GROUP
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if num_splits == 1:
        parts = row_max = row_sum = out         # nothing is merged: the kernel touches `out` alone
    else:
        row_max, row_sum = q.new_empty(2, num_sequences, num_heads, num_splits, dtype=torch.float32)
        parts = q.new_empty(num_sequences, num_heads, num_splits, head_dim, dtype=torch.float32)
    paged_decode_kernel[num_sequences, num_kv_heads, num_splits](
        q, k_cache, v_cache, parts, row_max, row_sum, seq_lens, block_table, q.stride(0), q.stride(1),
        k_cache.stride(0), k_cache.stride(1), block_table.stride(0), scale * math.log2(math.e), GROUP=group,
        HEAD_DIM=head_dim, TILES_PER_SPLIT=tiles_per_split, BLOCK_M=MAX_GROUP, BLOCK_N=block_n, BLOCK_D=block_d,
        BLOCK_SIZE=block_size, WINDOW=window or 0, NUM_SINKS=num_sinks, MERGED=num_splits > 1,
        COMPUTE=compute_dtype(q.dtype), num_warps=4, num_stages=NUM_STAGES)
    if num_splits > 1:
        merge_kernel[num_sequences * num_heads,](
            parts, row_max, row_sum, out, seq_lens, num_splits, NUM_HEADS=num_heads, HEAD_DIM=head_dim,
            TILES_PER_SPLIT=tiles_per_split, BLOCK_N=block_n, BLOCK_D=block_d, WINDOW=window or 0, NUM_SINKS=num_sinks,
            num_warps=4)
    return out
