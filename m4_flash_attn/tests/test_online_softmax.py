"""F4.2, F4.5, F4.6: the tiled algorithm against `torch.softmax` and the masked reference, and what merging promises."""
from __future__ import annotations

import random
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m4_flash_attn.online_softmax import (
    State,
    Trace,
    empty_state,
    finish,
    log_sum_exp,
    merge,
    online_softmax,
    split_kv_attention,
    tiled_attention,
    update,
)
from m4_flash_attn.reference import masked_attention, visible

HEAD_DIM = 8
DTYPES = st.sampled_from([torch.float32, torch.float64])
MAGNITUDES = st.sampled_from([1e-3, 1.0, 30.0, 1e4])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    """To 1e-12 in float64, to 1e-5 in float32."""
    tolerance = 1e-12 if actual.dtype is torch.float64 else 1e-5
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


def state_of(scores: Tensor, v: Tensor) -> State:
    return update(empty_state(scores.shape[:-1], v.shape[-1], v), scores, v)


def close_states(a: State, b: State) -> None:
    close(a.m, b.m)
    close(a.l, b.l)
    close(a.o, b.o)


# --- the softmax ---------------------------------------------------------------------------------------------------

@settings(deadline=None)
@given(length=st.integers(1, 70), tile=st.integers(1, 80), rows=st.integers(1, 4), magnitude=MAGNITUDES, dtype=DTYPES,
       seed=st.integers(0, 1000))
def test_equals_torch_softmax(length: int, tile: int, rows: int, magnitude: float, dtype: torch.dtype,
                              seed: int) -> None:
    """F4.2: any length, any tile, scores up to tens of thousands."""
    scores = draw(rows, length, seed=seed, dtype=dtype) * magnitude
    close(online_softmax(scores, tile), torch.softmax(scores, -1))


def test_the_trace_by_hand() -> None:
    """F4.2: scores 1, 3 | 2, 5 | 4 in tiles of two: m grows to 3, 5, 5, and l is scaled each time it does."""
    trace: list[Trace] = []
    online_softmax(torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0], dtype=torch.float64), 2, trace)
    e = torch.tensor(1.0, dtype=torch.float64).exp()
    assert [(t.keys.start, t.keys.stop) for t in trace] == [(0, 2), (2, 4), (4, 5)]
    assert [t.state.m.item() for t in trace] == [3, 5, 5]
    first = e ** -2 + 1
    second = first * e ** -2 + e ** -3 + 1
    close(torch.stack([t.state.l for t in trace]), torch.stack([first, second, second + e ** -1]))


def test_scores_that_overflow_a_plain_softmax() -> None:
    """exp(1000) is infinite in float32, and so would be a sum that is not taken under a maximum."""
    scores = torch.tensor([[1000.0, 0.0, 1001.0, -3e38, 3e38, 3e38]])
    assert scores.exp().isinf().any()
    assert online_softmax(scores, 2).tolist() == [[0, 0, 0, 0, 0.5, 0.5]]


@pytest.mark.parametrize("tile", [1, 2, 3, 7])
def test_minus_infinity_is_a_key_that_is_not_there(tile: int) -> None:
    """Tiles of -inf at the beginning, in the middle, at the end; and a row that sees nothing."""
    inf = float("inf")
    scores = torch.tensor([[-inf, -inf, 1.0, -inf, -inf, 2.0, -inf], [-inf] * 7], dtype=torch.float64)
    out = online_softmax(scores, tile)
    close(out[0], torch.softmax(scores[0], -1))
    assert out[1].tolist() == [0] * 7


# --- attention -----------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=150)
@given(new=st.integers(1, 20), cached=st.integers(0, 20), heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
       tile_q=st.integers(1, 24), tile_k=st.integers(1, 24), window=st.none() | st.integers(1, 30),
       num_sinks=st.integers(0, 6), magnitude=MAGNITUDES, dtype=DTYPES, seed=st.integers(0, 1000))
def test_tiled_attention_equals_the_masked_reference(new: int, cached: int, heads: tuple[int, int], tile_q: int,
                                                     tile_k: int, window: int | None, num_sinks: int,
                                                     magnitude: float, dtype: torch.dtype, seed: int) -> None:
    """F4.2, F4.6: prompts, chunks behind a prefix and decodes; grouped heads, windows, sinks; any tiles."""
    length = cached + new
    q = draw(new, heads[0], HEAD_DIM, seed=seed, dtype=dtype) * magnitude
    k, v = (draw(length, heads[1], HEAD_DIM, seed=seed + i, dtype=dtype) for i in (1, 2))
    mask = visible(torch.arange(cached, length), torch.arange(length), window, num_sinks)
    expected = masked_attention(q, k, v, mask, HEAD_DIM ** -0.5)
    out = tiled_attention(q, k, v, tile_q, tile_k, window=window, num_sinks=num_sinks)
    # In float32 the two round scores of this size differently, each by about magnitude x 1e-7.
    tolerance = 1e-12 * max(1, magnitude) if dtype is torch.float64 else 1e-5 * max(1, magnitude)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_a_mask_equals_sdpa(dtype: torch.dtype) -> None:
    q, k, v = (draw(n, 2, HEAD_DIM, seed=n, dtype=dtype) for n in (9, 33, 34))
    v = v[:33]
    out = tiled_attention(q, k, v, 4, 5, causal=False, scale=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(0, 1) for x in (q, k, v)), scale=0.3).transpose(0, 1)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-2 if dtype is torch.bfloat16 else 1e-6)


def test_a_tile_of_which_nothing_is_visible_is_not_computed() -> None:
    """F4.6: of 4 x 4 tiles a causal mask leaves 10; a window of one tile's width and a sink leave fewer."""
    x = draw(16, 1, HEAD_DIM)

    def computed(window: int | None, num_sinks: int) -> list[tuple[int, int]]:
        trace: list[Trace] = []
        tiled_attention(x, x, x, 4, 4, window=window, num_sinks=num_sinks, trace=trace)
        return [(t.queries.start // 4, t.keys.start // 4) for t in trace]

    assert computed(None, 0) == [(i, j) for i in range(4) for j in range(i + 1)]
    assert computed(4, 0) == [(0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]
    assert computed(1, 1) == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 2), (3, 0), (3, 3)]


def test_the_trace_holds_the_state_after_each_tile() -> None:
    """Each state is the softmax over the keys so far: its sum, its maximum and its output."""
    q, k, v = draw(6, 1, HEAD_DIM, seed=1), draw(6, 1, HEAD_DIM, seed=2), draw(6, 1, HEAD_DIM, seed=3)
    trace: list[Trace] = []
    tiled_attention(q, k, v, 6, 2, causal=False, scale=1.0, trace=trace)
    assert [t.keys for t in trace] == [range(2), range(2, 4), range(4, 6)]
    for t in trace:
        scores = q[:, 0] @ k[:t.keys.stop, 0].T
        close(t.scores[0], scores[:, t.keys.start:])
        close(t.state.m[0], scores.amax(-1))
        close(log_sum_exp(t.state)[0], scores.logsumexp(-1))
        close(finish(t.state)[0], torch.softmax(scores, -1) @ v[:t.keys.stop, 0])


# --- merging -------------------------------------------------------------------------------------------------------

def parts(count: int, magnitude: float, seed: int, hole: int) -> tuple[list[State], Tensor, Tensor]:
    """States of `count` parts of the keys, one of them of keys nobody sees; and all scores and values."""
    scores, v = draw(3, 5 * count, seed=seed) * magnitude, draw(5 * count, HEAD_DIM, seed=seed + 1)
    scores[:, 5 * hole:5 * hole + 5] = float("-inf")
    return [state_of(scores[:, i:i + 5], v[i:i + 5]) for i in range(0, 5 * count, 5)], scores, v


merges = given(magnitude=MAGNITUDES, seed=st.integers(0, 1000), hole=st.integers(0, 2))


@merges
def test_merge_is_commutative_to_the_last_bit(magnitude: float, seed: int, hole: int) -> None:
    """F4.5."""
    (a, b, _), _, _ = parts(3, magnitude, seed, hole)
    ab, ba = merge(a, b), merge(b, a)
    assert all(torch.equal(getattr(ab, name), getattr(ba, name)) for name in ("m", "l", "o"))


@merges
def test_merge_is_associative(magnitude: float, seed: int, hole: int) -> None:
    """F4.5: up to the rounding of float64."""
    (a, b, c), _, _ = parts(3, magnitude, seed, hole)
    close_states(merge(merge(a, b), c), merge(a, merge(b, c)))


@merges
def test_having_seen_nothing_is_the_identity(magnitude: float, seed: int, hole: int) -> None:
    """F4.5: exactly, from both sides; and two that have seen nothing have seen nothing."""
    states, _, _ = parts(3, magnitude, seed, hole)
    nothing = empty_state((3,), HEAD_DIM, states[0].o)
    for state in (*states, nothing):
        for merged in (merge(state, nothing), merge(nothing, state)):
            assert all(torch.equal(getattr(merged, name), getattr(state, name)) for name in ("m", "l", "o"))
    assert finish(merge(nothing, nothing)).tolist() == [[0] * HEAD_DIM] * 3


@merges
def test_an_update_is_a_merge_with_the_tile(magnitude: float, seed: int, hole: int) -> None:
    (a, b, c), scores, v = parts(3, magnitude, seed, hole)
    one_by_one = update(update(a, scores[:, 5:10], v[5:10]), scores[:, 10:], v[10:])
    close_states(one_by_one, reduce(merge, [a, b, c]))
    close(finish(one_by_one), torch.softmax(scores, -1) @ v)


def test_merging_adds_exactly_where_nothing_is_rounded() -> None:
    """F4.5: equal scores and whole values, so that every product and sum is a whole number: not one bit may differ."""
    v = torch.arange(24.0).view(12, 2)
    scores = torch.full((1, 12), 7.0)
    whole = state_of(scores, v)
    for cut in range(1, 12):
        merged = merge(state_of(scores[:, :cut], v[:cut]), state_of(scores[:, cut:], v[cut:]))
        assert all(torch.equal(getattr(merged, name), getattr(whole, name)) for name in ("m", "l", "o"))


@settings(deadline=None)
@given(length=st.integers(1, 60), new=st.integers(1, 3), num_splits=st.integers(1, 70), tile=st.integers(1, 20),
       window=st.none() | st.integers(1, 20), num_sinks=st.integers(0, 4), seed=st.integers(0, 100))
def test_split_kv_equals_one_pass(length: int, new: int, num_splits: int, tile: int, window: int | None,
                                  num_sinks: int, seed: int) -> None:
    """F4.5: splits of which some see nothing (a window), more splits than keys; decode and a few drafted tokens."""
    length = max(length, new)
    q = draw(new, 4, HEAD_DIM, seed=seed)
    k, v = (draw(length, 2, HEAD_DIM, seed=seed + i) for i in (1, 2))
    mask = visible(torch.arange(length - new, length), torch.arange(length), window, num_sinks)
    out = split_kv_attention(q, k, v, num_splits, tile, window=window, num_sinks=num_sinks)
    close(out, masked_attention(q, k, v, mask, HEAD_DIM ** -0.5))


def test_ring_of_devices() -> None:
    """F4.5: keys lie on four devices and travel round; each device starts with its own, and all agree with one pass.

    Device d holds queries and keys of shard d. In turn t it meets the keys of device d - t, so the order in which the
    states are merged differs from device to device.
    """
    num_devices, size = 4, 6
    scores = draw(num_devices * size, num_devices * size, seed=5)
    v = draw(num_devices * size, HEAD_DIM, seed=6)
    shards = [slice(d * size, (d + 1) * size) for d in range(num_devices)]
    out = []
    for d in range(num_devices):
        state = empty_state((size,), HEAD_DIM, v)
        for turn in range(num_devices):
            keys = shards[(d - turn) % num_devices]
            state = merge(state, state_of(scores[shards[d], keys], v[keys]))
        out.append(finish(state))
    close(torch.cat(out), torch.softmax(scores, -1) @ v)


def test_any_order_of_merging_gives_the_same() -> None:
    """F4.5: a hundred random trees over sixteen parts."""
    states, scores, v = parts(16, 3.0, seed=9, hole=4)
    dice = random.Random(0)
    for _ in range(100):
        pool = list(states)
        while len(pool) > 1:
            a, b = (pool.pop(dice.randrange(len(pool))) for _ in range(2))
            pool.append(merge(a, b))
        close(finish(pool[0]), torch.softmax(scores, -1) @ v)
