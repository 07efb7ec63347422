"""What happens to q, k and v between their projection and attention: norm, rotation, and the way into the cache.

    qkv row of a token  [ q heads | k heads | v heads ]
                             |         |         |
                          (norm)    (norm)       |         Qwen3 alone has the norms
                          rotate    rotate       |
                             v         v         v
                          q out     k cache   v cache      at the token's slot

One program does all of a token, so every element is read once and nothing goes through memory in between.

T tokens in the step, H_q / H_kv query / key-value heads, D head size. PAD_... is the next power of two.
"""
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import check_rows


@triton.jit
def rotated_heads(heads_ptr, weight_ptr, cos_ptr, sin_ptr, eps, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                  PAD_HEADS: tl.constexpr, PAD_DIM: tl.constexpr, NORM: tl.constexpr):
    """One token's heads, normalised and rotated: [PAD_HEADS, PAD_DIM] float32.

    heads_ptr: [NUM_HEADS, HEAD_DIM], contiguous; weight [HEAD_DIM]; cos_ptr, sin_ptr: [HEAD_DIM] of this position.
    """
    heads, dims = tl.arange(0, PAD_HEADS), tl.arange(0, PAD_DIM)
    inside = (heads < NUM_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    # Dimension d is rotated together with d + D/2. Reading a head twice is cheaper than moving it between threads.
    partners = tl.where(dims < HEAD_DIM // 2, dims + HEAD_DIM // 2, dims - HEAD_DIM // 2)
    rows = heads_ptr + heads[:, None] * HEAD_DIM
    x = tl.load(rows + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    partner = tl.load(rows + partners[None, :], mask=inside, other=0.0).to(tl.float32)
    in_head = dims < HEAD_DIM
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        x *= scale * tl.load(weight_ptr + dims, mask=in_head, other=0.0).to(tl.float32)[None, :]
        partner *= scale * tl.load(weight_ptr + partners, mask=in_head, other=0.0).to(tl.float32)[None, :]
    cos = tl.load(cos_ptr + dims, mask=in_head, other=0.0).to(tl.float32)
    signed_sin = tl.load(sin_ptr + dims, mask=in_head, other=0.0).to(tl.float32)
    return x * cos[None, :] + partner * signed_sin[None, :]


@triton.jit
def rotary_store_kernel(qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, slots_ptr, q_ptr, k_cache_ptr,
                        v_cache_ptr, qkv_stride, rotary_stride, slot_stride, kv_head_stride, eps,
                        NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                        PAD_HEADS: tl.constexpr, PAD_KV_HEADS: tl.constexpr, PAD_DIM: tl.constexpr,
                        NORM: tl.constexpr):
    """One program per token. qkv [T, H_q + 2 H_kv, D]; cos, sin [T, D]; slots [T]; q [T, H_q, D]; caches by slot."""
    token = tl.program_id(0).to(tl.int64)
    row = qkv_ptr + token * qkv_stride
    cos, sin = cos_ptr + token * rotary_stride, sin_ptr + token * rotary_stride
    dims = tl.arange(0, PAD_DIM)
    # 1. Queries, into a tensor of their own: written in place, a partner might be gone before it is read.
    heads = tl.arange(0, PAD_HEADS)
    q = rotated_heads(row, q_weight_ptr, cos, sin, eps, NUM_HEADS, HEAD_DIM, PAD_HEADS, PAD_DIM, NORM)
    q_offsets = (token * NUM_HEADS + heads)[:, None] * HEAD_DIM + dims[None, :]
    q_mask = (heads < NUM_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(q_ptr + q_offsets, q.to(q_ptr.dtype.element_ty), mask=q_mask)
    # 2. Keys and values, straight into the cache. The padding of a CUDA graph's batch has slot -1.
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        kv_heads = tl.arange(0, PAD_KV_HEADS)
        kv_mask = (kv_heads < NUM_KV_HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
        cache_offsets = slot * slot_stride + kv_heads[:, None] * kv_head_stride + dims[None, :]
        k = rotated_heads(row + NUM_HEADS * HEAD_DIM, k_weight_ptr, cos, sin, eps, NUM_KV_HEADS, HEAD_DIM,
                          PAD_KV_HEADS, PAD_DIM, NORM)
        tl.store(k_cache_ptr + cache_offsets, k.to(k_cache_ptr.dtype.element_ty), mask=kv_mask)
        v_row = row + (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM
        v = tl.load(v_row + kv_heads[:, None] * HEAD_DIM + dims[None, :], mask=kv_mask, other=0.0).to(tl.float32)
        tl.store(v_cache_ptr + cache_offsets, v.to(v_cache_ptr.dtype.element_ty), mask=kv_mask)


def rotary_and_store(qkv: Tensor, cos: Tensor, signed_sin: Tensor, slot_mapping: Tensor, k_cache: Tensor,
                     v_cache: Tensor, norms: tuple[Tensor, Tensor] | None = None, eps: float = 0.0) -> Tensor:
    """Rotate queries and keys, store keys and values; returns the queries [T, H_q, D], contiguous.

    qkv [T, (H_q + 2 H_kv) * D] as the projection gives it; cos, signed_sin [T, D] or [T, 1, D] from m0's
    `RotaryEmbedding`; slot_mapping [T] int32, -1: store nothing; k_cache, v_cache [num_slots, H_kv, D] of one layer.
    `norms`: weights [D] of the RMSNorm on each query and key head before the rotation, or None.
    """
    check_rows(qkv=qkv, cos=cos, signed_sin=signed_sin, k_cache=k_cache, v_cache=v_cache)
    assert k_cache.stride() == v_cache.stride() and cos.stride(0) == signed_sin.stride(0)
    num_tokens, (_, num_kv_heads, head_dim) = qkv.shape[0], k_cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    q_weight, k_weight = norms if norms is not None else (qkv, qkv)         # without norms no weight is read
    pad_heads, pad_dim = triton.next_power_of_2(num_heads), triton.next_power_of_2(head_dim)
    rotary_store_kernel[num_tokens,](
        qkv, q_weight, k_weight, cos, signed_sin, slot_mapping, q, k_cache, v_cache, qkv.stride(0), cos.stride(0),
        k_cache.stride(0), k_cache.stride(1), eps, NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        PAD_HEADS=pad_heads, PAD_KV_HEADS=triton.next_power_of_2(num_kv_heads), PAD_DIM=pad_dim,
        NORM=norms is not None, num_warps=min(8, max(1, pad_heads * pad_dim // 256)))
    return q


@triton.jit
def store_kernel(k_ptr, v_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, k_token_stride, v_token_stride, k_head_stride,
                 v_head_stride, slot_stride, kv_head_stride, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                 PAD_KV_HEADS: tl.constexpr, PAD_DIM: tl.constexpr):
    """One program per token. k, v [T, H_kv, D]; slots [T]; caches [num_slots, H_kv, D]."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        heads, dims = tl.arange(0, PAD_KV_HEADS)[:, None], tl.arange(0, PAD_DIM)[None, :]
        mask = (heads < NUM_KV_HEADS) & (dims < HEAD_DIM)
        target = slot * slot_stride + heads * kv_head_stride + dims
        k = tl.load(k_ptr + token * k_token_stride + heads * k_head_stride + dims, mask=mask, other=0.0)
        v = tl.load(v_ptr + token * v_token_stride + heads * v_head_stride + dims, mask=mask, other=0.0)
        tl.store(k_cache_ptr + target, k.to(tl.float32).to(k_cache_ptr.dtype.element_ty), mask=mask)
        tl.store(v_cache_ptr + target, v.to(tl.float32).to(v_cache_ptr.dtype.element_ty), mask=mask)


def store_kv(k: Tensor, v: Tensor, slot_mapping: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Write k, v [T, H_kv, D] into the slots of `slot_mapping` [T] int32; slot -1: store nothing.

    k_cache, v_cache [num_slots, H_kv, D] of one layer; another precision than k's is converted to.
    """
    check_rows(k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    assert k_cache.stride() == v_cache.stride()
    num_tokens, num_kv_heads, head_dim = k.shape
    store_kernel[num_tokens,](
        k, v, slot_mapping, k_cache, v_cache, k.stride(0), v.stride(0), k.stride(1), v.stride(1), k_cache.stride(0),
        k_cache.stride(1), NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        PAD_KV_HEADS=triton.next_power_of_2(num_kv_heads), PAD_DIM=triton.next_power_of_2(head_dim), num_warps=2)
