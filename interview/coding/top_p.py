"""The nucleus of top-p sampling, for a batch in which every row has its own p.

The nucleus is the smallest set of most likely tokens whose probability reaches p. So it contains the token that
crosses p, and it is never empty.
"""
from __future__ import annotations

import torch
from torch import Tensor


def keep_nucleus(logits: Tensor, top_p: Tensor) -> Tensor:
    """`logits` with -inf outside each row's nucleus.

    logits [B, V] float32, top_p [B] float32 in (0, 1] -> [B, V].

    - Kept is the smallest number of most likely tokens whose probabilities add up to at least p (softmax of the row).
    - Of equal tokens the one with the lower id comes first.
    - A row with p = 1 stays exactly as it is. The most likely token is always kept.
    - `logits` itself is not changed. No loop over rows or over the vocabulary.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    mass = ordered.softmax(-1)
    before = mass.cumsum(-1) - mass                             # of all tokens that are more likely
    outside = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    outside[:, 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, ids, outside), float("-inf"))
