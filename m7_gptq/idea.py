"""The idea of this milestone: 4 bits are enough, if the weights still to be rounded make up for those that were.

    nearest   every weight to the nearest step of its group's scale, each by itself
    GPTQ      input by input; what rounding an input's weights does to the outputs, the later inputs undo

What can be undone is in H = X^T X, how the inputs X go together. Of each input's error e, the weights of input j take
back e * U[i, j], with U the upper Cholesky factor of H^-1: the least squares answer, for all outputs at once.
T tokens, N outputs, K inputs; the weights are [N, K]. Run me: python m7_gptq/idea.py
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP, DAMPING = 32, 0.01


class Grid(NamedTuple):
    """Of one group in each row: value = scale * (code - zero)."""

    scale: Tensor           # [N, 1]
    zero: Tensor            # [N, 1]
    top: int                # the largest code

    def round(self, w: Tensor) -> Tensor:
        """w [N, any] -> the nearest values of the grid."""
        codes = (torch.round(w / self.scale) + self.zero).clamp(0, self.top)    # what is stored: whole numbers
        return self.scale * (codes - self.zero)


def grid_of(w: Tensor, bits: int) -> Grid:
    """The grid that reaches from the smallest to the largest weight of each row of w [N, GROUP]."""
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-8) / (2 ** bits - 1)
    return Grid(scale, torch.round(-low / scale), 2 ** bits - 1)


def nearest(w: Tensor, bits: int) -> Tensor:
    """w [N, K], each weight by itself."""
    return torch.cat([grid_of(group, bits).round(group) for group in w.split(GROUP, dim=1)], dim=1)


def gptq(w: Tensor, x: Tensor, bits: int) -> Tensor:
    """w [N, K], with the inputs x [T, K] that it will meet."""
    w, rounded, h = w.clone(), torch.empty_like(w), x.T @ x
    h = h + DAMPING * h.diagonal().mean() * torch.eye(len(h))
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    for i in range(w.shape[1]):
        if i % GROUP == 0:
            grid = grid_of(w[:, i:i + GROUP], bits)
        rounded[:, i] = grid.round(w[:, i:i + 1])[:, 0]
        error = (w[:, i] - rounded[:, i]) / u[i, i]
        w[:, i + 1:] -= error[:, None] * u[i, i + 1:]                   # the inputs to come take it back
    return rounded


def output_error(w: Tensor, rounded: Tensor, x: Tensor) -> float:
    """Squared error of the outputs, as a share of their own square."""
    return float(((w - rounded) @ x.T).square().sum() / (w @ x.T).square().sum())


if __name__ == "__main__":
    torch.manual_seed(0)
    w, mix = torch.randn(64, 128), torch.randn(24, 128)
    x = torch.randn(1000, 24) @ mix + 0.3 * torch.randn(1000, 128)      # 128 inputs, of which 24 say nearly all
    seen, unseen = x[:500], x[500:]
    for bits in (2, 3, 4):
        by_nearest = output_error(w, nearest(w, bits), unseen)
        by_gptq = output_error(w, gptq(w, seen, bits), unseen)
        print(f"{bits} bits: outputs off by {by_nearest:.2%} (nearest), {by_gptq:.2%} (GPTQ), on unseen inputs")
        assert by_gptq < 0.5 * by_nearest
    alone = torch.randn(1000, 128)                                      # inputs that have nothing to do with each other
    by_nearest, by_gptq = output_error(w, nearest(w, 4), alone), output_error(w, gptq(w, alone, 4), alone)
    print(f"4 bits, unrelated inputs: {by_nearest:.2%} (nearest), {by_gptq:.2%} (GPTQ): nothing can be taken back")
    assert 0.7 * by_nearest < by_gptq < 1.1 * by_nearest
