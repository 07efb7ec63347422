"""The order in which the GPU's product reads codes: strips of 16 bytes, one output's beside the next one's.

    strip s   [ output 0: 16 bytes | output 1: 16 bytes | output 2 ... ]        a tile of outputs is one run of memory

    4 bits    byte j of strip s:  input 32 s + j in the low half,  input 32 s + 16 + j in the high half
    8 bits    byte j of strip s:  input 16 s + j

A thread fetches a whole strip by one load of 16 bytes, neighbours fetch neighbours. The low halves of a strip are 16
inputs side by side, and so are the high halves: each half is an operand of the tensor cores, nothing is shuffled.
What else a group needs is one word, fetched ahead like the codes: smaller pieces the GPU does not copy by itself.

N outputs, K inputs, G groups of inputs.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m7_gptq.grid import QuantizedMatrix

STRIP = 16      # bytes of one output that lie together: the longest load there is


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [N, K] on a GPU, in the order of its product."""

    strips: Tensor              # uint8 [K / inputs of a strip, N, STRIP]
    grids: Tensor               # [G, N]: a word holds scale and point; int32, two float16, or int64, two float32
    has_zeros: bool             # what a point is: value = scale * (code - point), or else scale * code + point
    order: Tensor | None        # int64 [K]: the k-th packed input is x's order[k]; None: k
    bits: int                   # of a code in memory: 4 (2 and 3 are stored so) or 8
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        num_strips, outputs, _ = self.strips.shape
        return outputs, num_strips * strip_inputs(self.bits)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.strips, self.grids, self.order) if tensor is not None)


def strip_inputs(bits: int) -> int:
    """Inputs whose codes fill a strip."""
    return STRIP * 8 // bits


def can_pack(matrix: QuantizedMatrix) -> bool:
    """Whether every strip lies within one group."""
    return matrix.group_size % strip_inputs(_stored_bits(matrix)) == 0


def pack(matrix: QuantizedMatrix) -> PackedMatrix:
    """The packed form of a matrix that `can_pack`, on its device. It keeps no tensor of `matrix` but its order."""
    assert can_pack(matrix)
    bits = _stored_bits(matrix)
    strips = matrix.codes.unflatten(1, (-1, strip_inputs(bits)))
    if bits == 4:
        low, high = strips.split(STRIP, dim=2)
        strips = low | high << 4
    points = matrix.offsets() if matrix.zeros is None else matrix.zeros.float()
    grids = torch.stack([matrix.scales, points], dim=2)
    halves = grids.half()
    words = halves.view(torch.int32) if torch.equal(halves.float(), grids) else grids.view(torch.int64)
    return PackedMatrix(_copy(strips.transpose(0, 1)), _copy(words.squeeze(2).t()), matrix.zeros is not None,
                        matrix.order, bits, matrix.group_size)


def _stored_bits(matrix: QuantizedMatrix) -> int:
    return 8 if matrix.bits == 8 else 4


def _copy(tensor: Tensor) -> Tensor:
    """Contiguous, in memory of its own."""
    return tensor.clone(memory_format=torch.contiguous_format)
