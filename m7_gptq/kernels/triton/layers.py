"""Layers on packed weights for the GPU, and how they take the places of the readable ones.

    linear      product (+ merge)               one or two launches
    gated       the same; where parts are merged, silu(gate) * up is part of the merge
    embedding   rows of the output matrix, which is there once

T tokens in the step, N outputs, K inputs.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from m4_flash_attn.kernels.layer_kernels import one_by_one
from m4_flash_attn.kernels.triton.elementwise import TritonOps
from m4_flash_attn.layers import GatedLinear, LayerKernels
from m7_gptq.grid import QuantizedMatrix
from m7_gptq.linear import QuantizedLinear

from .lookup import look_up
from .packing import PackedMatrix, can_pack, pack
from .product import multiply


class TritonQuantizedLinear(nn.Module):
    """y = x W^T + b with exact weights and float32 sums. A row is the same bits in any batch."""

    def __init__(self, matrix: QuantizedMatrix | PackedMatrix, bias: Tensor | None, dtype: torch.dtype,
                 out_dtype: torch.dtype | None = None, device: torch.device | str = "cuda") -> None:
        """matrix [N, K], one that `can_pack`, or packed already; bias [N] or None. `dtype`: x's and, unless
        `out_dtype` is another, y's."""
        super().__init__()
        device = torch.device(device)
        self.packed = matrix if isinstance(matrix, PackedMatrix) else pack(matrix, device)
        self.bias = None if bias is None else bias.detach().to(device)
        self.dtype, self.out_dtype = dtype, out_dtype or dtype
        self.out_features, self.in_features = self.packed.shape

    @property
    def nbytes(self) -> int:
        """Of the weights in memory."""
        return self.packed.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] of the layer's dtype, rows may be apart -> [T, N]."""
        self._check(x)
        return multiply(x, self.packed, self.bias, self.out_dtype)

    def _check(self, x: Tensor) -> None:
        if x.dtype is not self.dtype or x.dim() != 2 or x.shape[1] != self.in_features:     # a kernel cannot notice
            raise ValueError(f"x is {x.dtype} {list(x.shape)}, not {self.dtype} [T, {self.in_features}]")

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.packed.bits} bits, {self.nbytes:,} bytes"


class TritonQuantizedGatedLinear(nn.Module):
    """silu(gate(x)) * up(x) of one matrix [2 N, K]: the N rows of the gate, then those of up."""

    def __init__(self, gate_up_proj: TritonQuantizedLinear) -> None:
        super().__init__()
        self.gate_up_proj = gate_up_proj

    @property
    def nbytes(self) -> int:
        return self.gate_up_proj.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        linear = self.gate_up_proj
        linear._check(x)
        return multiply(x, linear.packed, linear.bias, linear.out_dtype, gated=True)


class TritonQuantizedEmbedding(nn.Module):
    """Rows of a packed matrix, the output matrix's where both are one."""

    def __init__(self, packed: PackedMatrix, dtype: torch.dtype) -> None:
        """packed [vocabulary, hidden]; `dtype`: the model's."""
        super().__init__()
        self.packed, self.dtype = packed, dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [T] -> [T, hidden]."""
        return look_up(input_ids.contiguous(), self.packed, self.dtype)


def quantized_layer_kernels(device: torch.device) -> LayerKernels:
    """What layers are made of on a GPU. A matrix that cannot be packed, or that is not quantised, stays as it is."""
    ops = TritonOps()

    def linear(layer: nn.Module, out_dtype: torch.dtype | None = None) -> nn.Module:
        if not isinstance(layer, QuantizedLinear) or not can_pack(layer.matrix):
            return layer
        return TritonQuantizedLinear(layer.matrix, layer.bias, layer.dtype, out_dtype, device)

    def gate(layer: nn.Module) -> nn.Module:
        packed = linear(layer)
        if isinstance(packed, TritonQuantizedLinear):
            return TritonQuantizedGatedLinear(packed)
        return GatedLinear(layer, ops)

    return LayerKernels(ops, linear, gate, lambda layer: linear(layer, torch.float32), one_by_one)
