"""The idea of this milestone: a decoder reads all tokens so far and says which comes next. Again and again.

    ids [T] -> embedding -> layer -> layer -> norm -> output matrix -> logits [T, vocab] -> the largest of the last row
                            each: x + attention(norm(x)), then x + mlp(norm(x))

Only attention looks at other tokens, and only at earlier ones. So row i of the logits depends on tokens 0 .. i alone.
T tokens, E size of a token's vector, H_q / H_kv query / key-value heads, D head size. Run me: python m0_basics/idea.py
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS, THETA = 1e-6, 10_000.0         # of the norm, and of the rotary frequencies


class Layer(NamedTuple):
    """Matrices are [out, in], as in a model's file: queries, keys and values in one, gate and up in one."""
    norm1: Tensor
    norm2: Tensor
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, E] divided by its root mean square, so that the next product sees numbers around 1."""
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def rotate(x: Tensor) -> Tensor:
    """x [T, H, D]: turned by an angle that grows with the position, so that q @ k depends on how far apart they are."""
    half = x.shape[2] // 2
    angles = torch.arange(len(x)).view(-1, 1, 1) * THETA ** (-torch.arange(half) / half)        # [T, 1, D / 2]
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)


def attention(x: Tensor, layer: Layer, heads: tuple[int, int]) -> Tensor:
    """x [T, E] -> [T, E]: a mean of the values up to each token, weighted by how well keys fit its query."""
    (num_heads, num_kv_heads), num_tokens = heads, len(x)
    qkv = (x @ layer.qkv.T).view(num_tokens, num_heads + 2 * num_kv_heads, -1)
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    q, k = rotate(q), rotate(k)
    k, v = (t.repeat_interleave(num_heads // num_kv_heads, dim=1) for t in (k, v))      # several query heads share one
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
    later = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(diagonal=1)
    weights = scores.masked_fill(later, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1) @ layer.out.T


def decoder(ids: Tensor, embedding: Tensor, layers: list[Layer], norm: Tensor, head: Tensor,
            heads: tuple[int, int]) -> Tensor:
    """ids [T] -> logits [T, vocab]; `heads` is (H_q, H_kv)."""
    x = embedding[ids]
    for layer in layers:
        x = x + attention(rms_norm(x, layer.norm1), layer, heads)
        gate, up = (rms_norm(x, layer.norm2) @ layer.gate_up.T).chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ layer.down.T
    return rms_norm(x, norm) @ head.T


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes, ones = ((64, 32), (32, 32), (96, 32), (32, 48)), torch.ones(32)
    layers = [Layer(ones, ones, *(torch.randn(size) * 2 / size[1] ** 0.5 for size in sizes)) for _ in range(2)]
    model = torch.randn(100, 32), layers, ones, torch.randn(100, 32), (4, 2)
    ids, num_run = torch.tensor([11, 22, 33, 44]), 0
    for _ in range(6):
        num_run += len(ids)
        ids = torch.cat((ids, decoder(ids, *model)[-1:].argmax(dim=-1)))
    print(f"a prompt of four tokens and six more: {ids.tolist()}")
    before, after = decoder(ids[:4], *model), decoder(ids, *model)[:4]
    assert torch.allclose(before, after, atol=1e-4) and before.std() > 1
    print(f"largest change in the prompt's logits when tokens follow: {(before - after).abs().max():.0e} (rounding)")
    print(f"tokens run for those six: {num_run}, of which {num_run - 9} had run before. m1 keeps what they left.")
