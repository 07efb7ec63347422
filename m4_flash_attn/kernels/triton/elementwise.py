"""Everything between the matrix products, fused: each tensor is read once and written once.

Unfused, `weight * (x / rms(x))` is five kernels that carry every element through the GPU's memory five times. These
kernels do no arithmetic to speak of: their time is the bytes they move, and, in a decode step, being launched at all.

T tokens in the step. Sums are float32, and what is written is rounded once. PAD_SIZE is the next power of two.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from m4_flash_attn.elementwise import ElementwiseOps

from .launch import check_rows

_BLOCK = 1024


@triton.jit
def add_rms_norm_kernel(x_ptr, addend_ptr, weight_ptr, out_ptr, x_stride, addend_stride, eps, SIZE: tl.constexpr,
                        PAD_SIZE: tl.constexpr, ADD: tl.constexpr):
    """One program per token. x, addend, out [T, SIZE]; weight [SIZE]. x becomes x + addend."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PAD_SIZE)
    inside = columns < SIZE
    x = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(addend_ptr + token * addend_stride + columns, mask=inside, other=0.0).to(tl.float32)
        # The sum is rounded before it is normalised: what is normalised is what later layers will read.
        rounded = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + token * x_stride + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    mean_square = tl.sum(x * x, axis=0) / SIZE
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    out = x * tl.rsqrt(mean_square + eps) * weight
    tl.store(out_ptr + token * SIZE + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program per token and BLOCK columns. gate_up [T, 2 * SIZE], gates first; out [T, SIZE]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    gate = tl.load(gate_up_ptr + token * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + token * stride + SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + token * SIZE + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


class TritonOps(ElementwiseOps):
    """One kernel per operation."""

    def add_rms_norm(self, x: Tensor, addend: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        check_rows(x=x, weight=weight)
        num_tokens, size = x.shape
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        added = x if addend is None else addend         # without an addend nothing is read through its pointer
        check_rows(addend=added)
        pad = triton.next_power_of_2(size)
        add_rms_norm_kernel[num_tokens,](x, added, weight, out, x.stride(0), added.stride(0), eps, SIZE=size,
                                         PAD_SIZE=pad, ADD=addend is not None, num_warps=min(16, max(1, pad // 512)))
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        check_rows(gate_up=gate_up)
        num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(num_tokens, size)
        silu_mul_kernel[num_tokens, triton.cdiv(size, _BLOCK)](gate_up, out, gate_up.stride(0), SIZE=size,
                                                               BLOCK=_BLOCK, num_warps=4)
        return out
