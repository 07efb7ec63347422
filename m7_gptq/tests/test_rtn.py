"""Grids and rounding to nearest, against a search over every code."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m0_basics.config import ConfigError
from m7_gptq.grid import QuantizedMatrix
from m7_gptq.rtn import QuantizeOptions, find_grid, round_to_nearest, spanning_grid

PLAIN = QuantizeOptions(search=False)


def best_codes(weight: Tensor, matrix: QuantizedMatrix) -> Tensor:
    """The code of least error for each weight, tried one by one on the grids of `matrix`."""
    group = torch.arange(weight.shape[1]) // matrix.group_size
    scale, zero = matrix.scales[:, group].double(), matrix.zeros[:, group].double()
    candidates = torch.arange(2 ** matrix.bits).double().view(-1, 1, 1)
    return ((scale * (candidates - zero)) - weight.double()).abs().argmin(0)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_weight_takes_its_nearest_code(bits: int, sym: bool) -> None:
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(bits))
    for search in (False, True):
        matrix = round_to_nearest(weight, QuantizeOptions(bits=bits, group_size=32, sym=sym, search=search))
        assert matrix.order is None and matrix.bits == bits and matrix.scales.shape == (7, 3)
        values, best = matrix.dequantise(), best_codes(weight, matrix)
        # A weight half-way between two codes may take either.
        distance = (values.double() - weight).abs()
        ideal = matrix.scales.repeat_interleave(32, 1).double() * (
            best - matrix.zeros.repeat_interleave(32, 1).double())
        assert bool((distance <= (ideal - weight).abs() + 1e-6).all())
        assert int(matrix.codes.max()) < 2 ** bits


def test_the_grid_by_hand() -> None:
    """-1 ... 2 in 2 bits: steps of 1, and code 1 means 0."""
    options = QuantizeOptions(bits=2, group_size=4, search=False)
    matrix = round_to_nearest(torch.tensor([[-1.0, 2.0, 0.4, 0.6]]), options)
    assert matrix.scales.tolist() == [[1.0]] and matrix.zeros.tolist() == [[1]]
    assert matrix.codes.tolist() == [[0, 3, 1, 2]]
    sym = round_to_nearest(torch.tensor([[-1.5, 1.0]]), QuantizeOptions(bits=2, group_size=2, sym=True, search=False))
    assert sym.scales.tolist() == [[1.0]] and sym.zeros.tolist() == [[2]]
    assert sym.codes.tolist() == [[0, 3]]           # -1.5 lies between codes 0 and 1: to the even step


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-60000, 60000, width=32), min_size=8, max_size=8), st.sampled_from([2, 3, 4, 8]),
       st.booleans())
def test_any_weights_stay_within_a_step(row: list[float], bits: int, sym: bool) -> None:
    weight = torch.tensor([row])
    matrix = round_to_nearest(weight, QuantizeOptions(bits=bits, group_size=4, sym=sym, search=False))
    scales = matrix.scales.repeat_interleave(4, 1)
    assert torch.equal(matrix.scales, matrix.scales.half().float()), "scales are kept in fp16"
    assert bool(torch.isfinite(matrix.scales).all()) and bool((matrix.scales > 0).all())
    # Half a step for a code, half of one for the zero point, and what fp16 takes from the scale at each end.
    allowed = scales * (1.0 + 2 ** bits * 2.0 ** -11) + 2 ** bits * 2.0 ** -24
    assert bool(((matrix.dequantise() - weight).abs() <= allowed).all())


def test_groups_of_zeros_and_of_one_value() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.5, 0.5, -0.25, -0.25, 1e-9, 1e-9]])
    values = round_to_nearest(weight, QuantizeOptions(group_size=2)).dequantise()
    torch.testing.assert_close(values, weight, atol=2e-8, rtol=1e-3)
    assert values[0, :2].tolist() == [0.0, 0.0]


def test_a_searched_grid_is_never_worse_and_heeds_importance() -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(3)) ** 3       # heavy tails

    def error(options: QuantizeOptions) -> Tensor:
        return (round_to_nearest(weight, options).dequantise() - weight).square().sum(1)

    plain = error(QuantizeOptions(bits=3, group_size=32, search=False))
    searched = error(QuantizeOptions(bits=3, group_size=32))
    assert bool((searched <= plain).all()) and float(searched.mean()) < 0.96 * float(plain.mean())
    options, importance = QuantizeOptions(bits=3, group_size=32), torch.zeros(32)
    importance[5] = 1.0                         # only one input counts: its weights come out best
    grid = find_grid(weight.T, options, importance)
    alike = find_grid(weight.T, options)
    of_5 = [float((g.values(g.codes(weight.T, 3)) - weight.T)[5].square().sum()) for g in (grid, alike)]
    assert of_5[0] < 0.5 * of_5[1]


def test_a_scale_is_finite_whatever_gptq_made_of_the_weights() -> None:
    """Updates may carry a weight beyond what was checked: the largest scale that fp16 has is the end."""
    grid = spanning_grid(torch.tensor([-3e8, -1.0]), torch.tensor([1.0, 3e8]), 2, False)
    assert grid.scale.tolist() == [65504.0, 65504.0]
    assert bool(torch.isfinite(grid.values(grid.codes(torch.tensor([[-3e8, 3e8]]), 2))).all())


def test_many_rows_are_rounded_as_few_are() -> None:
    weight = torch.randn(5000, 16)
    whole = round_to_nearest(weight, QuantizeOptions(group_size=16))
    part = round_to_nearest(weight[4000:4003], QuantizeOptions(group_size=16))
    assert torch.equal(whole.codes[4000:4003], part.codes) and torch.equal(whole.scales[4000:4003], part.scales)
    assert torch.equal(round_to_nearest(weight, QuantizeOptions(group_size=-1)).codes, whole.codes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_weights_that_no_grid_holds_are_refused(value: float) -> None:
    weight = torch.zeros(2, 8)
    weight[1, 3] = value
    with pytest.raises(ConfigError, match="the weight holds"):
        round_to_nearest(weight, QuantizeOptions(group_size=8))


@pytest.mark.parametrize(("field", "value"), [
    ("bits", 5), ("bits", 16), ("bits", True), ("group_size", 0), ("group_size", -2), ("group_size", 1.5),
    ("method", "awq"), ("damp_percent", -0.1), ("damp_percent", float("nan")), ("damp_percent", "a"), ("sink", -1.0),
    ("gptaq", 1.5), ("gptaq", True)])
def test_bad_options_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field}=.*allowed"):
        QuantizeOptions(**{field: value})


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"group_size=64 .* divisor of the matrix's 96"):
        round_to_nearest(torch.zeros(1, 96), PLAIN)
