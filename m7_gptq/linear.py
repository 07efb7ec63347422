"""A linear layer on quantised weights, readable: dequantise, then multiply. The kernels are held equal to it."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grid import QuantizedMatrix


class QuantizedLinear(nn.Module):
    """y = x W^T + b, with W on its grid. What loading makes; `fuse_packed` exchanges it for a kernel."""

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype) -> None:
        """bias [N] or None; `dtype`: the model's, of x and y."""
        super().__init__()
        self.matrix, self.bias, self.dtype = matrix, bias, dtype
        self.out_features, self.in_features = matrix.shape

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N], the product in float32: no weight is rounded again."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.matrix.dequantise().to(x.device), bias).to(self.dtype)


class QuantizedEmbedding(nn.Module):
    """Rows of a quantised matrix, dequantised as they are looked up."""

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        """matrix [vocabulary, hidden]; `dtype`: the model's."""
        super().__init__()
        self.matrix, self.dtype = matrix, dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids [T] -> [T, hidden]."""
        matrix = self.matrix
        picked = QuantizedMatrix(
            matrix.codes[input_ids], matrix.scales[input_ids], matrix.bits,
            None if matrix.zeros is None else matrix.zeros[input_ids],
            None if matrix.minimums is None else matrix.minimums[input_ids], matrix.order)
        return picked.dequantise().to(self.dtype)
