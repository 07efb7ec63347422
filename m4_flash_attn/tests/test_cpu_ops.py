"""F4.7 on a CPU: the fused element-wise kernels equal their readable twins, and store where they should."""
from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m0_basics.model import RMSNorm, apply_rotary
from m4_flash_attn.elementwise import TorchOps
from m4_flash_attn.kernels.cpu import bindings
from m4_flash_attn.kernels.cpu.bindings import CpuOps, PagedKernels, Step, make_step
from m4_flash_attn.tests.cpu_variants import VARIANTS, variant_library

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2.0 ** -24, torch.bfloat16: 2.0 ** -8}
WIDTHS = [1, 3, 15, 16, 17, 31, 33, 64, 100, 576, 1000]
EPS = 1e-5


@pytest.fixture(scope="module", params=VARIANTS, autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything below runs on the kernels as they are compiled for each of these processors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bindings, "library", lambda: variant_library(request.param))
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_rounded_once(out: Tensor, expected: Tensor, rtol: float = 2e-6, atol: float = 0.0) -> None:
    """`out` is `expected` [float64], computed in fp32 (`rtol`, `atol`) and rounded to its own type."""
    allowed = (1.01 * ROUNDING[out.dtype] + rtol) * expected.abs() + atol
    if out.dtype is torch.bfloat16:
        allowed += 2.0 ** -133                              # half of its smallest number
    assert bool(((out.double() - expected).abs() <= allowed).all())


def norm_of(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """In float64, by definition."""
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(0, 40), width=st.sampled_from(WIDTHS), dtype=st.sampled_from(DTYPES), adds=st.booleans(),
       scale=st.sampled_from([1.0, 1e-20, 1e-4, 1e4, 1e15]))
def test_add_rms_norm(rows: int, width: int, dtype: torch.dtype, adds: bool, scale: float) -> None:
    """Any width, tiny and huge numbers. The sum is left in x, rounded as torch rounds it."""
    x, addend = draw(rows, width, dtype=dtype, scale=scale), draw(rows, width, dtype=dtype, seed=1, scale=scale)
    weight = draw(width, dtype=dtype, seed=2)
    total = x + addend if adds else x.clone()
    out = CpuOps(dtype).add_rms_norm(x, addend if adds else None, weight, EPS)
    assert out.dtype is dtype
    assert torch.equal(x, total)
    assert_rounded_once(out, norm_of(total, weight), rtol=1e-5)


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(0, 40), width=st.sampled_from(WIDTHS), dtype=st.sampled_from(DTYPES),
       scale=st.sampled_from([1.0, 1e-20, 1e-4, 20.0, 1e4, 1e15]))
def test_silu_mul(rows: int, width: int, dtype: torch.dtype, scale: float) -> None:
    gate_up = torch.cat([draw(rows, width, dtype=dtype, scale=scale), draw(rows, width, dtype=dtype, seed=1)], dim=1)
    out = CpuOps(dtype).silu_mul(gate_up)
    assert out.dtype is dtype
    gate, up = gate_up.double().chunk(2, dim=1)
    assert_rounded_once(out, gate * torch.sigmoid(gate) * up, rtol=2e-5, atol=1e-20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 40])
def test_silu_far_from_zero(dtype: torch.dtype, width: int) -> None:
    """e^10000 overflows. 40: in registers and behind them."""
    gate = torch.tensor([[-1e4], [-100.0], [0.0], [100.0], [1e4]]).expand(5, width)
    out = CpuOps(dtype).silu_mul(torch.cat([gate, torch.full((5, width), 2.0)], dim=1).to(dtype))
    expected = (2 * gate.clamp(min=0)).to(dtype)
    assert bool(((out - expected).abs() <= 1e-30).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_stays_visible(dtype: torch.dtype) -> None:
    x, weight = draw(3, 40, dtype=dtype), torch.ones(40, dtype=dtype)
    x[1, 7] = float("nan")
    normed = CpuOps(dtype).add_rms_norm(x, None, weight, EPS)
    assert normed[1].isnan().all()
    assert not normed[[0, 2]].isnan().any()
    gate_up = draw(3, 80, dtype=dtype)
    gate_up[0, 7] = gate_up[2, 79] = float("nan")
    assert CpuOps(dtype).silu_mul(gate_up).isnan().nonzero().tolist() == [[0, 7], [2, 39]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_torch(dtype: torch.dtype) -> None:
    """F4.7: TorchOps rounds once more than the kernels do."""
    tolerance = {"rtol": 2.0 ** -7, "atol": 2.0 ** -7} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    x, addend, weight = draw(9, 100, dtype=dtype), draw(9, 100, dtype=dtype, seed=1), draw(100, dtype=dtype, seed=2)
    ours, theirs = x.clone(), x.clone()
    torch.testing.assert_close(CpuOps(dtype).add_rms_norm(ours, addend, weight, EPS),
                               TorchOps().add_rms_norm(theirs, addend, weight, EPS), **tolerance)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(CpuOps(dtype).silu_mul(x), TorchOps().silu_mul(x), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_for_several_threads(dtype: torch.dtype) -> None:
    """Rows are independent: the same numbers, whoever computes them."""
    x, weight = draw(70, 576, dtype=dtype), draw(576, dtype=dtype, seed=1)

    def run() -> tuple[Tensor, Tensor]:
        return CpuOps(dtype).add_rms_norm(x.clone(), x, weight, EPS), CpuOps(dtype).silu_mul(x)

    alone = run()
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, run(), strict=True))


# ---- positions and the cache


def make_kernels(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> PagedKernels:
    return PagedKernels(num_heads, num_kv_heads, head_dim, 4, dtype, 1.0)


def step_of(slots: list[int]) -> Step:
    """One sequence, tokens in any slots; -1 for a token that is not stored."""
    length = len(slots)
    return make_step(torch.tensor([0, length], dtype=torch.int32), torch.tensor([length], dtype=torch.int32),
                     torch.zeros(1, 1, dtype=torch.int32), torch.tensor(slots, dtype=torch.int32))


SLOTS = [7, -1, 3, 40, -1, 0, 8]
STORED = [0, 2, 3, 5, 6]
WHERE = [SLOTS[i] for i in STORED]


def assert_stored(cache: Tensor, rows: Tensor, check: Callable[[Tensor, Tensor], None]) -> None:
    """The rows of the tokens that have a slot lie there; all other slots are as they were: NaN."""
    check(cache[WHERE], rows[STORED])
    others = torch.ones(len(cache), dtype=torch.bool)
    others[WHERE] = False
    assert cache[others].isnan().all()


def assert_equal(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b)


def empty_caches(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    k, v = torch.full((2, 44, num_kv_heads, head_dim), float("nan"), dtype=dtype)
    return k, v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(1, 16), (2, 64), (3, 80)])
def test_store_kv(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Views of one tensor go where their slots say; a token with slot -1 goes nowhere."""
    qkv = draw(7, 4 + 2 * num_kv_heads, head_dim, dtype=dtype)
    k, v = qkv[:, 4:4 + num_kv_heads], qkv[:, 4 + num_kv_heads:]
    caches = empty_caches(num_kv_heads, head_dim, dtype)
    make_kernels(num_kv_heads, num_kv_heads, head_dim, dtype).store_kv(step_of(SLOTS), k, v, *caches)
    assert_stored(caches[0], k, assert_equal)
    assert_stored(caches[1], v, assert_equal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 16), (6, 2, 48), (9, 3, 64), (4, 4, 256)])
def test_rotate_store_kv(num_heads: int, num_kv_heads: int, head_dim: int, normed: bool, dtype: torch.dtype) -> None:
    """Equal to milestone 0's norm and rotation, before their result is rounded; v is copied."""
    heads = draw(7, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    rotary = draw(7, 1, head_dim, dtype=dtype, seed=1), draw(7, 1, head_dim, dtype=dtype, seed=2)
    norms = (draw(head_dim, dtype=dtype, seed=3), draw(head_dim, dtype=dtype, seed=4)) if normed else None
    q, k, v = (x.clone() for x in heads.split((num_heads, num_kv_heads, num_kv_heads), dim=1))
    caches, qkv = empty_caches(num_kv_heads, head_dim, dtype), heads.flatten(1)
    make_kernels(num_heads, num_kv_heads, head_dim, dtype).rotate_store_kv(step_of(SLOTS), qkv, norms, EPS, rotary,
                                                                           *caches)

    def check(out: Tensor, expected: Tensor) -> None:
        assert_rounded_once(out, expected, atol=3e-6 * float(expected.abs().max()))

    def rotated(x: Tensor, index: int) -> Tensor:
        wide = x.double()
        if norms is not None:
            wide = norm_of(x, norms[index])
        return apply_rotary(wide, *(table.double() for table in rotary))

    check(qkv.view_as(heads)[:, :num_heads], rotated(q, 0))
    assert_stored(caches[0], rotated(k, 1), check)
    assert_stored(caches[1], v, assert_equal)


def test_the_definition_is_milestone_0s() -> None:
    """What the kernels are compared with above."""
    norm, x = RMSNorm(48, EPS), draw(5, 48)
    norm.weight.data = draw(48, seed=1)
    torch.testing.assert_close(norm(x), norm_of(x, norm.weight).float(), rtol=1e-5, atol=1e-6)


def test_wrong_tensors_do_not_reach_the_kernels() -> None:
    """C++ cannot notice: each of these would be read beyond its end, or as other numbers."""
    f32, kernels, step = torch.float32, make_kernels(2, 1, 16, torch.float32), step_of([0, 1])
    caches, kv = empty_caches(1, 16, f32), torch.zeros(2, 1, 16)
    for k, v in [(kv.double(), kv), (kv, kv.bfloat16()), (kv[:1], kv), (kv, torch.zeros(2, 2, 16)),
                 (torch.zeros(2, 1, 32)[:, :, ::2], kv)]:
        with pytest.raises(AssertionError):
            kernels.store_kv(step, k, v, *caches)
    qkv, table = torch.zeros(2, 64), torch.zeros(2, 1, 16)
    for wrong_qkv, rotary in [(qkv.bfloat16(), (table, table)), (qkv[:, :48], (table, table)),
                              (qkv, (table[:1], table)), (qkv, (table, table.double()))]:
        with pytest.raises(AssertionError):
            kernels.rotate_store_kv(step, wrong_qkv, None, EPS, rotary, *caches)
    x, weight = torch.zeros(2, 16), torch.zeros(16)
    for arguments in [(x.double(), None, weight), (x, x[:1], weight), (x, x.bfloat16(), weight), (x, None, weight[:8]),
                      (x, None, weight.double()), (torch.zeros(16, 2).T, None, weight)]:
        with pytest.raises(AssertionError):
            CpuOps(f32).add_rms_norm(*arguments, EPS)
    with pytest.raises(AssertionError):
        CpuOps(f32).silu_mul(x.bfloat16())
    with pytest.raises(AssertionError):
        make_step(*(torch.zeros(2, dtype=torch.int64),) * 4)
    with pytest.raises(AssertionError, match="float16"):
        CpuOps(torch.float16)
