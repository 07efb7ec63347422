"""Random quantised matrices, and what a product with one may differ by from the exact one."""
from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from m7_gptq.grid import QuantizedMatrix
from m7_gptq.kernels.triton.packing import PackedMatrix

_ROUNDING = {torch.float32: 0.0, torch.float16: 2.0 ** -10, torch.bfloat16: 2.0 ** -7}     # the interpreter cuts


@dataclass(frozen=True)
class Kind:
    """What a matrix can be."""

    bits: int = 4
    group: int = 32             # inputs of a group
    zeros: bool = True          # integer zero points, or else minimums
    half: bool = True           # scales and minimums are numbers of float16
    ordered: bool = False


def random_matrix(outputs: int, inputs: int, kind: Kind, seed: int = 0, device: str = "cpu") -> QuantizedMatrix:
    """[outputs, inputs]; `inputs` is a multiple of the group."""
    generator = torch.Generator(device).manual_seed(seed)
    groups = inputs // kind.group

    def codes(*shape: int) -> Tensor:
        return torch.randint(0, 2 ** kind.bits, shape, generator=generator, device=device, dtype=torch.uint8)

    def numbers(low: float, high: float) -> Tensor:
        drawn = torch.rand(outputs, groups, generator=generator, device=device) * (high - low) + low
        return drawn.half().float() if kind.half else drawn

    order = torch.randperm(inputs, generator=generator, device=device) if kind.ordered else None
    return QuantizedMatrix(codes(outputs, inputs), numbers(0.01, 0.1), kind.bits,
                           codes(outputs, groups) if kind.zeros else None,
                           None if kind.zeros else numbers(-1.0, 0.1), order)


def without_memory(outputs: int, inputs: int, kind: Kind) -> PackedMatrix:
    """A packed matrix that has shapes and no memory, for a compiler."""
    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    return PackedMatrix(empty(inputs * kind.bits // 128, outputs, 16, dtype=torch.uint8),
                        empty(inputs // kind.group, outputs, dtype=torch.int32 if kind.half else torch.int64),
                        kind.zeros, empty(inputs, dtype=torch.int64) if kind.ordered else None, kind.bits, kind.group)


def check_product(y: Tensor, x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None,
                  of_sums: float = 2.0 ** -21) -> None:
    """y [M, N] against x W^T + bias in float64: `of_sums`, the part of all that was added up which float32 sums may
    lose, and y's own rounding."""
    values, wide = matrix.dequantise().double(), x.double()
    exact = wide @ values.T + (0.0 if bias is None else bias.double())
    # What the kernel adds up: products with codes less zeros, or products with codes and others with minimums.
    parts = matrix if matrix.zeros is not None else replace(matrix, minimums=matrix.offsets().abs())
    added = wide.abs() @ parts.dequantise().double().abs().T + (0.0 if bias is None else bias.double().abs())
    assert y.shape == exact.shape
    error = (y.double() - exact).abs()
    assert bool((error <= of_sums * added + _ROUNDING[y.dtype] * exact.abs()).all()), float((error / added).max())
