"""Attention in one pass over the keys, a tile at a time, without ever holding a row of scores.

A softmax seems to need all scores first: for their maximum, then for their sum. But a maximum of the tiles seen so far
will do, if what was summed under an older maximum is scaled by exp(old - new). So a query row remembers three things,
whatever the number of keys: the maximum m, the sum l, and the weighted sum of values o.

Two such states merge into one, in any order: that is all there is to split-KV decoding and to ring attention.
Sources: Milakov and Gimelshein, arXiv 1805.02867 (m and l); FlashAttention, 2205.14135 (o); FlashAttention-2,
2307.08691 (queries outside, keys inside, one division at the end).

n queries, L keys, t keys of a tile, r rows: a row is one query of one head; H_q / H_kv query / key-value heads,
G = H_q / H_kv, D head size.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .reference import visible

Mask = Callable[[range, range], Tensor]         # queries, keys of a tile -> [n, t], True where one sees the other


@dataclass(frozen=True)
class State:
    """What the rows know of the keys they have seen. Every tensor may have dimensions in front, as for heads."""

    m: Tensor           # [..., r]: largest score, -inf before the first
    l: Tensor           # [..., r]: sum of exp(score - m)   # noqa: E741 - the papers' letter
    o: Tensor           # [..., r, D]: sum of exp(score - m) * value


@dataclass(frozen=True)
class Trace:
    """One tile: which queries met which keys, and what they knew afterwards."""

    queries: range
    keys: range
    scores: Tensor      # [..., r, t]: -inf where a key is not visible
    state: State


def empty_state(shape: tuple[int, ...], head_dim: int, like: Tensor) -> State:
    """Nothing seen yet, for rows of `shape`; the identity of `merge`. Type and device of `like`."""
    return State(like.new_full(shape, float("-inf")), like.new_zeros(shape), like.new_zeros(*shape, head_dim))


def update(state: State, scores: Tensor, v: Tensor) -> State:
    """`state` after one more tile: scores [..., r, t], values v [..., t, D]."""
    m = torch.maximum(state.m, scores.amax(dim=-1))
    reference = _finite(m)
    p = torch.exp(scores - reference.unsqueeze(-1))             # at most 1: nothing overflows
    correction = torch.exp(state.m - reference)                 # 1 where the maximum stays, 0 at the first tile
    return State(m, state.l * correction + p.sum(dim=-1), state.o * correction.unsqueeze(-1) + p @ v)


def merge(a: State, b: State) -> State:
    """The state of rows that have seen what `a` has seen and what `b` has seen (no key twice).

    Commutative, and associative up to rounding; `empty_state` changes nothing.
    """
    m = torch.maximum(a.m, b.m)
    reference = _finite(m)
    wa, wb = torch.exp(a.m - reference), torch.exp(b.m - reference)
    return State(m, a.l * wa + b.l * wb, a.o * wa.unsqueeze(-1) + b.o * wb.unsqueeze(-1))


def finish(state: State) -> Tensor:
    """[..., r, D]: the attention output. The only division; a row that has seen no key gets 0."""
    return _divide(state.o, state.l)


def log_sum_exp(state: State) -> Tensor:
    """[..., r]: m + log l, the one number beside the output from which a kernel can still merge; -inf: nothing seen."""
    return state.m + torch.log(state.l)


def online_softmax(scores: Tensor, tile: int, trace: list[Trace] | None = None) -> Tensor:
    """Softmax over the last dimension of scores [..., L]: one pass finds m and l, a second one writes the result.

    Two readings of the scores instead of three. A row of -inf alone gives 0, where `torch.softmax` gives NaN.
    """
    state = empty_state(scores.shape[:-1], 0, scores)           # no values yet: o has no columns
    for keys in tiles(range(scores.shape[-1]), tile):
        part = scores[..., keys.start:keys.stop]
        state = update(state, part, part.new_empty(len(keys), 0))
        if trace is not None:
            trace.append(Trace(range(1), keys, part, state))
    return _divide(torch.exp(scores - _finite(state.m).unsqueeze(-1)), state.l)


def tiled_attention(q: Tensor, k: Tensor, v: Tensor, tile_q: int = 64, tile_k: int = 64, causal: bool = True,
                    window: int | None = None, num_sinks: int = 0, scale: float | None = None,
                    trace: list[Trace] | None = None) -> Tensor:
    """q [n, H_q, D], the newest n of the L tokens in k, v [L, H_kv, D] -> [n, H_q, D].

    `window` and `num_sinks` as in `reference.visible`, together with `causal` only; `scale` is 1 / sqrt(D) unless
    given. No more than H_kv x (tile_q x G) x tile_k scores exist at a time. `trace` gets an entry for each tile that is
    computed: one of which nothing is visible is not.
    """
    n, length = q.shape[0], k.shape[0]
    mask = _mask(length - n, causal, window, num_sinks, q.device)
    rows, k, v = _by_kv_head(q, k, v, scale)
    states = [attend(rows, k, v, queries, range(length), tile_k, mask, trace) for queries in tiles(range(n), tile_q)]
    return torch.cat([_by_token(finish(state), rows.shape[2]) for state in states]).to(q.dtype)


def split_kv_attention(q: Tensor, k: Tensor, v: Tensor, num_splits: int, tile_k: int = 64, causal: bool = True,
                       window: int | None = None, num_sinks: int = 0, scale: float | None = None) -> Tensor:
    """As `tiled_attention`, the keys divided among up to `num_splits` workers that know nothing of each other.

    FlashDecoding does this because one query gives too little work for all cores; ring attention because the keys lie
    on several devices. What the workers hand over does not grow with the number of keys.
    """
    n, length = q.shape[0], k.shape[0]
    mask = _mask(length - n, causal, window, num_sinks, q.device)
    rows, k, v = _by_kv_head(q, k, v, scale)
    splits = tiles(range(length), -(-length // num_splits))
    parts = [attend(rows, k, v, range(n), keys, tile_k, mask) for keys in splits]
    return _by_token(finish(reduce(merge, parts)), rows.shape[2]).to(q.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, queries: range, keys: range, tile_k: int, mask: Mask,
           trace: list[Trace] | None = None) -> State:
    """The inner loop: some queries meet some keys, tile by tile. q [H_kv, n, G, D], scaled; k, v [H_kv, L, D].

    The G heads that share keys are rows of one tile: its keys and values are read once for all of them. Returns the
    state of all rows, [H_kv, r] with r = len(queries) * G: the G heads of the first query, then those of the second.
    `mask(queries, tile)` is True where a query sees a key; a tile of which no query sees anything is left out.
    """
    rows = q[:, queries.start:queries.stop].flatten(1, 2)       # [H_kv, r, D], r = len(queries) * G
    state = empty_state(rows.shape[:2], rows.shape[2], rows)
    for tile in tiles(keys, tile_k):
        seen = mask(queries, tile)
        if not seen.any():
            continue
        here = slice(tile.start, tile.stop)
        scores = (rows @ k[:, here].mT).masked_fill(~seen.repeat_interleave(q.shape[2], dim=0), float("-inf"))
        state = update(state, scores, v[:, here])
        if trace is not None:
            trace.append(Trace(queries, tile, scores, state))
    return state


def tiles(positions: range, size: int) -> list[range]:
    """`positions` in pieces of `size`; the last one may be shorter."""
    return [positions[i:i + size] for i in range(0, len(positions), size)]


def _mask(offset: int, causal: bool, window: int | None, num_sinks: int, device: torch.device) -> Mask:
    """For a tile's queries and keys: who sees whom, [queries, keys]. Query i stands at position offset + i."""
    assert causal or window is None, "a window looks back from a query's position, so it needs a causal order"

    def mask(queries: range, keys: range) -> Tensor:
        q, k = (torch.arange(r.start, r.stop, device=device) for r in (queries, keys))
        return visible(q + offset, k, window, num_sinks) if causal else q.new_ones(len(q), len(k), dtype=torch.bool)
    return mask


def _by_kv_head(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """q [n, H_q, D] -> [H_kv, n, G, D], scaled; k, v [L, H_kv, D] -> [H_kv, L, D]; float32, or float64 if q is."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    q = q.unflatten(1, (k.shape[1], -1)).transpose(0, 1) * (q.shape[2] ** -0.5 if scale is None else scale)
    return q, k.transpose(0, 1), v.transpose(0, 1)


def _by_token(out: Tensor, group: int) -> Tensor:
    """[H_kv, r, D] -> [n, H_q, D]."""
    return out.unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)


def _divide(x: Tensor, total: Tensor) -> Tensor:
    """Each row of x [..., r, c] by its total [..., r]; rows that have seen nothing are 0, and stay 0."""
    return x / torch.where(total == 0, 1, total).unsqueeze(-1)


def _finite(m: Tensor) -> Tensor:
    """m, but 0 for a row that has seen no visible key: -inf - -inf would be NaN, and exp(-inf - 0) is the 0 wanted."""
    return torch.where(m == float("-inf"), 0, m)
