"""y = x W^T with W packed: codes become numbers in registers, the tensor cores multiply, the scales come last.

    for each tile of inputs, which lies within one group:
        w = code - zero                     a whole number of at most 255: exact in bfloat16 and float16
        partial = x w^T                     products in the tensor cores, sums in float32
        y += scale * partial                for minimums: w = code, and y += minimum * (sum of x)

So no weight is ever rounded; what is lost lies in the order of float32 sums. The sum over the inputs is cut into splits
whose limits follow from the matrix alone. With few rows each split has a program of its own, for a matrix has too few
outputs to fill a GPU, and `merge` adds what they leave, in order. With many rows one program does all splits of
its tile and adds them in the same order. Both use the same instruction (mma.sync m16n8k16; a tile of 64 rows would get
another on Hopper), so a row is the same bits whatever the batch. Nothing is added by atomics.

M rows of x, N outputs, K inputs, S splits. STRIP and the order of codes: packing.py.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m4_flash_attn.kernels.triton.elementwise import TritonOps
from m4_flash_attn.kernels.triton.launch import check_rows, compute_dtype

from .merge import merge
from .numbers import scale_and_point, whole_number
from .packing import STRIP, PackedMatrix
from .prepare import prepare

_PROGRAMS = 256             # enough for the largest GPUs: two for each multiprocessor
_LEAST_INPUTS = 128         # of a split: fewer, and merging would cost more than the parallelism gains


class Block(NamedTuple):
    """What one program of the product makes, with how many warps, and how many inputs it has under way."""

    rows: int
    outputs: int
    num_warps: int
    inputs_ahead: int
    registers: int | None       # of a thread at most; None: as the assembler finds best


_FEW = Block(16, 64, 4, 512, None)      # the fewest rows of the tensor cores; a decode step reads weights, and waits
_MANY = Block(32, 128, 8, 384, 255)     # a code becomes a number once for 32 rows; unasked, the assembler spills some
_MOST_STAGES = 8


@triton.jit
def add_tile(acc, tile, x_ptrs, sums_ptrs, row_inside, columns, column_inside, strips_ptr, grids_ptr, num_rows,
             num_columns, BITS: tl.constexpr, TILE: tl.constexpr, TILES_PER_GROUP: tl.constexpr,
             ZEROS: tl.constexpr, STRIP: tl.constexpr, COMPUTE: tl.constexpr):
    """acc [BLOCK_M, BLOCK_N] plus the product over the inputs [tile * TILE, (tile + 1) * TILE)."""
    # 1. The codes: byte `lane` of some strips, in one run of memory for all columns. Past the last column there is no
    #    memory of this matrix. 64 bits, because a large matrix has more than 2^31 bytes.
    HALF: tl.constexpr = TILE * BITS // 8
    lanes = tl.arange(0, HALF) % STRIP
    strips = tile * (HALF // STRIP) + tl.arange(0, HALF) // STRIP
    offsets = strips.to(tl.int64)[:, None] * num_columns * STRIP + columns[None, :] * STRIP + lanes[:, None]
    codes = tl.load(strips_ptr + offsets, mask=column_inside[None, :], other=0)

    # 2. Scale and point of the tile's group.
    grid = tl.load(grids_ptr + tile // TILES_PER_GROUP * num_columns + columns, mask=column_inside, other=0)
    scale, point = scale_and_point(grid)
    zero = point[None, :] if ZEROS else tl.zeros([1, 1], tl.float32)

    # 3. The inputs that belong to low halves, and to high ones. A byte of 8 bits is a low half.
    inputs = strips * (STRIP * 8 // BITS) + lanes
    x = tl.load(x_ptrs + inputs[None, :], mask=row_inside[:, None], other=0.0).to(COMPUTE)
    low = codes & 15 if BITS == 4 else codes
    partial = tl.dot(x, whole_number(low, zero, BITS, COMPUTE), input_precision="ieee")
    if BITS == 4:
        x = tl.load(x_ptrs + inputs[None, :] + STRIP, mask=row_inside[:, None], other=0.0).to(COMPUTE)
        partial = tl.dot(x, whole_number(codes >> 4, zero, BITS, COMPUTE), partial, input_precision="ieee")

    # 4. One rounding each, written down: a compiler may or may not join a product and a sum.
    acc = tl.fma(partial, tl.broadcast_to(scale[None, :], acc.shape), acc)
    if not ZEROS:
        sums = tl.load(sums_ptrs + tile * num_rows, mask=row_inside, other=0.0)
        acc = tl.fma(tl.broadcast_to(sums[:, None], acc.shape), tl.broadcast_to(point[None, :], acc.shape), acc)
    return acc


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "tiles_per_split", "num_splits"])
def product_kernel(x_ptr, sums_ptr, strips_ptr, grids_ptr, bias_ptr, out_ptr, num_rows, num_columns,
                   x_stride, num_tiles, tiles_per_split, num_splits, BITS: tl.constexpr, TILE: tl.constexpr,
                   TILES_PER_GROUP: tl.constexpr, ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, MERGED: tl.constexpr,
                   STRIP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COMPUTE: tl.constexpr,
                   NUM_STAGES: tl.constexpr):
    """x [M, K] and its sums [tiles, M]; strips and grids of a `PackedMatrix`; bias [N].

    out [S, M, N]: the float32 parts that `merge` adds, a program for each; the result [M, N] where not MERGED.
    Programs that share a tile of weights stand side by side, so that all but one find it in the cache.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, column_inside = rows < num_rows, columns < num_columns
    x_ptrs = x_ptr + rows[:, None] * x_stride
    first = tl.program_id(2) if MERGED else 0
    stop = first + 1 if MERGED else num_splits
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for split in range(first, stop):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        stop_tile = tl.minimum((split + 1) * tiles_per_split, num_tiles)
        for tile in tl.range(split * tiles_per_split, stop_tile, num_stages=NUM_STAGES):
            acc = add_tile(acc, tile, x_ptrs, sums_ptr + rows, row_inside, columns, column_inside, strips_ptr,
                           grids_ptr, num_rows, num_columns, BITS, TILE, TILES_PER_GROUP, ZEROS, STRIP,
                           COMPUTE)
        total += acc
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    if MERGED:
        rows += tl.program_id(2).to(tl.int64) * num_rows
    tl.store(out_ptr + rows[:, None] * num_columns + columns[None, :], total.to(out_ptr.dtype.element_ty),
             mask=row_inside[:, None] & column_inside[None, :])


def tile_inputs(packed: PackedMatrix, dtype: torch.dtype) -> int:
    """Inputs of a tile: as many as fit into registers, all of one group."""
    most = 128 if dtype.itemsize == 2 else 32
    while packed.group_size % most:
        most //= 2
    return most


def tiles_per_split(packed: PackedMatrix, tile: int) -> int:
    """Tiles that are added up before they meet others. By the matrix alone: the rows do not come into it."""
    outputs, inputs = packed.shape
    wanted = triton.cdiv(_PROGRAMS, triton.cdiv(outputs, _FEW.outputs))
    most = max(1, min(wanted, inputs // _LEAST_INPUTS))
    return triton.cdiv(inputs // tile, most)


def multiply(x: Tensor, packed: PackedMatrix, bias: Tensor | None, out_dtype: torch.dtype,
             gated: bool = False, programs: int = _PROGRAMS) -> Tensor:
    """x [M, K] -> [M, N] in `out_dtype`; gated, silu(first half) * second half of that, [M, N / 2].

    Rows of x may be apart. Splits get programs of their own where there would be fewer than `programs` without.
    """
    check_rows(x=x)
    rows, (outputs, inputs) = x.shape[0], packed.shape
    tile = tile_inputs(packed, x.dtype)
    x, sums = prepare(x, packed, tile)
    num_tiles, per_split = inputs // tile, tiles_per_split(packed, tile)
    splits = triton.cdiv(num_tiles, per_split)
    block = _FEW if rows <= _FEW.rows or x.dtype is torch.float32 else _MANY    # float32 is not for tensor cores
    tiles_of_out = triton.cdiv(rows, block.rows), triton.cdiv(outputs, block.outputs)
    split = splits > 1 and tiles_of_out[0] * tiles_of_out[1] < programs
    product = (x.new_empty(splits, rows, outputs, dtype=torch.float32) if split
               else x.new_empty(rows, outputs, dtype=out_dtype))
    product_kernel[*tiles_of_out, splits if split else 1](
        x, sums, packed.strips, packed.grids, x if bias is None else bias, product, rows, outputs, x.stride(0),
        num_tiles, per_split, splits, BITS=packed.bits, TILE=tile, TILES_PER_GROUP=packed.group_size // tile,
        ZEROS=packed.has_zeros, HAS_BIAS=bias is not None and not split, MERGED=split, STRIP=STRIP,
        BLOCK_M=block.rows, BLOCK_N=block.outputs, COMPUTE=compute_dtype(x.dtype), num_warps=block.num_warps,
        NUM_STAGES=min(_MOST_STAGES, block.inputs_ahead // tile), maxnreg=block.registers)
    if split:
        return merge(product, bias, out_dtype, gated)
    return TritonOps().silu_mul(product) if gated else product
