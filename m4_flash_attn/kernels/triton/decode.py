"""Attention of one new token per sequence over the paged cache, the keys split among programs.

A decoding batch has too few (sequence, KV head) pairs to fill a GPU: one sequence and 8 KV heads would keep 8 of 132
multiprocessors busy. So the keys of each sequence are cut into parts, each part is reduced to (m, l, O), and these are
merged. The merge is the online softmax once more, over parts instead of tiles, and as exact (Flash-Decoding):

    m = max m_i      l = sum l_i exp(m_i - m)      out = sum O_i exp(m_i - m) / l

    keys   [ tiles of split 0 | tiles of split 1 | tiles of split 2 ]  ->  (m, l, O) x 3  ->  out

The number of splits is part of the grid, the lengths are read on the device: a CUDA graph may hold the launch.

B sequences, H_q / H_kv query / key-value heads, GROUP = H_q / H_kv, D head size, S splits.
"""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MAX_GROUP, NUM_STAGES, check_rows, compute_dtype, num_sms
from .tiles import attend_tiles, normalise, visible_tiles

_BLOCK_N = 64
_MIN_KEYS_PER_SPLIT = 256       # below this, merging costs more than the parallelism gains
_PROGRAMS_PER_SM = 2


@triton.jit(do_not_specialize=["table_stride"])     # it grows with the context: no compilation for every width
def paged_decode_kernel(q_ptr, k_ptr, v_ptr, out_ptr, max_ptr, sum_ptr, seq_lens_ptr, table_ptr, q_token_stride,
                        q_head_stride, slot_stride, kv_head_stride, table_stride, scale_log2, GROUP: tl.constexpr,
                        HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
                        NUM_SINKS: tl.constexpr, COMPUTE: tl.constexpr):
    """q [B, H_q, D]; k, v [num_slots, H_kv, D]; seq_lens [B]; table [B, max_blocks]; m, l [B, H_q, S] float32.

    out [B, H_q, S, D]: with one split the result, with more the float32 parts that `merge_kernel` merges.
    """
    # 1. The query: one row per head of the group.
    sequence, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + sequence)
    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + rows
    mask = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_offsets = sequence * q_token_stride + heads[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=mask, other=0.0).to(COMPUTE)

    # 2. This split's share of the tiles; none where there are more splits than tiles, or where the row is padding.
    position = seq_len - 1
    num_tiles, num_sink_tiles, num_skipped = visible_tiles(position, position, WINDOW, NUM_SINKS, BLOCK_N)
    share = tl.cdiv(num_tiles, NUM_SPLITS)
    first = split * share
    stop = tl.minimum(first + share, num_tiles)

    # 3. The online softmax over the share.
    positions = tl.zeros([BLOCK_M], tl.int32) + position
    row_max, row_sum, acc = attend_tiles(
        q, positions, first, stop, num_sink_tiles, num_skipped, seq_len, k_ptr + kv_head * kv_head_stride,
        v_ptr + kv_head * kv_head_stride, table_ptr + sequence * table_stride, slot_stride, scale_log2, HEAD_DIM,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_SIZE, WINDOW, NUM_SINKS, COMPUTE)

    # 4. A single split is done. Several leave O undivided: it is divided by the sum over all of them.
    parts = (sequence * tl.num_programs(1) * GROUP + heads) * NUM_SPLITS + split
    if NUM_SPLITS == 1:
        acc = normalise(acc, row_sum)
    else:
        tl.store(max_ptr + parts, row_max, mask=rows < GROUP)
        tl.store(sum_ptr + parts, row_sum, mask=rows < GROUP)
    tl.store(out_ptr + parts[:, None] * HEAD_DIM + dims[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def merge_kernel(parts_ptr, max_ptr, sum_ptr, out_ptr, HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr,
                 BLOCK_D: tl.constexpr):
    """parts [B, H_q, S, D], m, l [B, H_q, S], all float32 -> out [B, H_q, D]. One program per sequence and head."""
    row = tl.program_id(0).to(tl.int64)
    splits, dims = tl.arange(0, NUM_SPLITS), tl.arange(0, BLOCK_D)
    # 1. The maximum over all splits. A split without keys has m = -inf, l = 0 and weighs exp(-inf) = 0.
    row_max = tl.load(max_ptr + row * NUM_SPLITS + splits)
    largest = tl.max(row_max, axis=0)
    weights = tl.exp2(row_max - tl.where(largest == float("-inf"), 0.0, largest))
    # 2. Sums and outputs as if one program had seen all keys under that maximum.
    row_sum = tl.sum(weights * tl.load(sum_ptr + row * NUM_SPLITS + splits), axis=0)
    offsets = (row * NUM_SPLITS + splits)[:, None] * HEAD_DIM + dims[None, :]
    parts = tl.load(parts_ptr + offsets, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    acc = tl.sum(parts * weights[:, None], axis=0)
    # 3. Divide once; a row of padding has l = 0 and becomes 0.
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)
    tl.store(out_ptr + row * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def choose_num_splits(num_sequences: int, num_kv_heads: int, max_seq_len: int, num_multiprocessors: int) -> int:
    """A power of two: as many splits as fill the GPU, as long as each has enough keys to be worth merging."""
    to_fill = _PROGRAMS_PER_SM * num_multiprocessors // (num_sequences * num_kv_heads)
    worthwhile = max_seq_len // _MIN_KEYS_PER_SPLIT
    return 1 << (max(1, min(to_fill, worthwhile)).bit_length() - 1)


def paged_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, block_table: Tensor, block_size: int,
                 max_seq_len: int, scale: float, window: int | None = None, num_sinks: int = 0,
                 num_splits: int | None = None) -> Tensor:
    """Attention of each sequence's newest token over the sequence: q [B, H_q, D] -> [B, H_q, D], contiguous.

    k_cache, v_cache [num_slots, H_kv, D] of one layer, the newest token stored already; seq_lens [B] and block_table
    [B, max_blocks] int32. A query sees `window` keys, its own included, and the first `num_sinks`; all where it is
    None. `num_splits`, a power of two, is chosen by the size of batch, context (`max_seq_len`) and GPU where it is
    None. A row of seq_len 0 becomes 0.
    """
    check_rows(q=q, k_cache=k_cache, v_cache=v_cache, block_table=block_table)
    assert k_cache.stride() == v_cache.stride()
    (num_sequences, num_heads, head_dim), num_kv_heads = q.shape, k_cache.shape[1]
    if num_splits is None:
        longest = max_seq_len if window is None else min(max_seq_len, window + num_sinks)
        num_splits = choose_num_splits(num_sequences, num_kv_heads, longest, num_sms(q.device))
    group, block_d = num_heads // num_kv_heads, triton.next_power_of_2(head_dim)
    assert group <= MAX_GROUP
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if num_splits == 1:
        parts = row_max = row_sum = out         # nothing is merged: the kernel touches `out` alone
    else:
        row_max, row_sum = q.new_empty(2, num_sequences, num_heads, num_splits, dtype=torch.float32)
        parts = q.new_empty(num_sequences, num_heads, num_splits, head_dim, dtype=torch.float32)
    paged_decode_kernel[num_sequences, num_kv_heads, num_splits](
        q, k_cache, v_cache, parts, row_max, row_sum, seq_lens, block_table, q.stride(0), q.stride(1),
        k_cache.stride(0), k_cache.stride(1), block_table.stride(0), scale * math.log2(math.e), GROUP=group,
        HEAD_DIM=head_dim, NUM_SPLITS=num_splits, BLOCK_M=MAX_GROUP,
        BLOCK_N=_BLOCK_N if q.dtype.itemsize == 2 else _BLOCK_N // 2, BLOCK_D=block_d, BLOCK_SIZE=block_size,
        WINDOW=window or 0, NUM_SINKS=num_sinks, COMPUTE=compute_dtype(q.dtype), num_warps=4,
        num_stages=NUM_STAGES)
    if num_splits > 1:
        merge_kernel[num_sequences * num_heads,](parts, row_max, row_sum, out, HEAD_DIM=head_dim,
                                                 NUM_SPLITS=num_splits, BLOCK_D=block_d, num_warps=4)
    return out
