"""The idea of this milestone: the keys and values of a token never change, so keep them.

    without a cache    run [a b c]   run [a b c d]   run [a b c d e]      every step runs the whole text
    with a cache       run [a b c]   run       [d]   run         [e]      every step runs what is new

A token sees itself and earlier ones only. So what later tokens bring changes neither its vector in any layer nor the
key and the value that are made from it.
n new tokens, L tokens in all, H heads, D head size, E = H * D. Run me: python m1_offline/idea.py
"""
from __future__ import annotations

import torch
from torch import Tensor

HEADS, HEAD_DIM, LAYERS, VOCAB, MAX_LEN = 2, 16, 3, 100, 128
WIDTH = HEADS * HEAD_DIM


class KVCache:
    """Room for the keys and values of one sequence, in every layer: [LAYERS, MAX_LEN, H, D]."""

    def __init__(self) -> None:
        self.k, self.v = (torch.full((LAYERS, MAX_LEN, HEADS, HEAD_DIM), float("nan")) for _ in range(2))
        self.length = 0


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [n, H, D], the newest n of the L tokens in k, v [L, H, D] -> [n, H, D]."""
    n, length = len(q), len(k)
    visible = torch.ones(n, length, dtype=torch.bool).tril(length - n)      # query i is token L - n + i
    scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, float("-inf")).softmax(dim=-1), v)


def forward(ids: list[int], cache: KVCache, model: dict[str, Tensor]) -> Tensor:
    """Run the new tokens `ids`, which follow those in the cache -> logits [vocab] for the next one."""
    start, cache.length = cache.length, cache.length + len(ids)
    x = model["embedding"][ids]
    for layer in range(LAYERS):
        q, k, v = (x @ model["qkv"][layer]).view(-1, 3, HEADS, HEAD_DIM).unbind(1)
        cache.k[layer, start:cache.length], cache.v[layer, start:cache.length] = k, v       # store, then attend
        out = attend(q, cache.k[layer, :cache.length], cache.v[layer, :cache.length])
        x = x + out.flatten(1) @ model["out"][layer]
    return x[-1] @ model["head"]


def multiplications(n: int, length: int) -> int:
    """What `forward` takes for n new tokens of `length` in all: the weights, keys and values, the head."""
    return LAYERS * (n * 4 * WIDTH * WIDTH + 2 * n * length * WIDTH) + WIDTH * VOCAB


def generate(prompt: list[int], num_new: int, model: dict[str, Tensor], keep: bool) -> tuple[list[int], list[int]]:
    """The new tokens, and the multiplications that each of them took."""
    ids, cache, costs = list(prompt), KVCache(), list[int]()
    for _ in range(num_new):
        if not keep:
            cache = KVCache()
        new = ids[cache.length:]
        costs.append(multiplications(len(new), len(ids)))
        ids.append(int(forward(new, cache, model).argmax()))
    return ids[len(prompt):], costs


if __name__ == "__main__":
    torch.manual_seed(0)
    shapes = {"embedding": (VOCAB, WIDTH), "qkv": (LAYERS, WIDTH, 3 * WIDTH), "out": (LAYERS, WIDTH, WIDTH),
              "head": (WIDTH, VOCAB)}
    model = {name: torch.randn(shape) / shape[-2] ** 0.5 for name, shape in shapes.items()}
    model["embedding"] *= VOCAB ** 0.5
    prompt = list(range(32))
    recomputed, full = generate(prompt, 64, model, keep=False)
    tokens, cached = generate(prompt, 64, model, keep=True)
    assert tokens == recomputed and len(set(tokens)) > 5
    print("multiplications for      without a cache    with one")
    for i in (0, 1, 31, 63):
        print(f"  new token {i + 1:2}           {full[i]:12,}{cached[i]:12,}")
    assert cached[0] == full[0] and all(b < a / 20 for a, b in zip(full[1:], cached[1:], strict=True))
    print(f"  all 64                 {sum(full):12,}{sum(cached):12,}    the same tokens")
