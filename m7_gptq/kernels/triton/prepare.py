"""What happens to x before a product, once instead of in each of its programs: reordering, and sums for minimums.

    order       the packed inputs are x's in another order: GPTQ's activation order
    sums        scale * code + minimum, times x:  the minimum meets the sum of its group's x, whatever the output

M rows of x, K inputs, in tiles that lie within a group each.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import PackedMatrix

_ELEMENTS = 1024            # that a program takes


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def prepare_kernel(x_ptr, order_ptr, ordered_ptr, sums_ptr, num_rows, num_tiles, x_stride, TILE: tl.constexpr,
                   ORDERED: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """x [M, K] -> its columns in the order of the packed inputs [M, K], and the sums of its tiles [tiles, M] float32.

    One program per row and BLOCK tiles.
    """
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inputs = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = (tiles < num_tiles)[:, None] & (inputs >= 0)
    sources = tl.load(order_ptr + inputs, mask=inside, other=0) if ORDERED else inputs
    x = tl.load(x_ptr + row * x_stride + sources, mask=inside, other=0.0)
    if ORDERED:
        tl.store(ordered_ptr + row * num_tiles * TILE + inputs, x, mask=inside)
    if SUMS:
        tl.store(sums_ptr + tiles * num_rows + row, tl.sum(x.to(tl.float32), axis=1), mask=tiles < num_tiles)


def prepare(x: Tensor, packed: PackedMatrix, tile: int) -> tuple[Tensor, Tensor]:
    """x [M, K] in the packed order, and the sums of its tiles [tiles, M] that minimums are multiplied by.

    One launch for both. Where neither is needed there is none, and x stands for both.
    """
    ordered, sums = x, x
    if packed.order is None and packed.has_zeros:
        return ordered, sums
    (rows, inputs), num_tiles = x.shape, packed.shape[1] // tile
    if packed.order is not None:
        ordered = x.new_empty(rows, inputs)
    if not packed.has_zeros:
        sums = x.new_empty(num_tiles, rows, dtype=torch.float32)
    block = _ELEMENTS // tile
    prepare_kernel[rows, triton.cdiv(num_tiles, block)](
        x, packed.grids if packed.order is None else packed.order, ordered, sums, rows, num_tiles, x.stride(0),
        TILE=tile, ORDERED=packed.order is not None, SUMS=not packed.has_zeros, BLOCK=block, num_warps=4)
    return ordered, sums
