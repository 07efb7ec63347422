"""GPTQ's loop over columns: quantise one, and let the others make up for its error.

For a linear layer y = W x the error is measured on calibration inputs X, so it is weighed by H = X X^T. Quantising
column j by an error e moves the best values of all later columns by -e H⁻¹[j, later] / H⁻¹[j, j]. The Cholesky factor
of H⁻¹ holds what is needed for each j, after the columns before it are fixed.
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

    1. Dead inputs: where H[j, j] = 0, set it to 1 and the weight's column j to 0.
    2. Damping: add `damping` times the mean of H's diagonal to the diagonal.
    3. U = the upper Cholesky factor of H⁻¹ (H⁻¹ = U^T U).
    4. For each column j: q = quantise(w[:, j], j); error = (w[:, j] - q) / U[j, j];
       w[:, j + 1:] -= error outer U[j, j + 1:].

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
