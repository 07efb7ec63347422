"""Where grids come from, and rounding to the nearest point of them: what every method of quantising builds on.

    min/max   the grid spans the group's smallest and largest weight: nothing is clipped
    search    narrower spans are tried as well: clipping one outlier may serve the other weights of its group

Rounding to nearest ("RTN") then takes each weight by itself. It needs no text and no second look: the baseline.
N outputs, K inputs, g inputs of a group. Here matrices are transposed, [K, N]: a column of W is one stretch of memory.
"""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from m0_basics.config import ConfigError, check_int, option, reject

from .grid import BITS, QuantizedMatrix

METHODS = ("gptq", "rtn")
_SMALLEST_SCALE, _LARGEST = 2.0 ** -24, 65504.0             # of fp16, in which folders keep scales
_SPANS = tuple(1.0 - 0.025 * i for i in range(25))          # 1.0 ... 0.4 of the range between smallest and largest
_ROWS = 2048                                # worked on at once: a group of them stays in the core's cache


@dataclass(frozen=True)
class QuantizeOptions:
    """What is asked for. The names are GPTQModel's where it has one; the defaults are those that measured best."""

    bits: int = option(4, "bits of a weight: 2, 3, 4 or 8")
    group_size: int = option(64, "inputs that share a scale and a zero point; -1: all inputs of a row")
    sym: bool = option(False, "symmetric: the zero point is the middle of the codes")
    method: str = option("gptq", "gptq, or rtn: round to nearest")
    search: bool = option(True, "search the span of each grid, instead of taking smallest and largest weight")
    desc_act: bool = option(True, "quantise the inputs with the largest activations first")
    act_group_aware: bool = option(True, "with desc_act: reorder whole groups, and inputs within a group, so that the "
                                         "finished matrix has no order of its own; else groups are made in that order")
    damp_percent: float = option(0.05, "added to the Hessian's diagonal, as a share of its mean")
    sink: float = option(0.1, "weight of the first token's own Hessian for q, k and v: the attention sink; 0: none")
    gptaq: float = option(0.5, "share of the earlier layers' error that a layer is asked to undo, 0 to 1 (GPTAQ)")
    lm_head: bool = option(True, "quantise the output matrix too, and the embedding with it where they are one")

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise reject("bits", self.bits, ", ".join(map(str, BITS)))
        if self.group_size != -1:
            check_int("group_size", self.group_size, 1)
        if self.method not in METHODS:
            raise reject("method", self.method, ", ".join(METHODS))
        for name, highest in (("damp_percent", 10.0), ("sink", 100.0), ("gptaq", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= highest:
                raise reject(name, value, f"a number from 0 to {highest:g}")

    def group_of(self, num_inputs: int) -> int:
        """Inputs of a group in a matrix of `num_inputs`. Raises ConfigError where they do not divide."""
        size = num_inputs if self.group_size == -1 else self.group_size
        if num_inputs % size:
            raise reject("group_size", size, f"-1, or a divisor of the matrix's {num_inputs} inputs")
        return size


class Grid(NamedTuple):
    """Of one group in each row: value = scale * (code - zero)."""

    scale: Tensor           # [N], each a number of fp16
    zero: Tensor            # [N], whole numbers 0 .. 2^bits - 1, as float32

    def codes(self, w: Tensor, bits: int) -> Tensor:
        """The nearest codes of w [..., N], as float32."""
        return (w / self.scale).round_().add_(self.zero).clamp_(0, 2 ** bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [..., N] are worth."""
        return (codes - self.zero).mul_(self.scale)


def spanning_grid(low: Tensor, high: Tensor, bits: int, sym: bool) -> Grid:
    """The grid over [low, high] of each row (low <= 0 <= high, [N] each), its scale rounded to fp16."""
    steps = 2 ** bits - 1
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / steps).half().float().clamp_(_SMALLEST_SCALE, _LARGEST)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else (-low / scale).round_().clamp_(0, steps)
    return Grid(scale, zero)


def find_grid(w: Tensor, options: QuantizeOptions, importance: Tensor | None = None) -> Grid:
    """The grid of one group of weights, w [g, N]; `importance` [g] weighs squared errors (None: alike)."""
    low, high = w.amin(0).clamp_(max=0), w.amax(0).clamp_(min=0)
    best = spanning_grid(low, high, options.bits, options.sym)
    if not options.search:
        return best
    weights = torch.ones(len(w)) if importance is None else importance
    best_error = _error(w, best, options.bits, weights)
    for span in _SPANS[1:]:
        grid = spanning_grid(low * span, high * span, options.bits, options.sym)
        error = _error(w, grid, options.bits, weights)
        better = error < best_error
        best = Grid(torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero))
        best_error = torch.where(better, error, best_error)
    return best


def _error(w: Tensor, grid: Grid, bits: int, weights: Tensor) -> Tensor:
    """Weighted squared error of each row, [N]."""
    return weights @ grid.values(grid.codes(w, bits)).sub_(w).square_()


def round_to_nearest(weight: Tensor, options: QuantizeOptions) -> QuantizedMatrix:
    """`weight` [N, K] float32, each weight to its nearest code. Raises ConfigError for weights that have none."""
    check_weight(weight)
    size = options.group_of(weight.shape[1])

    def rounded(rows: Tensor) -> Rows:
        groups = [(w, find_grid(w, options)) for w in rows.T.contiguous().split(size)]
        codes = torch.cat([grid.codes(w, options.bits) for w, grid in groups])
        return codes, [grid for _, grid in groups]

    return assemble(by_rows(weight, rounded), options.bits)


Rows = tuple[Tensor, list[Grid]]            # of some rows: codes [K, rows], and the grid of each group


def by_rows(weight: Tensor, quantise: Callable[[Tensor], Rows]) -> list[Rows]:
    """`quantise` some rows of `weight` [N, K] after the others: several at a time, each by one thread.

    Rows do not depend on each other, and the operations on them are too small to be shared out one by one.
    """
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(pool.map(quantise, weight.split(_ROWS)))
        finally:
            torch.set_num_threads(num_threads)          # this thread's own number stands; later threads ask for it


def assemble(parts: list[Rows], bits: int, order: Tensor | None = None) -> QuantizedMatrix:
    """A matrix of its rows; `order` as in QuantizedMatrix."""
    codes = torch.cat([codes.to(torch.uint8).T for codes, _ in parts])
    scales = torch.cat([torch.stack([grid.scale for grid in grids], dim=1) for _, grids in parts])
    zeros = torch.cat([torch.stack([grid.zero for grid in grids], dim=1) for _, grids in parts])
    return QuantizedMatrix(codes.contiguous(), scales, bits, zeros.to(torch.uint8), order=order)


def check_weight(weight: Tensor) -> None:
    """Raise ConfigError for weights that no grid holds: NaN, infinity, or beyond what an fp16 scale reaches."""
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError("the weight holds NaN or infinity; allowed: finite numbers")
    if weight.numel() and float(weight.abs().amax()) > _LARGEST:
        raise ConfigError(f"the weight holds {float(weight.abs().amax()):g}; allowed: at most {_LARGEST:g} in size, "
                          "since scales are kept in fp16")
