"""The idea of this milestone: what counts is a layer's output, so the error of one weight can be made good by others.

    inputs x1 = x2, weights 1.4 and 1.4, whole numbers allowed: wanted is 2.8 x
    to the nearest      1 and 1                         2 x
    GPTQ                1; the second becomes 1.8: 2    3 x, nearer, although the second weight is not

Which inputs go together is seen on samples: H = X^T X. Weights are whole numbers of few bits, times a scale for each
group of neighbours. N outputs, K inputs, T samples. Run me: python m7_gptq/idea.py
"""
from __future__ import annotations

import torch
from torch import Tensor

BITS, GROUP, DAMPING = 3, 16, 0.05
TOP = 2 ** BITS - 1


def grid(w: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of a group [N, GROUP] -> step and code of 0, [N, 1] each: from the smallest weight to the largest."""
    low, high = w.amin(1, keepdim=True).clamp(max=0), w.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / TOP).half().to(w.dtype).clamp(min=2 ** -24)
    return scale, (-low / scale).round().clamp(0, TOP)


def on_grid(w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest values that the grid has. Stored are the codes: whole numbers from 0 to TOP."""
    codes = ((w / scale).round() + zero).clamp(0, TOP)
    return scale * (codes - zero)


def nearest(weight: Tensor) -> Tensor:
    """Every weight by itself."""
    return torch.cat([on_grid(w, *grid(w)) for w in weight.split(GROUP, dim=1)], dim=1)


def gptq(weight: Tensor, inputs: Tensor) -> Tensor:
    """weight [N, K], inputs [T, K] -> [N, K] on the grid, with outputs nearer to `inputs @ weight.T`."""
    w, h = weight.double().clone(), 2 / len(inputs) * inputs.T.double() @ inputs.double()
    h.diagonal().add_(DAMPING * h.diagonal().mean())        # samples never tell everything: trust them a little less
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    rounded = torch.empty_like(w)
    for i in range(w.shape[1]):
        if i % GROUP == 0:
            scale, zero = grid(w[:, i:i + GROUP])           # of the weights as they are by now
        rounded[:, i:i + 1] = on_grid(w[:, i:i + 1], scale, zero)
        error = (w[:, i] - rounded[:, i]) / u[i, i]
        w[:, i:] -= torch.outer(error, u[i, i:])            # column i is done, those behind it make up for it
    return rounded.to(weight.dtype)


def output_error(weight: Tensor, rounded: Tensor, inputs: Tensor) -> float:
    """Squared error of the outputs, as a share of their own square."""
    wanted = inputs @ weight.T
    return float((inputs @ rounded.T - wanted).square().sum() / wanted.square().sum())


if __name__ == "__main__":
    torch.manual_seed(0)
    mix = torch.randn(8, 64)                                # 64 inputs that are mixtures of 8 things: they go together
    samples, unseen = (torch.randn(512, 8) @ mix + 0.5 * torch.randn(512, 64) for _ in range(2))
    weight = torch.randn(32, 64)
    for name, rounded in (("to the nearest", nearest(weight)), ("GPTQ", gptq(weight, samples))):
        print(f"{name:15} weights off by {100 * float((rounded - weight).norm() / weight.norm()):.0f} %, "
              f"outputs for unseen inputs by {100 * output_error(weight, rounded, unseen) ** 0.5:.1f} %")
    assert output_error(weight, gptq(weight, samples), unseen) < output_error(weight, nearest(weight), unseen) / 4
    assert (gptq(weight, samples) - weight).norm() > (nearest(weight) - weight).norm()
    # Inputs that have nothing to do with each other leave nothing to make up for: then the nearest is the best.
    assert torch.equal(gptq(weight, torch.eye(64)), nearest(weight))
