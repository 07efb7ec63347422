"""The textbook's rejection sampler (Leviathan et al., 2023, algorithm 1), to read and to compare.

    a guess x, drawn from q      kept with probability min(1, p(x) / q(x))
    refused                      drawn anew from what q left over: max(0, p - q), normalised

What comes out is distributed as p. So is what this engine does (speculation.py): it draws from p with the number that
it would have drawn with anyway, and keeps a guess that is the same. The two keep different shares of the guesses.
"""
from __future__ import annotations

import torch
from torch import Tensor


def speculative_sample(p: Tensor, q: Tensor, drafts: list[int], accept: Tensor, resample: Tensor) -> list[int]:
    """One step for one sequence: p [k + 1, V] of the target, q [k, V] of the drafter, the k guesses drawn from q.

    `accept` [k] and `resample` [k + 1] are uniform numbers in [0, 1). Returns the kept guesses, and one token more.
    Guess i is kept if accept[i] is below p(x) / q(x). At the first that is not, the last token is drawn by `invert`
    with resample[i] from what q left over; if all are kept, from p[k] with resample[k].
    """
    for i, token in enumerate(drafts):
        if accept[i] * q[i, token] >= p[i, token]:
            rest = (p[i] - q[i]).clamp(min=0)
            return [*drafts[:i], invert(rest / rest.sum(), resample[i])]
    return [*drafts, invert(p[len(drafts)], resample[len(drafts)])]


def invert(probabilities: Tensor, number: Tensor) -> int:
    """probabilities [V], a number in [0, 1) -> the token in whose share of the running sum the number falls."""
    cumulative = probabilities.double().cumsum(-1)
    found = torch.searchsorted(cumulative, number.double() * cumulative[-1], right=True)
    return min(int(found), len(probabilities) - 1)


def kept_by_rejection(p: Tensor, q: Tensor) -> float:
    """p, q [V] -> how often a guess drawn from q is kept: the mass that both have."""
    return float(torch.minimum(p, q).sum())


def kept_by_same_draw(p: Tensor, q: Tensor) -> float:
    """p, q [V] -> how often p and q give the same token for the same number: where their running sums overlap."""
    ends_p, ends_q = p.double().cumsum(-1), q.double().cumsum(-1)
    overlap = torch.minimum(ends_p, ends_q) - torch.maximum(ends_p - p, ends_q - q)
    return float(overlap.clamp(min=0).sum())
