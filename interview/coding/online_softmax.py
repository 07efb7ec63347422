"""Attention of one query over keys that come in blocks: the online softmax, with a mask.

No score of an earlier block is looked at again, and no row of all scores ever exists. That is what lets attention run
in tiles, over pages, and over several devices.
"""
from __future__ import annotations

import torch
from torch import Tensor


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, block_size: int) -> Tensor:
    """softmax(q k^T / sqrt(D), over visible keys) v, from one pass over blocks of `block_size` keys.

    q [D], k [N, D], v [N, D] float32, visible [N] bool -> [D] float32.

    Keep three things between blocks: the largest score so far, the sum of exponentials relative to it, and the
    weighted sum of values relative to it. When a block brings a larger score, rescale the other two.

    A block may have no visible key, also the first one. With no visible key at all, and with N = 0, the result is 0.
    Scores may be in the thousands: no overflow, no NaN. Never build a tensor with N scores.
    """
    largest = torch.tensor(float("-inf"))
    total, out = torch.tensor(0.0), torch.zeros_like(q)
    for start in range(0, k.shape[0], block_size):
        seen = visible[start:start + block_size]
        if not seen.any():
            continue
        scores = k[start:start + block_size][seen] @ q / q.shape[0] ** 0.5
        new = torch.maximum(largest, scores.max())
        weights, old = torch.exp(scores - new), torch.exp(largest - new)
        total = total * old + weights.sum()
        out = out * old + weights @ v[start:start + block_size][seen]
        largest = new
    return out / total if total > 0 else out
