"""A quantised matrix in the order in which the CPU kernels read it, and how many bytes that takes.

    panel of `panel` outputs:   scales [G, panel] | offsets [G, panel] | codes

Scales take two bytes where fp16 holds them exactly, offsets a byte where they are zero points and none where all zero
points are one number. So 4 bits in groups of 64 are 4.375 bits a weight, with one zero point 4.25. cpu/packed.hpp has
the same layout, and says why.

N outputs, K inputs, G groups; `places`: inputs, and what fills groups up to a multiple of 8.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from m4_flash_attn.kernels.cpu.linear import interleave

from ..grid import QuantizedMatrix

MAX_GROUP = 128             # places that share a scale in the kernels: longer groups are cut, with the scale repeated
STEP = 8                    # places that are read together
_LINE = 64                  # bytes of a cache line: every part of a panel begins on one
_BYTES_OF_LANE = [0, 2, 1, 3]       # which of four neighbours each byte of 32 bits holds


class Offsets(IntEnum):
    """How what a code of 0 is worth is stored: the bytes per group and output."""

    SAME_ZERO = 0           # one zero point for the whole matrix
    ZEROS = 1
    HALF_MINIMUMS = 2       # fp16
    MINIMUMS = 4            # fp32


@dataclass(frozen=True)
class PackedMatrix:
    """What `struct Weights` of cpu/packed.hpp points to, and what it says about it."""

    packed: Tensor          # uint8 [panels, bytes of a panel]
    order: Tensor | None    # int32 [places]: the input at each, -1 where there is none; None: place k is input k
    columns: int            # outputs; of a gated matrix those of one half
    depth: int              # K
    inner: int              # places
    group: int              # places that share a scale
    bits: int               # of a code in memory: 4 or 8
    scale_bytes: int        # 2 or 4
    offsets: Offsets
    zero: int               # the zero point, where it is the same for all

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + (0 if self.order is None else self.order.nbytes)


def pack(matrix: QuantizedMatrix, panel: int, gated: bool = False) -> PackedMatrix:
    """The matrix [N, K] for panels of `panel` outputs; no value changes.

    gated: the matrix is [2 N, K], gate above up, and each panel is to hold as many outputs of both. Raises ValueError
    where a scale is not a finite number.
    """
    columns, depth = matrix.shape[0] // (2 if gated else 1), matrix.shape[1]
    if not all(x is None or bool(x.isfinite().all()) for x in (matrix.scales, matrix.minimums)):
        raise ValueError("a scale or a minimum of the matrix is infinite or NaN")
    offsets, zero = offsets_of(matrix), 0
    if offsets is Offsets.SAME_ZERO:
        assert matrix.zeros is not None
        zero = int(matrix.zeros.view(-1)[0])
    if gated:
        matrix = _by_turns(matrix, panel // 2)
    pieces, piece = pieces_of(matrix.group_size)
    codes, order = _fill_groups(matrix, pieces * piece)
    bits = stored_bits(matrix.bits)
    size = scale_bytes_of(matrix)
    parts = [_grid(matrix.scales.half() if size == 2 else matrix.scales, pieces, panel)]
    if offsets is Offsets.ZEROS:
        parts.append(_grid(matrix.zeros, pieces, panel))
    elif offsets is not Offsets.SAME_ZERO and matrix.minimums is not None:
        halves = offsets is Offsets.HALF_MINIMUMS
        parts.append(_grid(matrix.minimums.half() if halves else matrix.minimums, pieces, panel))
    parts.append(_codes(codes, bits, panel))
    packed = torch.cat([F.pad(part, (0, -part.shape[1] % _LINE)) for part in parts], 1)
    return PackedMatrix(packed, order, columns, depth, codes.shape[1], piece, bits, size, offsets, zero)


def packed_bytes(columns: int, depth: int, group_size: int, bits: int, panel: int, scale_bytes: int = 2,
                 offsets: Offsets = Offsets.ZEROS, ordered: bool = False, gated: bool = False) -> int:
    """Bytes of a matrix [columns, depth] once it is packed. `ordered`: with activation order; `gated`: [2 N, K]."""
    pieces, piece = pieces_of(group_size)
    groups = depth // group_size * pieces
    inner = groups * piece
    panels = _panels_of(columns // 2, panel // 2) if gated else _panels_of(columns, panel)

    def lines(num_bytes: int) -> int:
        return -(-num_bytes // _LINE) * _LINE

    of_panel = (lines(groups * panel * scale_bytes) + lines(groups * panel * offsets)
                + lines(inner * panel * stored_bits(bits) // 8))
    return panels * of_panel + (4 * inner if ordered or pieces * piece != group_size else 0)


def pieces_of(group_size: int) -> tuple[int, int]:
    """How a group is laid out: (pieces, places of a piece). A piece has its own scale, and 8 n places, at most 128."""
    fewest = -(-group_size // MAX_GROUP)
    for pieces in range(fewest, 2 * fewest + 1):
        if group_size % (pieces * STEP) == 0:
            return pieces, group_size // pieces
    piece = -(-group_size // fewest)
    return fewest, -(-piece // STEP) * STEP             # the last places stay empty


def stored_bits(bits: int) -> int:
    """Of a code in memory: codes of 2 and 3 bits are kept as 4."""
    return 4 if bits <= 4 else 8


def scale_bytes_of(matrix: QuantizedMatrix) -> int:
    return 2 if _is_half(matrix.scales) else 4


def offsets_of(matrix: QuantizedMatrix) -> Offsets:
    if matrix.minimums is not None:
        return Offsets.HALF_MINIMUMS if _is_half(matrix.minimums) else Offsets.MINIMUMS
    assert matrix.zeros is not None
    return Offsets.SAME_ZERO if bool((matrix.zeros == matrix.zeros.view(-1)[0]).all()) else Offsets.ZEROS


def _panels_of(columns: int, panel: int) -> int:
    return -(-columns // panel)


def _is_half(x: Tensor) -> bool:
    """Whether fp16 holds every number."""
    return bool((x.half().float() == x).all())


def _by_turns(matrix: QuantizedMatrix, width: int) -> QuantizedMatrix:
    """`width` outputs of the gate, as many of up, and so on."""
    def turned(x: Tensor) -> Tensor:
        return interleave(x, width)

    return replace(matrix, codes=turned(matrix.codes), scales=turned(matrix.scales),
                   zeros=None if matrix.zeros is None else turned(matrix.zeros),
                   minimums=None if matrix.minimums is None else turned(matrix.minimums))


def _fill_groups(matrix: QuantizedMatrix, places: int) -> tuple[Tensor, Tensor | None]:
    """The codes [N, G * places], and which input each place holds."""
    codes, order, empty = matrix.codes, matrix.order, places - matrix.group_size
    if empty:
        codes = F.pad(codes.unflatten(1, (-1, matrix.group_size)), (0, empty)).flatten(1)
        order = torch.arange(matrix.shape[1]) if order is None else order
        order = F.pad(order.view(-1, matrix.group_size), (0, empty), value=-1).flatten()
    return codes, None if order is None else order.int()


def _grid(x: Tensor | None, pieces: int, panel: int) -> Tensor:
    """Numbers [N, G] -> uint8 [panels, bytes of G * pieces rows of `panel` numbers]."""
    assert x is not None
    x = F.pad(x.repeat_interleave(pieces, 1), (0, 0, 0, -x.shape[0] % panel))
    return x.view(-1, panel, x.shape[1]).transpose(1, 2).flatten(1).contiguous().view(torch.uint8)


def _codes(codes: Tensor, bits: int, panel: int) -> Tensor:
    """Codes [N, places] -> uint8 [panels, bytes]: [places / 8 or / 4][2][panel / 2][4], two codes a byte or one."""
    codes = F.pad(codes, (0, 0, 0, -codes.shape[0] % panel))
    lanes = codes.view(-1, panel, codes.shape[1] // 4, 4)[..., _BYTES_OF_LANE]
    if bits == 4:
        lanes = lanes[:, :, 0::2] | (lanes[:, :, 1::2] << 4)
    return lanes.transpose(1, 2).flatten(1).contiguous()
