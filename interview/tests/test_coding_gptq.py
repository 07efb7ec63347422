"""GPTQ's columns against the update written out with inverses, and against rounding to nearest."""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from interview.coding.gptq_columns import quantise_columns


def example(seed: int, rows: int = 6, columns: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    inputs = mix @ torch.randn(columns, 64, generator=g, dtype=torch.float64)      # inputs that go together
    return torch.randn(rows, columns, generator=g, dtype=torch.float64), inputs @ inputs.T


def grid(column: torch.Tensor, index: int) -> torch.Tensor:
    return torch.round(column * 2) / 2


def with_inverses(weight: torch.Tensor, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The same, from the definition: invert the Hessian of the columns that are left, again for each column."""
    w, columns = weight.clone(), weight.shape[1]
    h = hessian + damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    for j in range(columns):
        inverse = torch.linalg.inv(h[j:, j:])
        quantised = grid(w[:, j], j)
        error = (w[:, j] - quantised) / inverse[0, 0]
        w[:, j] = quantised
        w[:, j + 1:] -= torch.outer(error, inverse[0, 1:])
    return w


class Inversions(TorchDispatchMode):
    """Counts what costs O(n^3): inverses, solutions and factors of matrices. Triangular solutions cost less."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.count += bool(re.search(r"inv|chol|lu_factor|linalg_lu|solve|lstsq|svd|eig|qr", name)
                           and not re.search(r"triangular|cholesky_solve|lu_solve", name))
        return func(*args, **(kwargs or {}))


def inversions(quantise: Callable[[Tensor, Tensor], Tensor], columns: int) -> int:
    weight, hessian = example(0, columns=columns)
    with Inversions() as seen:
        quantise(weight, hessian)
    return seen.count


def test_no_matrix_is_inverted_for_each_column() -> None:
    def mine(weight: Tensor, hessian: Tensor) -> Tensor:
        return quantise_columns(weight, hessian, grid)
    assert inversions(mine, 4) == inversions(mine, 16)
    assert inversions(lambda weight, hessian: with_inverses(weight, hessian, 0.01), 16) == 16     # it would be noticed


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_update_with_inverses(seed: int) -> None:
    weight, hessian = example(seed)
    before = weight.clone(), hessian.clone()
    got = quantise_columns(weight, hessian, grid)
    assert torch.allclose(got, with_inverses(weight, hessian, 0.01))
    assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])


def test_better_than_rounding_on_the_inputs_it_was_made_for() -> None:
    def error(seed: int, gptq: bool) -> float:
        weight, hessian = example(seed)
        difference = weight - (quantise_columns(weight, hessian, grid) if gptq else grid(weight, 0))
        return float((difference @ hessian * difference).sum())
    better = [error(seed, True) < error(seed, False) for seed in range(20)]
    assert sum(better) >= 19


def test_the_index_of_the_column_is_passed_on() -> None:
    weight, hessian = example(0)
    seen: list[int] = []
    quantise_columns(weight, hessian, lambda column, index: (seen.append(index), grid(column, index))[1])
    assert seen == list(range(8))


def test_dead_inputs_become_zero() -> None:
    weight, hessian = example(1)
    hessian[3] = hessian[:, 3] = 0
    got = quantise_columns(weight, hessian, grid)
    assert torch.equal(got[:, 3], torch.zeros(6, dtype=torch.float64))
    alive = [0, 1, 2, 4, 5, 6, 7]
    h = hessian.clone()
    h[3, 3] = 1
    expected = with_inverses(weight.index_fill(1, torch.tensor([3]), 0.0), h, 0.01)
    assert torch.allclose(got[:, alive], expected[:, alive])
