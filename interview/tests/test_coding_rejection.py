"""Speculative sampling: cases by hand, and the distribution of the first tokens against the large model's."""
from __future__ import annotations

import torch

from interview.coding.rejection_sampler import verify


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def uniforms(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


Q = rows([0.5, 0.5, 0.0], [0.2, 0.2, 0.6])
P = rows([0.25, 0.25, 0.5], [0.1, 0.3, 0.6], [0.0, 0.4, 0.6])


def test_all_accepted_brings_one_more() -> None:
    assert verify(torch.tensor([0, 2]), Q, P, uniforms(0.49, 0.99, 0.39)) == [0, 2, 1]
    assert verify(torch.tensor([0, 2]), Q, P, uniforms(0.49, 0.99, 0.41)) == [0, 2, 2]


def test_the_first_refusal_ends_it() -> None:
    """p - q is positive for token 2 only, whatever the uniform; then for token 1 only."""
    assert verify(torch.tensor([0, 2]), Q, P, uniforms(0.5, 0.0, 0.0)) == [2]
    assert verify(torch.tensor([0, 0]), Q, P, uniforms(0.0, 0.5, 0.99)) == [0, 1]


def test_no_token_of_probability_zero_is_ever_drawn() -> None:
    p = rows([0.0, 1.0, 0.0])
    assert verify(torch.tensor([], dtype=torch.int64), p[:0], p, uniforms(0.0)) == [1]
    assert verify(torch.tensor([], dtype=torch.int64), p[:0], p, uniforms(1 - 2.0 ** -53)) == [1]


def test_equal_models_refuse_nothing() -> None:
    p = rows([0.3, 0.7], [0.6, 0.4])
    assert verify(torch.tensor([1]), p[:1], p, uniforms(1 - 2.0 ** -53, 0.0)) == [1, 0]


def test_the_distribution_is_the_large_model_s() -> None:
    """The first token over a fine grid of uniforms, summed exactly: guess by guess, weighed by q."""
    q, p = rows([0.6, 0.3, 0.1]), rows([0.2, 0.3, 0.5], [1.0, 0.0, 0.0])
    grid = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    seen = torch.zeros(3, dtype=torch.float64)
    for guess in range(3):
        accepted = sum(verify(torch.tensor([guess]), q, p, uniforms(float(u), 0.5))[0] == guess for u in grid)
        seen[guess] += q[0, guess] * accepted / 200
        if accepted < 200:
            for u in grid:                                          # 1 - 2^-53 is refused if anything is
                token = verify(torch.tensor([guess]), q, p, uniforms(1 - 2.0 ** -53, float(u)))[0]
                seen[token] += q[0, guess] * (200 - accepted) / 200 / 200
    assert torch.allclose(seen, p[0], atol=0.01)
