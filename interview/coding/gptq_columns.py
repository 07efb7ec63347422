"""GPTQ's loop over columns: quantise one, and let the others make up for its error.

For a linear layer y = W x the error that counts is that of the outputs on calibration inputs X: for each row w of W,
rounded to q, it is (w - q) H (w - q)^T with H = X X^T.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def quantise_columns(weight: Tensor, hessian: Tensor, quantise: Callable[[Tensor, int], Tensor],
                     damping: float = 0.01) -> Tensor:
    """GPTQ's quantised weight, dequantised, column by column from the left.

    weight [rows, columns] and hessian [columns, columns] float64; quantise(column [rows], index) -> the nearest
    values of the grid, float64. Returns [rows, columns]. The arguments are not changed.

    Column j is rounded by `quantise` as it stands when its turn comes, and is fixed from then on. Then all columns
    behind it move to where (w - q) H (w - q)^T is smallest, given the columns that are fixed. Work out how far they
    move. All of it is to cost O(columns^3) once, and O(columns^2) for each row: no matrix is inverted for each column.

    Before the first column, an input that was 0 throughout (H[j, j] = 0) gets H[j, j] = 1, and weights of 0; then
    `damping` times the mean of H's diagonal is added to the diagonal.

    Source: Frantar et al., "GPTQ", 2022, algorithm 1 (one block).
    """
    w, h = weight.clone(), hessian.clone()
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    result = torch.zeros_like(w)
    for j in range(w.shape[1]):
        result[:, j] = quantise(w[:, j], j)
        error = (w[:, j] - result[:, j]) / upper[j, j]
        w[:, j + 1:] -= torch.outer(error, upper[j, j + 1:])
    return result
