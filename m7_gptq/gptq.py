"""GPTQ: round one input's weights after the other, and let the inputs still to come make up for each error.

    H = 2/n X^T X                      how much the outputs' squared error grows with errors in the weights
    U = the upper Cholesky factor of H^-1
    for each input i:   q_i = nearest(w_i);  e = (w_i - q_i) / U[i, i];  w_j -= e * U[i, j] for all j > i

(Frantar et al., arXiv 2210.17323.) The updates of far inputs are put off until a block of 128 is done. The grid of a
group is found when the group begins, from the weights as they are by then. N outputs, K inputs, G groups.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from m0_basics.config import ConfigError

from .grid import QuantizedMatrix
from .rtn import Grid, QuantizeOptions, Rows, assemble, by_rows, check_weight, find_grid

BLOCK = 128
_ROWS = 4096                                # whose errors are measured at once
_DAMPING_TRIES = 6                          # the last with 10^5 times the damping asked for


class Factor(NamedTuple):
    """What a Hessian says about all matrices that share its inputs."""

    order: Tensor           # int64 [K]: which input comes when
    upper: Tensor           # float32 [K, K] in that order: U with U^T U = H^-1
    damp_percent: float     # what it took
    num_dead: int           # inputs that were never anything but 0


def quantize_matrix(weight: Tensor, hessian: Tensor, options: QuantizeOptions) -> QuantizedMatrix:
    """`weight` [N, K] float32 on its grid, the error under `hessian` [K, K] (float32 or float64) kept small.

    Raises ConfigError for NaN or infinity in either, or where no damping makes the Hessian positive definite.
    """
    return quantize_with(weight, factorise(hessian, options), options)


def factorise(hessian: Tensor, options: QuantizeOptions) -> Factor:
    """The order of the inputs and the factor of the damped inverse. Raises ConfigError as `quantize_matrix` does."""
    if not bool(torch.isfinite(hessian).all()):
        raise ConfigError("the Hessian holds NaN or infinity: a calibration input did; allowed: finite inputs")
    h = hessian.to(torch.float64, copy=True)
    diagonal = h.diagonal().clone()
    dead = diagonal <= 0
    diagonal[dead] = 0
    order = input_order(diagonal, options)
    # A dead input has no say in any output. With 1 on its diagonal it is rounded to nearest, and disturbs nobody.
    h[dead, :] = h[:, dead] = 0
    h[dead, dead] = 1
    h = h[order][:, order]
    mean = float(diagonal.mean()) or 1.0
    damp = options.damp_percent
    for _ in range(_DAMPING_TRIES):
        damped = h + damp * mean * torch.eye(len(h), dtype=h.dtype)
        upper = inverse_factor(damped)
        if upper is not None:
            return Factor(order, upper.float(), damp, int(dead.sum()))
        damp = max(10 * damp, 1e-3)
    raise ConfigError(f"the Hessian is not positive definite, even with damp_percent={damp / 10:g}; "
                      "allowed: 2/n X^T X of some inputs X")


def inverse_factor(h: Tensor) -> Tensor | None:
    """Upper triangular U with U^T U = h^-1; None where h is not positive definite.

    A Cholesky factor taken from the last input to the first gives h = R R^T with R upper triangular: U is R^-1. The
    inverse itself, which loses digits, is never formed.
    """
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if int(failed):
        return None
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(h), dtype=h.dtype), upper=True)
    return upper if bool(torch.isfinite(upper).all()) else None


def input_order(diagonal: Tensor, options: QuantizeOptions) -> Tensor:
    """Which input comes when, int64 [K]: with `desc_act` those of the largest activations first.

    With `act_group_aware` the groups stay what they are: the groups are ordered by their largest input, and the inputs
    within each group.
    """
    if not options.desc_act:
        return torch.arange(len(diagonal))
    if not options.act_group_aware:
        return diagonal.argsort(descending=True, stable=True)
    groups = diagonal.view(-1, options.group_of(len(diagonal)))
    within = groups.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(len(groups)).unsqueeze(1) * groups.shape[1]
    return (first + within)[groups.amax(1).argsort(descending=True, stable=True)].flatten()


def quantize_with(weight: Tensor, factor: Factor, options: QuantizeOptions) -> QuantizedMatrix:
    """`quantize_matrix` with a Hessian's factor at hand. Rows do not depend on each other."""
    check_weight(weight)
    num_inputs = weight.shape[1]
    size = options.group_of(num_inputs)
    parts = by_rows(weight, lambda rows: _quantize_rows(rows[:, factor.order].T.contiguous(), factor.upper, size,
                                                        options))
    if not options.desc_act:
        return assemble(parts, options.bits)
    if not options.act_group_aware:
        return assemble(parts, options.bits, factor.order)
    back = factor.order.argsort()
    groups_back = factor.order[::size].div(size, rounding_mode="floor").argsort().tolist()
    return assemble([(codes[back], [grids[g] for g in groups_back]) for codes, grids in parts], options.bits)


def _quantize_rows(w: Tensor, upper: Tensor, size: int, options: QuantizeOptions) -> Rows:
    """w [K, rows], w[i] the weights of input i -> codes [K, rows] float32, and the grid of each group.

    Block by block: an error reaches later inputs of its block at once, those behind it when the block is done, in one
    matrix product. w is working memory: what it holds afterwards means nothing.
    """
    codes, grids = torch.empty_like(w), list[Grid]()
    importance = upper.diagonal().pow(-2)   # an error of 1 at input i costs 1 / U[i, i]^2, once the rest has made up
    for first in range(0, len(w), BLOCK):
        last = min(first + BLOCK, len(w))
        errors = torch.empty(last - first, w.shape[1])
        for i in range(first, last):
            earlier = errors[:i - first]    # of this block; those of the blocks before are in w
            if i % size == 0:
                group = slice(i, i + size)
                grids.append(find_grid(w[group] - upper[first:i, group].T @ earlier, options, importance[group]))
            wanted = w[i] - upper[first:i, i] @ earlier
            codes[i] = grids[-1].codes(wanted, options.bits)
            errors[i - first] = (wanted - grids[-1].values(codes[i])) / upper[i, i]
        w[last:] -= upper[first:last, last:].T @ errors
    return codes, grids


def output_errors(weight: Tensor, quantized: list[Tensor], hessian: Tensor) -> list[float]:
    """Of each of some versions of `weight` [N, K]: the squared error of the outputs over the calibration tokens, as a
    share of the outputs' own square."""
    h = hessian.float()

    def energy(w: Tensor) -> float:
        return sum(float((part @ h).mul_(part).sum(dtype=torch.float64)) for part in w.split(_ROWS))

    total = energy(weight)
    return [energy(weight - version) / total if total > 0 else 0.0 for version in quantized]
