"""An embedding that is the packed output matrix: rows become numbers as they are looked up."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numbers import scale_and_point
from .packing import STRIP, PackedMatrix

_BLOCK = 256


@triton.jit
def lookup_kernel(ids_ptr, strips_ptr, grids_ptr, order_ptr, out_ptr, num_columns, NUM_BYTES: tl.constexpr,
                  BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, ORDERED: tl.constexpr,
                  STRIP: tl.constexpr, BLOCK: tl.constexpr):
    """ids [T] int64; out [T, K]. One program per token and BLOCK of the NUM_BYTES bytes of its codes."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.load(ids_ptr + token)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < NUM_BYTES
    strips, lanes = places // STRIP, places % STRIP
    codes = tl.load(strips_ptr + (strips.to(tl.int64) * num_columns + column) * STRIP + lanes, mask=inside, other=0)
    inputs = strips * (STRIP * 8 // BITS) + lanes
    grid = tl.load(grids_ptr + inputs // GROUP * num_columns + column, mask=inside, other=0)
    scale, point = scale_and_point(grid)
    for half in tl.static_range(8 // BITS):
        code = ((codes >> (half * 4)) & 15 if BITS == 4 else codes).to(tl.float32)
        value = scale * (code - point) if ZEROS else scale * code + point
        targets = inputs + half * STRIP
        if ORDERED:
            targets = tl.load(order_ptr + targets, mask=inside, other=0)
        tl.store(out_ptr + token * (NUM_BYTES * 8 // BITS) + targets, value.to(out_ptr.dtype.element_ty), mask=inside)


def look_up(input_ids: Tensor, packed: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """Rows of the matrix: input_ids [T] int64, contiguous -> [T, K], bit for bit what `dequantise` gives in `dtype`."""
    _, inputs = packed.shape
    num_bytes = inputs * packed.bits // 8
    out = input_ids.new_empty(len(input_ids), inputs, dtype=dtype)
    order = input_ids if packed.order is None else packed.order     # without an order nothing is read through it
    # No product is joined with a sum into one rounding: `dequantise` rounds twice.
    lookup_kernel[len(input_ids), triton.cdiv(num_bytes, _BLOCK)](
        input_ids, packed.strips, packed.grids, order, out, packed.shape[0], NUM_BYTES=num_bytes,
        BITS=packed.bits, GROUP=packed.group_size, ZEROS=packed.has_zeros, ORDERED=packed.order is not None,
        STRIP=STRIP, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False)
    return out
