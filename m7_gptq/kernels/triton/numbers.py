"""What packed bits are worth: a group's scale and point, and a code as a number that tensor cores take."""
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_and_point(grid):
    """The two float32 numbers in a word of `PackedMatrix.grids`."""
    if grid.dtype == tl.int32:
        scale = grid.to(tl.int16).to(tl.float16, bitcast=True)
        point = (grid >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        scale = grid.to(tl.int32).to(tl.float32, bitcast=True)
        point = (grid >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return scale.to(tl.float32), point.to(tl.float32)


@triton.jit
def whole_number(codes, zero, BITS: tl.constexpr, COMPUTE: tl.constexpr):
    """codes - zero, exact.

    A code is put into the last bits of a number that is so large that they count ones, and that number is taken away
    with the zero: two cheap instructions, where converting an integer is a slow one.
    """
    if COMPUTE.is_bf16() and BITS == 4:     # 128: the last 7 bits
        return (codes.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - (128.0 + zero).to(tl.bfloat16)
    if COMPUTE.is_fp16():                    # 1024: the last 10 bits
        return (codes.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + zero).to(tl.float16)
    shifted = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)       # 2^23: the last 23 bits
    return (shifted - (8388608.0 + zero)).to(COMPUTE)
