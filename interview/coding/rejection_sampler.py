"""Speculative sampling: guesses of a small model, accepted so that the large model's distribution is unchanged.

Guess x, drawn from q, is accepted with probability min(1, p(x) / q(x)). At the first refusal the token is drawn from
the positive part of p - q, normalised. If all are accepted there is one more token, from p, for nothing.
"""
from __future__ import annotations

import torch
from torch import Tensor


def verify(guesses: Tensor, q: Tensor, p: Tensor, uniforms: Tensor) -> list[int]:
    """The tokens of one verification: the accepted guesses, and one token behind them.

    guesses [k] int64, drawn from the rows of q; q [k, V] the small model's probabilities; p [k + 1, V] the large
    model's; uniforms [k + 1] in [0, 1). All float64. Returns 1 to k + 1 token ids.

    - Guess i is accepted if uniforms[i] < p[i, x] / q[i, x]. (q[i, x] > 0, since x was drawn from it.)
    - At the first guess i that is refused: draw from max(p[i] - q[i], 0), normalised, and stop.
    - If none is refused: draw from p[k].
    - That last token is drawn with the last uniform u = uniforms[k], by the inverse of the cumulative sum: the first
      token whose cumulative probability is greater than u. It never has probability 0, whatever rounding does.
    """
    for i, token in enumerate(guesses.tolist()):
        if uniforms[i] * q[i, token] >= p[i, token]:
            rest = (p[i] - q[i]).clamp(min=0)
            # Equal p and q refuse nothing; what is left then is rounding, and p itself is right.
            return [*guesses[:i].tolist(), _draw(rest if rest.sum() > 0 else p[i], uniforms[-1])]
    return [*guesses.tolist(), _draw(p[-1], uniforms[-1])]


def _draw(weights: Tensor, uniform: Tensor) -> int:
    """The first token whose cumulative share of `weights` is greater than `uniform`."""
    cumulative = weights.cumsum(0)
    above = (cumulative > uniform * cumulative[-1]) & (weights > 0)
    likely = torch.nonzero(above if above.any() else weights > 0)
    return int(likely[0] if above.any() else likely[-1])
