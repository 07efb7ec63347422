"""F4.4, F4.5, F4.6: the C++ attention equals its definition, for any batch, on the code paths of several processors."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from m4_flash_attn.kernels.cpu import bindings
from m4_flash_attn.kernels.cpu.bindings import PagedKernels, Step, make_step
from m4_flash_attn.reference import MIXED, PagedBatch, paged_attention_reference, random_paged_batch
from m4_flash_attn.tests.cpu_variants import VARIANTS, variant_library

pytestmark = pytest.mark.slow

DTYPES = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 2.0 ** -24, torch.bfloat16: 2.0 ** -8}


@pytest.fixture(scope="module", params=VARIANTS, autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything below runs on the kernels as they are compiled for each of these processors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bindings, "library", lambda: variant_library(request.param))
        yield


@dataclass
class Case:
    """A batch, and the kernels for it."""

    batch: PagedBatch
    kernels: PagedKernels
    step: Step
    window: int | None
    num_sinks: int

    def run(self) -> Tensor:
        out = self.kernels.attend(self.step, self.batch.q, self.batch.k_cache, self.batch.v_cache)
        return out.view(self.batch.q.shape)


def case_of(batch: PagedBatch, window: int | None = None, num_sinks: int = 0) -> Case:
    num_heads, head_dim = batch.q.shape[1:]
    kernels = PagedKernels(num_heads, batch.k.shape[1], head_dim, batch.block_size, batch.q.dtype, batch.scale, window,
                           num_sinks)
    step = make_step(batch.query_start_loc, batch.seq_lens, batch.block_table, batch.slot_mapping)
    return Case(batch, kernels, step, window, num_sinks)


def make(*sequences: tuple[int, int], window: int | None = None, num_sinks: int = 0, **shape: Any) -> Case:
    return case_of(random_paged_batch(sequences or MIXED, **shape), window, num_sinks)


def assert_right(case: Case, out: Tensor | None = None) -> None:
    """In fp32 to 1e-5. In bf16 each probability and the result are rounded once, to 8 bits."""
    batch, out = case.batch, case.run() if out is None else out
    expected = batch.expected(case.window, case.num_sinks)
    if out.dtype is torch.float32:
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        return
    magnitude = replace(batch, v_cache=batch.v_cache.abs()).expected(case.window, case.num_sinks)
    allowed = 1.01 * ROUNDING[out.dtype] * (expected.abs() + magnitude) + 1e-5
    assert bool(((out.double() - expected).abs() <= allowed).all())


@st.composite
def batches(draw: st.DrawFn) -> Case:
    """Prompts, chunks behind a prefix and decodes in any mixture, over any layout of heads and blocks."""
    sequence = st.tuples(st.integers(0, 150), st.integers(1, 70)) | st.tuples(st.integers(0, 300), st.just(1))
    window = draw(st.none() | st.integers(1, 200))
    group, num_kv_heads = draw(st.sampled_from([1, 2, 3, 8])), draw(st.integers(1, 3))
    return make(*draw(st.lists(sequence, min_size=1, max_size=5)), window=window,
                num_sinks=draw(st.integers(0, 80)) if window else 0, num_heads=group * num_kv_heads,
                num_kv_heads=num_kv_heads, head_dim=draw(st.sampled_from([16, 32, 48, 64, 80, 112, 128, 256])),
                block_size=draw(st.sampled_from([1, 2, 3, 8, 16, 20, 64])), dtype=draw(st.sampled_from(DTYPES)),
                seed=draw(st.integers(0, 99)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=batches())
def test_any_batch(case: Case) -> None:
    """F4.4: what no sequence owns is NaN in the cache; q is a strided view."""
    assert_right(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_every_head_size(dtype: torch.dtype, head_dim: int) -> None:
    assert_right(make(head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (9, 3), (16, 2), (48, 1), (49, 1), (64, 1), (130, 2)])
def test_heads(dtype: torch.dtype, num_heads: int, num_kv_heads: int) -> None:
    """More query heads than an item of work has rows: the item is one token's."""
    assert_right(make(num_heads=num_heads, num_kv_heads=num_kv_heads, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("computed", "new"), [(0, 1), (0, 2), (15, 1), (16, 1), (62, 1), (63, 1), (64, 1), (127, 1),
                                               (63, 2), (60, 9), (0, 64), (0, 65), (128, 49), (1, 200)])
def test_ends_of_tiles(dtype: torch.dtype, computed: int, new: int) -> None:
    """Tiles of 64 keys, filled up to 16; items of 48 rows."""
    assert_right(make((computed, new), dtype=dtype, block_size=5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "num_sinks"), [(1, 0), (1, 1), (7, 0), (64, 4), (100, 64), (100, 70), (1000, 3)])
def test_window_and_sinks(dtype: torch.dtype, window: int, num_sinks: int) -> None:
    """F4.6: tiles behind the window are skipped, those with sinks are not."""
    assert_right(make((0, 90), (400, 1), (300, 5), (0, 1), (63, 3), window=window, num_sinks=num_sinks, dtype=dtype))


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts_are_split_and_merged_exactly(dtype: torch.dtype, window: int | None) -> None:
    """F4.5: ranges of keys for many threads, merged: what one thread gives, within the rounding of the sums."""
    case = make((3000, 1), (0, 1), (500, 1), (64, 1), (10, 20), dtype=dtype, window=window,
                num_sinks=3 if window else 0)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(case.run())
        assert_right(case, results[-1])
    if dtype is torch.float32:
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=2e-6, atol=2e-6)


def test_the_merge_of_parts_with_far_apart_maxima() -> None:
    """F4.5: the best key of a part is 2^100 times as probable as the best of another: no part is lost or overflows."""
    case = make((1023, 1), num_heads=1, num_kv_heads=1)
    slots = case.batch.block_table[0].repeat_interleave(case.batch.block_size)[:1024].long() * case.batch.block_size
    slots = slots + torch.arange(1024) % case.batch.block_size
    direction = case.batch.q[0, 0] / case.batch.q[0, 0].square().sum()
    for part in range(8):
        strength = torch.full((128, 1), 12.0 * ((5 * part) % 8)) / case.batch.scale
        case.batch.k_cache[slots[128 * part:128 * part + 128], 0] = strength * direction
    for threads in (1, 4):
        torch.set_num_threads(threads)
        assert_right(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [100.0, 1e4])
def test_large_scores_do_not_overflow(dtype: torch.dtype, factor: float) -> None:
    """One key takes all: its value comes out. Scores of thousands would overflow e^x."""
    case = make(dtype=dtype)
    case.batch.q.mul_(factor)
    expected = case.batch.expected()
    # A score of thousands has a rounding error that shows in its exponential.
    compute = paged_attention_reference(
        case.batch.q, case.batch.k_cache, case.batch.v_cache, case.batch.query_start_loc, case.batch.seq_lens,
        case.batch.block_table, case.batch.block_size, case.batch.scale, compute_dtype=torch.float32)
    out = case.run().double()
    allowed = 8 * (compute - expected).abs().max() + (2e-2 if dtype is torch.bfloat16 else 1e-3)
    assert bool(((out - expected).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_foreign_slots_do_not_count(dtype: torch.dtype) -> None:
    """Not as NaN, and not as the best key that there could be."""
    case = make(dtype=dtype, block_size=8)
    unused = case.batch.k_cache.isnan()
    before = case.run()
    for value in (1e4, -1e4, float("inf")):
        case.batch.k_cache[unused] = value
        case.batch.v_cache[unused] = value
        assert torch.equal(case.run(), before)


@pytest.mark.parametrize("which", ["k_cache", "v_cache"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_in_a_sequence_stays_in_it(which: str, dtype: torch.dtype) -> None:
    """And comes out: an answer that looks right would hide it."""
    case = make((9, 1), (3, 2), (0, 30), block_size=4, dtype=dtype)
    before = case.run()
    getattr(case.batch, which)[int(case.batch.block_table[0, 0]) * 4] = float("nan")
    after = case.run()
    assert after[0].isnan().all()
    assert torch.equal(after[1:], before[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_q_in_front_of_k_and_v(dtype: torch.dtype) -> None:
    """The whole product of the qkv projection as it is, the same as its part."""
    case = make(dtype=dtype)
    batch = case.batch
    qkv = torch.cat([batch.q, batch.k, batch.v], dim=1).flatten(1)
    out = case.kernels.attend(case.step, qkv, batch.k_cache, batch.v_cache)
    assert torch.equal(out.view(batch.q.shape), case.run())
    assert torch.equal(case.kernels.attend(case.step, batch.q.contiguous(), batch.k_cache, batch.v_cache), out)


STEPS = [[(70, 1)], [(0, 100)], [(0, 3), (5, 1)], [(3000, 1), (900, 1)], [(0, 1)]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("head_dim", "num_heads"), [(16, 16), (256, 1), (16, 49), (128, 4), (64, 64)])
def test_a_workspace_that_was_used_before(head_dim: int, num_heads: int, threads: int, dtype: torch.dtype) -> None:
    """It grows and is kept; what lies in it from before, NaN for one, does not count."""
    cases = [make(*step, head_dim=head_dim, num_heads=num_heads, num_kv_heads=1, dtype=dtype) for step in STEPS]
    kernels = cases[0].kernels
    torch.set_num_threads(threads)
    for case in cases * 2:
        assert_right(replace(case, kernels=kernels))
        kernels._workspace.fill_(255)


def test_no_memory_is_an_exception_for_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that finds none leaves the kernels as they were; a smaller one runs."""
    torch.set_num_threads(2)
    small, large = make((70, 1)), make(*[(3, 1)] * 600)
    kernels, empty = small.kernels, torch.empty
    assert_right(small)
    room = kernels._workspace.nbytes

    def limited(*shape: int, **kind: Any) -> Tensor:
        if kind["dtype"] is torch.uint8 and shape[0] > room:
            raise RuntimeError(f"cannot allocate {shape[0]} bytes")
        return empty(*shape, **kind)

    monkeypatch.setattr(bindings.torch, "empty", limited)
    with pytest.raises(RuntimeError, match="cannot allocate"):
        replace(large, kernels=kernels).run()
    assert_right(small)
    monkeypatch.undo()
    assert_right(replace(large, kernels=kernels))


def test_a_step_without_tokens() -> None:
    empty = torch.zeros(0, dtype=torch.int32)
    step = make_step(torch.zeros(1, dtype=torch.int32), empty, torch.zeros(0, 1, dtype=torch.int32), empty)
    cache = torch.zeros(16, 1, 16)
    kernels = PagedKernels(2, 1, 16, 16, torch.float32, 0.25)
    assert kernels.attend(step, torch.zeros(0, 2, 16), cache, cache).shape == (0, 32)


@pytest.mark.parametrize("wrong", [
    {"q": torch.zeros(2, 4, 16).double()},
    {"q": torch.zeros(2, 16, 4).transpose(1, 2)},
    {"q": torch.zeros(2, 4, 32)[:, :, :16]},
    {"q": torch.zeros(2, 3, 16)},
    {"q": torch.zeros(1, 4, 16)},
    {"k_cache": torch.zeros(32, 2, 16).bfloat16()},
    {"v_cache": torch.zeros(32, 2, 32)[:, :, :16]},
], ids=["type", "order", "pieces", "heads", "tokens", "type of a cache", "cache in pieces"])
def test_wrong_tensors_do_not_reach_the_kernel(wrong: dict[str, Tensor]) -> None:
    batch = random_paged_batch([(0, 2)])
    tensors = {"q": batch.q, "k_cache": batch.k_cache, "v_cache": batch.v_cache} | wrong
    case = case_of(batch)
    with pytest.raises(AssertionError):
        case.kernels.attend(case.step, **tensors)
