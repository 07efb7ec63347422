"""The packed linear layers (part of F4.7): every kind equals a plain matmul, for any shape."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from m4_flash_attn.kernels.cpu import linear as module
from m4_flash_attn.kernels.cpu.build import BuildError
from m4_flash_attn.kernels.cpu.linear import PackedLinear, choose, multiply_packed, pack
from m4_flash_attn.tests.cpu_variants import VARIANTS, variant_library
from m4_flash_attn.tools.linear_bench import Timing, measure, table

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2.0 ** -24, torch.bfloat16: 2.0 ** -8}     # half a unit in the last of 24 and of 8 bits


def expected(x, weight, bias):
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def assert_close(y, x, weight, bias):
    """Within what rounding allows: of each product and sum in fp32, and of the result in y's type."""
    want = expected(x, weight, bias)
    magnitude = expected(x.abs(), weight.abs(), None if bias is None else bias.abs())
    allowed = (x.shape[1] + 2) * 2.0 ** -24 * magnitude + 1.001 * ROUNDING[y.dtype] * want.abs() + 1e-30
    assert y.shape == want.shape
    assert ((y.double() - want).abs() <= allowed).all()


def make(rows, columns, depth, dtype, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, depth), (columns, depth))]
    return *tensors, torch.randn(columns, generator=generator).to(dtype) if bias else None


@pytest.fixture(scope="module", params=VARIANTS, autouse=True)
def kernels(request):
    """Everything below runs on the kernels as they are compiled for each of these processors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "library", lambda: variant_library(request.param))
        choose.cache_clear()
        yield
        choose.cache_clear()


@settings(max_examples=150, deadline=None)
@given(rows=st.integers(1, 70), columns=st.integers(1, 150), depth=st.integers(1, 100), dtype=st.sampled_from(DTYPES),
       bias=st.booleans(), wide=st.booleans())
@example(rows=1, columns=1, depth=1, dtype=torch.bfloat16, bias=True, wide=False)
@example(rows=13, columns=33, depth=7, dtype=torch.bfloat16, bias=False, wide=True)
def test_native_product_equals_matmul(rows, columns, depth, dtype, bias, wide):
    x, weight, b = make(rows, columns, depth, dtype, bias)
    y = PackedLinear(weight, b, torch.float32 if wide else None, kind="native")(x)
    assert y.dtype is (torch.float32 if wide else dtype)
    assert_close(y, x, weight, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [*range(1, 26), 64])
def test_every_height_of_a_tile(dtype, rows):
    x, weight, _ = make(rows, 96, 64, dtype)
    assert_close(PackedLinear(weight, kind="native")(x), x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_cut_into_blocks_where_x_does_not_fit_the_cache(dtype):
    x, weight, _ = make(301, 70, 1500, dtype)
    assert_close(PackedLinear(weight, kind="native")(x), x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_sums(dtype):
    x, weight, _ = make(40, 200, 130, dtype)
    layer, before = PackedLinear(weight, kind="native"), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert_close(results[0], x, weight, None)
    for other in results[1:]:
        assert torch.equal(other, results[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_the_operands_is_used(dtype):
    """Views between NaN: what lies around x is in no sum, and an odd K does not take the next row's number."""
    x, weight, _ = make(5, 45, 33, dtype)
    wide = torch.full((7, 50), torch.nan, dtype=dtype)
    view = wide[1:6, 9:42]
    view.copy_(x)
    assert_close(PackedLinear(weight, kind="native")(view), x, weight, None)
    turned = x.T.contiguous().T
    assert turned.stride(1) != 1
    assert_close(PackedLinear(weight, kind="native")(turned), x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("panel", [8, 32])
def test_readable_twin(dtype, panel):
    x, weight, _ = make(6, 45, 33, dtype)
    packed = pack(weight, panel)
    assert packed.numel() >= weight.numel()
    assert_close(multiply_packed(x, packed, 45), x, weight, None)


@pytest.mark.parametrize(("dtype", "out_dtype"), module._FUNCTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_kind_agrees(dtype, out_dtype, bias):
    x, weight, b = make(9, 64, 48, dtype, bias)
    kinds = ["native", "torch"] + (["onednn"] if module._reorder(weight) is not None else [])
    for kind in kinds:
        y = PackedLinear(weight, b, out_dtype, kind=kind)(x)
        torch.testing.assert_close(y, F.linear(x, weight, b).to(out_dtype),
                                   rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-2)


def test_choice(monkeypatch):
    def no_compiler():
        raise BuildError("no C++ compiler was found")

    assert choose.__wrapped__(torch.float16, torch.float16) == "torch"
    assert choose.__wrapped__(torch.float32, torch.float32) == "native"
    monkeypatch.setattr(module, "_reorder", lambda weight: weight)
    monkeypatch.setattr(module, "_has_matrix_tiles", lambda: True)
    assert choose.__wrapped__(torch.bfloat16, torch.bfloat16) == "onednn"
    assert choose.__wrapped__(torch.float32, torch.float32) == "native"
    monkeypatch.setattr(module, "library", no_compiler)
    assert choose.__wrapped__(torch.float32, torch.float32) == "onednn"
    monkeypatch.setattr(module, "_reorder", lambda weight: None)
    assert choose.__wrapped__(torch.float32, torch.float32) == "torch"


def test_a_torch_without_the_private_function_is_noticed(monkeypatch):
    class Empty:
        pass

    monkeypatch.setattr(module.torch.ops, "mkldnn", Empty())
    weight = torch.zeros(16, 16)
    assert module._reorder(weight) is None
    with pytest.raises(ValueError, match="no packed oneDNN product"):
        PackedLinear(weight, kind="onednn")


def test_of_a_layer_and_its_bytes():
    linear = nn.Linear(48, 40, dtype=torch.bfloat16)
    packed = PackedLinear.of(linear)
    assert packed.kind == choose(torch.bfloat16, torch.bfloat16)
    assert packed.nbytes >= linear.weight.nbytes
    assert list(packed.parameters()) == []
    x = torch.randn(3, 48).bfloat16()
    assert_close(packed(x), x, linear.weight.detach(), linear.bias.detach())


@pytest.mark.parametrize("x", [torch.zeros(2, 7), torch.zeros(8), torch.zeros(2, 8).bfloat16()])
def test_a_wrong_operand_is_refused(x):
    with pytest.raises(ValueError, match=r"not torch.float32 \[T, 8\]"):
        PackedLinear(torch.zeros(4, 8))(x)


def test_no_rows():
    assert PackedLinear(torch.zeros(4, 8))(torch.zeros(0, 8)).shape == (0, 4)


def test_rates_of_a_timing():
    timing = Timing("native", rows=10, columns=100, depth=50, weight_bytes=10_000, seconds=1e-6)
    assert timing.gflops == pytest.approx(100)
    assert timing.gbytes == pytest.approx(10)


def test_every_kind_is_timed_for_every_number_of_rows():
    timings = measure(64, 32, [1, 3], torch.float32, rounds=1)
    assert {(t.kind, t.rows) for t in timings} >= {(kind, rows) for kind in ("native", "torch") for rows in (1, 3)}
    assert all(t.seconds > 0 and t.weight_bytes == 64 * 32 * 4 for t in timings)
    lines = table(timings).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["1", "3"]
    assert len({line.count("|") for line in lines}) == 1
