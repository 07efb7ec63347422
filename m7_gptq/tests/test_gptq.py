"""GPTQ of one matrix, against the textbook's loop in float64, which updates every later input at once."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m0_basics.config import ConfigError
from m7_gptq import gptq
from m7_gptq.gptq import factorise, inverse_factor, output_errors, quantize_matrix
from m7_gptq.rtn import QuantizeOptions, find_grid, round_to_nearest

TEXTBOOK = QuantizeOptions(search=False, desc_act=False, damp_percent=0.01)


def draw(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, inputs of which a few say most, and their Hessian."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(600, width // 4, generator=generator) @ torch.randn(width // 4, width, generator=generator)
    inputs += 0.3 * torch.randn(600, width, generator=generator)
    inputs *= torch.linspace(0.2, 3, width)[torch.randperm(width, generator=generator)]
    return torch.randn(rows, width, generator=generator), inputs, 2 / 600 * inputs.T @ inputs


def textbook(weight: Tensor, hessian: Tensor, options: QuantizeOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros, inputs in the order that they stand in. No blocks, an explicit inverse."""
    w, h = weight.double().clone(), hessian.double()
    h = h + options.damp_percent * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    size, codes, scales, zeros = options.group_of(w.shape[1]), torch.zeros_like(w), [], []
    for i in range(w.shape[1]):
        if i % size == 0:
            grid = find_grid(w[:, i:i + size].float().T, options, u.diagonal()[i:i + size].float().pow(-2))
            scales.append(grid.scale)
            zeros.append(grid.zero)
        codes[:, i] = (torch.round(w[:, i] / grid.scale) + grid.zero).clamp(0, 2 ** options.bits - 1)
        error = (w[:, i] - grid.scale * (codes[:, i] - grid.zero)) / u[i, i]
        w[:, i:] -= torch.outer(error, u[i, i:])
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1)


def same_but_for_ties(mine: Tensor, theirs: Tensor) -> bool:
    """Whether nearly all codes agree: a weight half-way between two may fall either way, and takes others with it."""
    return float((mine.double() == theirs.double()).double().mean()) > 0.97


@pytest.mark.parametrize(("bits", "width", "group_size", "sym", "search"), [
    (4, 256, 64, False, False), (3, 256, 32, False, False), (2, 192, 64, False, True), (8, 192, 96, False, False),
    (4, 160, -1, True, False), (3, 320, 160, True, True)])
def test_same_as_the_textbook(bits: int, width: int, group_size: int, sym: bool, search: bool) -> None:
    """Widths and groups that the blocks of 128 cut in every way."""
    weight, _, hessian = draw(24, width, bits)
    options = replace(TEXTBOOK, bits=bits, group_size=group_size, sym=sym, search=search)
    matrix = quantize_matrix(weight, hessian, options)
    codes, scales, zeros = textbook(weight, hessian, options)
    assert matrix.order is None and matrix.group_size == options.group_of(width)
    assert same_but_for_ties(matrix.codes, codes)
    assert same_but_for_ties(matrix.zeros, zeros)
    # The first row of the first group meets no accumulated rounding at all.
    assert torch.equal(matrix.scales[:, 0], scales[:, 0]) and torch.equal(matrix.codes[:, 0].double(), codes[:, 0])


class _Written(TorchDispatchMode):
    """Counts the numbers that are computed; looking at a part of a tensor is none."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        if isinstance(out, Tensor) and (alias is None or alias.is_write):
            self.count += out.numel()
        return out


def test_inputs_behind_a_block_are_brought_up_to_date_once() -> None:
    """Eight blocks: after each input it would be more than a thousand numbers for each weight, not some dozens."""
    weight, _, hessian = draw(4, 1024)
    factor = factorise(hessian, TEXTBOOK)
    with _Written() as written:                 # in this thread: `quantize_with` may use others
        gptq._quantize_rows(weight.T.contiguous(), factor.upper, 64, TEXTBOOK)
    assert written.count < 60 * weight.numel()


def test_activation_order_is_the_textbook_on_permuted_inputs() -> None:
    weight, _, hessian = draw(16, 192)
    matrix = quantize_matrix(weight, hessian, replace(TEXTBOOK, desc_act=True, act_group_aware=False))
    order = hessian.diagonal().argsort(descending=True)
    assert torch.equal(matrix.order, order)
    codes, _, _ = textbook(weight[:, order], hessian[order][:, order], TEXTBOOK)
    assert same_but_for_ties(matrix.codes, codes)
    torch.testing.assert_close(matrix.dequantise()[:, order], replace(matrix, order=None).dequantise())


def test_group_aware_order_moves_whole_groups_and_leaves_none_behind() -> None:
    weight, _, hessian = draw(16, 192)
    options = replace(TEXTBOOK, desc_act=True, act_group_aware=True)
    matrix = quantize_matrix(weight, hessian, options)
    assert matrix.order is None
    order = factorise(hessian, options).order
    groups = (order // 64).view(-1, 64)
    assert bool((groups == groups[:, :1]).all()) and sorted(groups[:, 0].tolist()) == [0, 1, 2]
    assert hessian.diagonal()[order[0]] == hessian.diagonal().max()
    plain = quantize_matrix(weight[:, order], hessian[order][:, order], TEXTBOOK)
    torch.testing.assert_close(matrix.dequantise()[:, order], plain.dequantise())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_come_out_better_than_by_rounding_to_nearest(bits: int) -> None:
    weight, inputs, hessian = draw(48, 256, 7)
    for options in (TEXTBOOK, replace(TEXTBOOK, desc_act=True, act_group_aware=False), QuantizeOptions(),
                    QuantizeOptions(act_group_aware=False), replace(TEXTBOOK, sym=True)):
        options = replace(options, bits=bits, group_size=64)
        outputs = inputs @ weight.T
        mine, nearest = ((inputs @ m.dequantise().T - outputs).square().sum() for m in (
            quantize_matrix(weight, hessian, options), round_to_nearest(weight, options)))
        assert float(mine) < 0.5 * float(nearest), options


def test_unrelated_inputs_are_rounded_to_nearest() -> None:
    """A diagonal Hessian leaves nothing that another input could make up for."""
    weight = torch.randn(8, 128)
    hessian = torch.diag(torch.rand(128) + 0.5)
    matrix, nearest = quantize_matrix(weight, hessian, TEXTBOOK), round_to_nearest(weight, TEXTBOOK)
    assert torch.equal(matrix.codes, nearest.codes) and torch.equal(matrix.scales, nearest.scales)


def test_rows_do_not_depend_on_each_other() -> None:
    weight, _, hessian = draw(4500, 64)
    options = QuantizeOptions(group_size=32, act_group_aware=False)
    whole = quantize_matrix(weight, hessian, options)
    part = quantize_matrix(weight[3000:3016], hessian, options)
    assert same_but_for_ties(whole.codes[3000:3016], part.codes)
    assert torch.equal(whole.order, part.order)


def test_the_factor_is_that_of_the_inverse() -> None:
    _, _, hessian = draw(1, 96)
    hessian = (hessian + hessian.T).double() + torch.eye(96)
    upper = inverse_factor(hessian)
    assert upper is not None and torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(hessian))
    assert inverse_factor(-hessian) is None


def test_dead_inputs_are_rounded_to_nearest_and_disturb_nobody() -> None:
    weight, _, hessian = draw(16, 128)
    dead = torch.tensor([0, 31, 64, 65, 127, *range(32, 64)])          # one whole group of 32 among them
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    before = hessian.clone()
    for options in (TEXTBOOK, QuantizeOptions()):
        options = replace(options, group_size=32)
        assert factorise(hessian, options).num_dead == len(dead)
        matrix = quantize_matrix(weight, hessian, options)
        assert bool(torch.isfinite(matrix.scales).all())
        whole = slice(32, 64)               # no input of this group is alive: rounding has nothing to make up for
        nearest = round_to_nearest(weight, options).dequantise()
        error, least = ((w - weight)[:, whole].abs().mean() for w in (matrix.dequantise(), nearest))
        assert float(error) <= 1.1 * float(least)
        alive = torch.ones(128, dtype=torch.bool)
        alive[dead] = False
        mine, nearest = output_errors(weight, [matrix.dequantise(), round_to_nearest(weight, options).dequantise()],
                                      hessian)
        assert mine < 0.6 * nearest
    assert torch.equal(hessian, before), "the caller's Hessian stays what it was"
    everything_dead = quantize_matrix(weight, torch.zeros(128, 128), TEXTBOOK)
    assert torch.equal(everything_dead.codes, round_to_nearest(weight, TEXTBOOK).codes)


def test_a_hessian_of_few_tokens_takes_more_damping() -> None:
    """Ten tokens in 64 dimensions: the Hessian has rank ten, and rounding may leave it indefinite."""
    x = torch.randn(10, 64, dtype=torch.float64)
    hessian = x.T @ x
    assert factorise(hessian, replace(TEXTBOOK, damp_percent=0.01)).damp_percent == 0.01
    low_rank = factorise(hessian - 1e-6 * torch.eye(64), replace(TEXTBOOK, damp_percent=0.0))
    assert low_rank.damp_percent > 0.0
    matrix = quantize_matrix(torch.randn(4, 64), hessian, replace(TEXTBOOK, damp_percent=0.0))
    assert bool(torch.isfinite(matrix.dequantise()).all())


def test_what_cannot_be_factorised_is_refused() -> None:
    weight, _, hessian = draw(2, 64)
    indefinite = torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = -1e9
    with pytest.raises(ConfigError, match="not positive definite"):
        quantize_matrix(weight, indefinite, TEXTBOOK)
    hessian[3, 4] = float("nan")
    with pytest.raises(ConfigError, match="Hessian holds NaN"):
        quantize_matrix(weight, hessian, TEXTBOOK)
    weight[1, 1] = float("inf")
    with pytest.raises(ConfigError, match="weight holds NaN or infinity"):
        quantize_matrix(weight, torch.eye(64), TEXTBOOK)


def test_output_errors_are_those_of_the_outputs() -> None:
    weight, inputs, hessian = draw(8, 64)
    other = weight + 0.1 * torch.randn(8, 64)
    outputs = inputs @ weight.T
    expected = float(((inputs @ other.T) - outputs).square().sum() / outputs.square().sum())
    [error, none] = output_errors(weight, [other, weight], hessian)
    assert error == pytest.approx(expected, rel=1e-4) and none == 0.0
