"""The nucleus against its definition, row by row."""
from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from interview.coding.top_p import keep_nucleus

INF = float("inf")


def test_the_token_that_crosses_p_is_kept() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.3, 0.1]]))
    kept = keep_nucleus(logits, torch.tensor([0.6])).isfinite()
    assert kept.tolist() == [[False, True, True, False]]


def test_one_row_one_p_and_ties_by_id() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [5.0, 1.0, 0.0, -1.0], [0.0, 1.0, 2.0, 3.0]])
    before = logits.clone()
    got = keep_nucleus(logits, torch.tensor([0.5, 0.1, 1.0]))
    assert got.isfinite().tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    assert torch.equal(logits, before)
    assert torch.equal(got[2], before[2])


def test_p_of_one_keeps_what_rounding_calls_zero() -> None:
    logits = torch.tensor([[200.0, 0.0, -200.0]])
    assert torch.equal(keep_nucleus(logits, torch.tensor([1.0])), logits)


@given(st.lists(st.lists(st.integers(-6, 6), min_size=5, max_size=5), min_size=1, max_size=4),
       st.lists(st.integers(1, 20), min_size=4, max_size=4))
def test_equals_the_definition(rows: list[list[int]], twentieths: list[int]) -> None:
    """Greedily: take the most likely token, lowest id first, until the mass reaches p."""
    logits = torch.tensor(rows, dtype=torch.float32)
    top_p = torch.tensor([(t - 0.5) / 20 for t in twentieths[:len(rows)]])      # no sum of such rows lies on p
    got = keep_nucleus(logits, top_p)
    for row, p, kept in zip(logits, top_p.tolist(), got, strict=True):
        probabilities = torch.softmax(row.double(), 0).tolist()
        expected, mass = set(), 0.0
        for i in sorted(range(5), key=lambda i: (-probabilities[i], i)):
            if mass >= p and abs(mass - p) > 1e-6:
                break
            expected.add(i)
            mass += probabilities[i]
        assert set(torch.nonzero(kept.isfinite()).flatten().tolist()) == expected
        assert torch.equal(kept[kept.isfinite()], row[kept.isfinite()])
