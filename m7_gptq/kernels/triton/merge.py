"""The parts of a product whose inputs were split among programs: added in their order, and gated where asked."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 256              # that a program takes


@triton.jit
def merged(parts_ptr, bias_ptr, row, columns, inside, num_rows, num_columns, num_splits, HAS_BIAS: tl.constexpr):
    """The sum of the parts of some columns, split after split, as one program of the product adds them; float32."""
    total = tl.zeros(columns.shape, tl.float32)
    for split in range(num_splits):
        part = (split * num_rows + row) * num_columns
        total += tl.load(parts_ptr + part + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def merge_kernel(parts_ptr, bias_ptr, out_ptr, num_rows, num_columns, num_splits, HAS_BIAS: tl.constexpr,
                 GATED: tl.constexpr, BLOCK: tl.constexpr):
    """parts [S, M, N] float32 -> out [M, N]; GATED: silu(first half) * second half, [M, N / 2]. A program per row and
    BLOCK columns of the output."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    width = num_columns // 2 if GATED else num_columns
    inside = columns < width
    out = merged(parts_ptr, bias_ptr, row, columns, inside, num_rows, num_columns, num_splits, HAS_BIAS)
    if GATED:
        # Both are rounded, as they are where one kernel writes them and the next one reads them.
        gate = out.to(out_ptr.dtype.element_ty).to(tl.float32)
        up = merged(parts_ptr, bias_ptr, row, width + columns, inside, num_rows, num_columns, num_splits, HAS_BIAS)
        out = gate * tl.sigmoid(gate) * up.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


def merge(parts: Tensor, bias: Tensor | None, out_dtype: torch.dtype, gated: bool) -> Tensor:
    """parts [S, M, N] float32, bias [N] or None -> [M, N] in `out_dtype`; gated, [M, N / 2]."""
    splits, rows, outputs = parts.shape
    width = outputs // 2 if gated else outputs
    out = parts.new_empty(rows, width, dtype=out_dtype)
    merge_kernel[rows, triton.cdiv(width, _COLUMNS)](
        parts, parts if bias is None else bias, out, rows, outputs, splits, HAS_BIAS=bias is not None, GATED=gated,
        BLOCK=_COLUMNS, num_warps=4)
    return out
