"""F7.3: the packed CPU layers equal the readable ones, for any shape, grid and order, on every tier of processors."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m7_gptq.grid import QuantizedMatrix
from m7_gptq.kernels.cpu.linear import CpuQuantizedEmbedding, CpuQuantizedGatedLinear, CpuQuantizedLinear
from m7_gptq.linear import QuantizedEmbedding, QuantizedLinear
from m7_gptq.tests.cpu_references import assert_rounds_to, compiled_for, draw, exact_product, make_matrix, rounded
from m7_gptq.tests.cpu_tiers import RUNNABLE
from m7_gptq.tests.random_matrices import Kind

DTYPES = [torch.float32, torch.bfloat16]
GROUPS = [8, 16, 20, 32, 40, 64, 96, 128, 200, 256]


@pytest.fixture(scope="module", params=RUNNABLE, autouse=True)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything below runs on the kernels as they are compiled for each of these processors."""
    with compiled_for(request.param):
        yield request.param


kinds = st.builds(Kind, bits=st.sampled_from([2, 3, 4, 8]), group=st.sampled_from(GROUPS), zeros=st.booleans(),
                  half=st.booleans(), ordered=st.booleans())


@settings(max_examples=60, deadline=None)
@given(kind=kinds, rows=st.integers(1, 30), outputs=st.integers(1, 80), groups=st.integers(1, 4),
       same_zero=st.booleans(), bias=st.booleans(), wide=st.booleans(), dtype=st.sampled_from(DTYPES))
@example(kind=Kind(), rows=1, outputs=1, groups=1, same_zero=True, bias=True, wide=False, dtype=torch.bfloat16)
@example(kind=Kind(8, 128), rows=13, outputs=33, groups=3, same_zero=False, bias=False, wide=True, dtype=torch.float32)
def test_products(kind: Kind, rows: int, outputs: int, groups: int, same_zero: bool, bias: bool, wide: bool,
                  dtype: torch.dtype) -> None:
    depth = kind.group * groups
    matrix = make_matrix(outputs, depth, kind, same_zero)
    x, b = draw(rows, depth, dtype=dtype), draw(outputs, dtype=dtype, seed=1) if bias else None
    out_dtype = torch.float32 if wide else dtype
    exact = CpuQuantizedLinear(matrix, b, dtype, "exact", out_dtype)(x)
    assert exact.dtype is out_dtype
    assert_rounds_to(exact, exact_product(x, matrix, b), depth)
    int8 = CpuQuantizedLinear(matrix, b, dtype, "int8", out_dtype)(x)
    assert_rounds_to(int8, exact_product(rounded(x, matrix), matrix, b), depth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_height_of_a_tile(bits: int, dtype: torch.dtype) -> None:
    matrix = make_matrix(70, 192, Kind(bits, 64))
    layers = [CpuQuantizedLinear(matrix, None, dtype, "exact"), CpuQuantizedLinear(matrix, None, dtype, "int8")]
    for rows in [*range(1, 20), 64, 301]:
        x = draw(rows, 192, dtype=dtype)
        assert_rounds_to(layers[0](x), exact_product(x, matrix), 192)
        assert_rounds_to(layers[1](x), exact_product(rounded(x, matrix), matrix), 192)


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_slices_and_blocks_of_a_large_matrix(activations: str) -> None:
    """More groups than are read at once, a panel that is unpacked in slices, rows that are cut into blocks."""
    for kind in (Kind(4, 32, zeros=False), Kind(8, 64), Kind(4, 128)):
        matrix = make_matrix(66, 2304, kind)
        layer = CpuQuantizedLinear(matrix, None, torch.bfloat16, activations, torch.float32)
        for rows in (1, 3, 9, 230):
            x = draw(rows, 2304, dtype=torch.bfloat16)
            taken = x if activations == "exact" else rounded(x, matrix)
            assert_rounds_to(layer(x), exact_product(taken, matrix), 2304)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_differs_by_no_more_than_half_a_step_of_x(dtype: torch.dtype) -> None:
    matrix, x = make_matrix(50, 256, Kind(4, 64)), draw(9, 256, dtype=dtype)
    step = x.float().view(9, -1, 64).abs().amax(2).repeat_interleave(64, 1).double() / 127
    allowed = (0.5001 * step) @ matrix.dequantise().double().abs().T
    y = CpuQuantizedLinear(matrix, None, dtype, "int8", torch.float32)(x).double()
    difference = (y - exact_product(x, matrix)[0]).abs()
    assert bool((difference <= allowed).all())
    assert bool((difference > 0).any())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nothing_saturates(bits: int, sign: float) -> None:
    """The largest codes times the largest numbers, all of one sign: sums of 16 bits would not hold them."""
    most = 2 ** bits - 1
    matrix = QuantizedMatrix(torch.full((40, 384), most, dtype=torch.uint8), torch.ones(40, 3), bits,
                             torch.zeros(40, 3, dtype=torch.uint8))
    for rows in (1, 5, 13):
        x = torch.full((rows, 384), sign * 127.0)
        for activations in ("exact", "int8"):
            y = CpuQuantizedLinear(matrix, None, torch.float32, activations)(x)
            assert torch.equal(y, torch.full_like(y, sign * 127 * most * 384))


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_none_does_not_come_out_as_one(dtype: torch.dtype, bad: float, activations: str) -> None:
    matrix = make_matrix(40, 128, Kind(4, 32))
    for rows in (1, 4, 9):
        x = draw(rows, 128, dtype=dtype)
        layer = CpuQuantizedLinear(matrix, None, dtype, activations)
        clean = layer(x)
        x[rows // 2, 77] = bad
        y = layer(x)
        assert not y[rows // 2].isfinite().any()
        if activations == "int8":
            assert y[rows // 2].isnan().all()
        others = torch.arange(rows) != rows // 2
        assert torch.equal(y[others], clean[others])


def test_zeros_and_the_smallest_numbers_of_x() -> None:
    """A scale of 0, and one whose inverse is no number."""
    matrix = make_matrix(20, 64, Kind(4, 32))
    x = torch.zeros(3, 64)
    x[1, :32], x[2, 40:] = 1e-42, -3.0
    y = CpuQuantizedLinear(matrix, None, torch.float32, "int8")(x)
    assert torch.equal(y[0], torch.zeros(20))
    assert bool((y[1].abs() < 1e-30).all())
    assert_rounds_to(y[2:], exact_product(rounded(x[2:], matrix), matrix), 64)


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_gate_and_what_it_lets_through(dtype: torch.dtype, activations: str, biased: bool) -> None:
    for outputs in (7, 48, 70):
        matrix = make_matrix(2 * outputs, 96, Kind(4, 32, ordered=outputs == 48))
        bias = draw(2 * outputs, dtype=dtype, seed=3) if biased else None
        layer = CpuQuantizedGatedLinear(matrix, dtype, activations, bias)
        for rows in (1, 3, 17):
            x = draw(rows, 96, dtype=dtype)
            taken = x if activations == "exact" else rounded(x, matrix)
            gate, up = exact_product(taken, matrix, bias)[0].chunk(2, dim=1)
            y = layer(x)
            assert y.shape == (rows, outputs)
            torch.testing.assert_close(y.double(), F.silu(gate) * up, rtol=1e-5 if dtype is torch.float32 else 8e-3,
                                       atol=1e-4)


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_one_group_of_all_inputs_is_cut_in_pieces(activations: str) -> None:
    for depth in (576, 1536, 131, 1000):
        matrix, x = make_matrix(33, depth, Kind(4, depth)), draw(5, depth)
        taken = x if activations == "exact" else rounded(x, matrix)
        y = CpuQuantizedLinear(matrix, None, torch.float32, activations)(x)
        assert_rounds_to(y, exact_product(taken, matrix), depth)


@pytest.mark.parametrize("activations", ["exact", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_the_operands_is_used(dtype: torch.dtype, activations: str) -> None:
    """Views between NaN: what lies around x is in no sum."""
    for group in (40, 20):
        matrix, x = make_matrix(45, 40, Kind(4, group)), draw(5, 40, dtype=dtype)
        layer = CpuQuantizedLinear(matrix, None, dtype, activations)
        wide = torch.full((7, 60), torch.nan, dtype=dtype)
        wide[1:6, 9:49] = x
        assert torch.equal(layer(wide[1:6, 9:49]), layer(x))
        turned = x.T.contiguous().T
        assert turned.stride(1) != 1
        assert torch.equal(layer(turned), layer(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_is_as_close_as_the_readable_layer(dtype: torch.dtype) -> None:
    matrix, x = make_matrix(64, 192, Kind(4, 64)), draw(12, 192, dtype=dtype)
    y, readable = CpuQuantizedLinear(matrix, None, dtype, "exact")(x), QuantizedLinear(matrix, None, dtype)(x)
    torch.testing.assert_close(y, readable, rtol=1e-5 if dtype is torch.float32 else 8e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Kind(4, 32, zeros=False), Kind(8, 32, ordered=True), Kind(3, 20, half=False)])
@pytest.mark.parametrize("same_zero", [False, True])
def test_rows_of_the_embedding_are_the_readable_ones_bit_for_bit(kind: Kind, same_zero: bool,
                                                                 dtype: torch.dtype) -> None:
    matrix = make_matrix(77, kind.group * 3, kind, same_zero)
    packed = CpuQuantizedLinear(matrix, None, dtype, "int8").packed
    ids = torch.tensor([0, 76, 31, 32, 33, 76, 5])
    assert torch.equal(CpuQuantizedEmbedding(packed, dtype)(ids), QuantizedEmbedding(matrix, dtype)(ids))
    for wrong in (-1, 77):
        with pytest.raises(IndexError, match=f"token {wrong} is not one of 77"):
            CpuQuantizedEmbedding(packed, dtype)(torch.tensor([3, wrong]))


@pytest.mark.parametrize("x", [torch.zeros(2, 7), torch.zeros(32), torch.zeros(2, 32).bfloat16()])
def test_a_wrong_operand_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"not torch.float32 \[T, 32\]"):
        CpuQuantizedLinear(make_matrix(4, 32, Kind()), None, torch.float32, "exact")(x)


def test_no_rows() -> None:
    for activations in ("exact", "int8"):
        layer = CpuQuantizedLinear(make_matrix(4, 32, Kind()), None, torch.float32, activations)
        assert layer(torch.zeros(0, 32)).shape == (0, 4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_matrix_of_no_numbers_is_refused(bad: float) -> None:
    matrix = make_matrix(4, 32, Kind(zeros=False))
    for field in ("scales", "minimums"):
        broken = getattr(matrix, field).clone()
        broken[2, 0] = bad
        with pytest.raises(ValueError, match="infinite or NaN"):
            CpuQuantizedLinear(replace(matrix, **{field: broken}), None, torch.float32, "exact")
