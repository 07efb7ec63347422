"""The idea of this milestone: a softmax, a tile at a time, so that its scores need never all be there.

    for each tile of keys:     m' = max(m, scores)       c  = exp(m - m')
                               l' = l * c + sum exp(scores - m')
                               o' = o * c + exp(scores - m') @ values
    in the end:                o / l

A maximum of the tiles so far will do: when a larger one comes, what was summed under the old one is scaled by c.
And two such states of different keys merge into one, so several workers can share the keys of one query.
r rows (queries), L keys, t keys of a tile, D head size. Run me: python m4_flash_attn/idea.py
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class State(NamedTuple):
    """What the rows remember of the keys that they have seen, however many those are."""

    m: Tensor               # [r]: the largest score
    l: Tensor               # [r]: sum of exp(score - m)   # noqa: E741 - the papers' letter
    o: Tensor               # [r, D]: sum of exp(score - m) * value


def update(state: State, scores: Tensor, v: Tensor) -> State:
    """One more tile: scores [r, t], values [t, D]."""
    m = torch.maximum(state.m, scores.amax(dim=1))
    p, c = torch.exp(scores - m[:, None]), torch.exp(state.m - m)       # at most 1: nothing overflows
    return State(m, state.l * c + p.sum(dim=1), state.o * c[:, None] + p @ v)


def merge(a: State, b: State) -> State:
    """Rows that have seen what `a` has seen and what `b` has seen, no key twice."""
    m = torch.maximum(a.m, b.m)
    ca, cb = torch.exp(a.m - m), torch.exp(b.m - m)
    return State(m, a.l * ca + b.l * cb, a.o * ca[:, None] + b.o * cb[:, None])


def look_at(q: Tensor, k: Tensor, v: Tensor, tile: int) -> State:
    """q [r, D] meets k, v [L, D] tile by tile. (A causal order would leave out the keys behind each query.)"""
    state = State(torch.full((len(q),), float("-inf")), torch.zeros(len(q)), torch.zeros_like(q))
    for keys, values in zip(k.split(tile), v.split(tile), strict=True):
        state = update(state, q @ keys.T / q.shape[1] ** 0.5, values)
    return state


def finish(state: State) -> Tensor:
    """[r, D]: the attention output, by the only division."""
    return state.o / state.l[:, None]


class Largest(TorchFunctionMode):
    """Watches what torch makes, and notes how many numbers the largest tensor has."""
    numel = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, out.numel() if isinstance(out, Tensor) else 0)
        return out


if __name__ == "__main__":
    torch.manual_seed(0)
    state, scores = State(torch.full((1,), float("-inf")), torch.zeros(1), torch.zeros(1, 1)), [1.0, 3.0, 2.0, 5.0, 4.0]
    for tile in torch.tensor([scores]).split(2, dim=1):
        state = update(state, tile, tile.T)                             # each score is its own value
        print(f"scores {tile[0].tolist()}: m {state.m.item():.0f}  l {state.l.item():.4f}  o {state.o.item():.4f}")
    q, k, v = torch.randn(64, 64), torch.randn(4096, 64), torch.randn(4096, 64)
    with Largest() as plain:
        expected = torch.softmax(q @ k.T / 8, dim=1) @ v
    with Largest() as tiled:
        out = finish(look_at(q, k, v, tile=64))
    shared = finish(merge(look_at(q, k[:1000], v[:1000], tile=64), look_at(q, k[1000:], v[1000:], tile=256)))
    assert torch.allclose(out, expected, atol=1e-5) and torch.allclose(shared, expected, atol=1e-5)
    assert (plain.numel, tiled.numel) == (64 * 4096, 64 * 64)
    print(f"4,096 keys at once: {plain.numel:,} scores in one tensor; by tiles none above {tiled.numel:,}, same output")
