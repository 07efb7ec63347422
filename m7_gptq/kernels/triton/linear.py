"""Layers on packed weights for the GPU, and how they take the places of the readable ones.

    linear      product (+ merge)               one or two launches
    gated       the same; where parts are merged, silu(gate) * up is part of the merge
    embedding   rows of the output matrix, which is there once

T tokens in the step, N outputs, K inputs.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from m4_flash_attn.layers import LayerKernels
from m7_gptq.grid import QuantizedMatrix
from m7_gptq.linear import QuantizedEmbedding, QuantizedLinear

from .lookup import look_up
from .packing import PackedMatrix, can_pack, pack
from .product import multiply


class TritonQuantizedLinear(nn.Module):
    """y = x W^T + b with exact weights and float32 sums. A row is the same bits in any batch."""

    def __init__(self, matrix: QuantizedMatrix | PackedMatrix, bias: Tensor | None, dtype: torch.dtype,
                 out_dtype: torch.dtype | None = None) -> None:
        """matrix [N, K] on the GPU, one that `can_pack` or that is packed; bias [N] or None. `dtype`: x's, and y's
        unless `out_dtype` is another."""
        super().__init__()
        self.packed = matrix if isinstance(matrix, PackedMatrix) else pack(matrix)
        self.bias = None if bias is None else bias.detach()
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


def quantized_layer_kernels(plain: LayerKernels, dtype: torch.dtype) -> LayerKernels:
    """What the layers of a model in `dtype` are made of on a GPU: quantised ones packed, all others as by `plain`.

    A matrix that cannot be packed keeps its readable layer.
    """
    def packed(linear: nn.Module, out_dtype: torch.dtype | None = None) -> TritonQuantizedLinear | None:
        if not isinstance(linear, QuantizedLinear) or not can_pack(linear.matrix):
            return None
        return TritonQuantizedLinear(linear.matrix, linear.bias, dtype, out_dtype)

    def gate(linear: nn.Module) -> nn.Module:
        layer = packed(linear)
        return plain.gate(linear) if layer is None else TritonQuantizedGatedLinear(layer)

    return LayerKernels(plain.ops, lambda linear: packed(linear) or plain.pack(linear), gate,
                        lambda linear: packed(linear, torch.float32) or plain.head(linear), plain.stack)


def pack_embedding(embedding: QuantizedEmbedding, head: nn.Module, is_tied: bool) -> nn.Module:
    """The embedding: over the memory of the packed `head` where both are one matrix, else packed by itself."""
    if is_tied and isinstance(head, TritonQuantizedLinear):
        return TritonQuantizedEmbedding(head.packed, embedding.dtype)
    if not can_pack(embedding.matrix):
        return embedding
    return TritonQuantizedEmbedding(pack(embedding.matrix), embedding.dtype)
