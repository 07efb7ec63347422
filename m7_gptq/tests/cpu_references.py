"""What the CPU kernels are to compute, written again in torch: products with exact and with rounded activations."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from m4_flash_attn.kernels.cpu import bindings
from m4_flash_attn.kernels.cpu import linear as plain_linear
from m4_flash_attn.tests.cpu_variants import VARIANTS, variant_library
from m7_gptq.grid import QuantizedMatrix
from m7_gptq.kernels.cpu import linear
from m7_gptq.kernels.packed import pieces_of
from m7_gptq.tests.cpu_tiers import tier_library
from m7_gptq.tests.random_matrices import Kind, random_matrix

HALF_UNIT = {torch.float32: 2.0 ** -24, torch.bfloat16: 2.0 ** -8}       # in the last of 24 and of 8 bits
_PLAIN = {"avx512_bf16": "native", "avx512": "avx512", "avx_vnni": "avx2", "avx2": "avx2", "plain": "sse2"}


@contextmanager
def compiled_for(tier: str) -> Iterator[None]:
    """All CPU kernels, m4's as well, as they are compiled for a tier."""
    variant = _PLAIN.get(tier, "native")
    assert variant in VARIANTS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "library", lambda: tier_library(tier))
        for module in (bindings, plain_linear):
            patch.setattr(module, "library", lambda: variant_library(variant))
        plain_linear.choose.cache_clear()
        yield
    plain_linear.choose.cache_clear()


def make_matrix(outputs: int, inputs: int, kind: Kind, same_zero: bool = False, seed: int = 0) -> QuantizedMatrix:
    """A random matrix; with `same_zero` its zero points are the middle of the codes, as a symmetric one's are."""
    matrix = random_matrix(outputs, inputs, kind, seed)
    if same_zero and matrix.zeros is not None:
        matrix = replace(matrix, zeros=torch.full_like(matrix.zeros, 2 ** (kind.bits - 1)))
    return matrix


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rounded(x: Tensor, matrix: QuantizedMatrix) -> Tensor:
    """What x [T, K] stands for once it is quantised: 8 bits, a scale per row and group of the matrix, float64.

    A group is the matrix's own, or a piece of it where that is long.
    """
    order = torch.arange(matrix.shape[1]) if matrix.order is None else matrix.order
    _, piece = pieces_of(matrix.group_size)
    out = torch.empty(x.shape, dtype=torch.float64)
    for first in range(0, matrix.shape[1], matrix.group_size):
        for part in order[first:first + matrix.group_size].split(piece):
            group = x[:, part].float()
            most = group.abs().amax(1, keepdim=True)
            codes = (group * (torch.tensor(127.0) / most).where(most > 0, 0.0)).round()
            out[:, part] = (codes * (most * torch.tensor(1 / 127.0))).double()
    return out


def exact_product(x: Tensor, matrix: QuantizedMatrix, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x W^T + b in float64, and the sum of the magnitudes that a kernel adds up for it; x may be float64."""
    values, wide = matrix.dequantise().double(), x.double()
    ours = replace(matrix, zeros=None, minimums=matrix.offsets().abs()).dequantise().double()
    y, magnitude = wide @ values.T, wide.abs() @ ours.T
    return (y, magnitude) if bias is None else (y + bias.double(), magnitude + bias.double().abs())


def assert_rounds_to(y: Tensor, expected: tuple[Tensor, Tensor], depth: int) -> None:
    """y within what rounding allows: of each product and sum in fp32, and of the result in y's type."""
    want, magnitude = expected
    allowed = (depth + 8) * 2.0 ** -24 * magnitude + 1.001 * HALF_UNIT[y.dtype] * want.abs() + 1e-30
    assert y.shape == want.shape
    assert bool(((y.double() - want).abs() <= allowed).all())
