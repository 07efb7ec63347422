"""The online softmax against the softmax over all scores, in float64."""
from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interview.coding.online_softmax import attend_in_blocks


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    if not visible.any():
        return torch.zeros_like(q)
    q, k, v = q.double(), k.double()[visible], v.double()[visible]
    return (torch.softmax(k @ q / q.shape[0] ** 0.5, dim=0) @ v).float()


@given(seed=st.integers(0, 10_000), n=st.integers(0, 40), block=st.integers(1, 17),
       share=st.sampled_from([0.0, 0.3, 1.0]))
def test_equals_the_softmax_over_everything(seed: int, n: int, block: int, share: float) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(8, generator=g), torch.randn(n, 8, generator=g), torch.randn(n, 8, generator=g)
    visible = torch.rand(n, generator=g) < share
    got = attend_in_blocks(q, k, v, visible, block)
    assert torch.allclose(got, reference(q, k, v, visible), atol=1e-5)


@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_scores_in_the_thousands(factor: float) -> None:
    q = torch.full((4,), 100.0)
    k = torch.arange(12.0)[:, None].expand(12, 4) * factor * 10
    v = torch.eye(12, 4)
    got = attend_in_blocks(q, k, v, torch.ones(12, dtype=torch.bool), 5)
    assert torch.allclose(got, reference(q, k, v, torch.ones(12, dtype=torch.bool)), atol=1e-6)


def test_a_first_block_without_a_visible_key() -> None:
    v = torch.eye(4)
    visible = torch.tensor([False, False, False, True])
    assert torch.equal(attend_in_blocks(torch.ones(4), torch.ones(4, 4), v, visible, 2), v[3])
    assert torch.equal(attend_in_blocks(torch.ones(4), torch.ones(4, 4), v, ~visible & visible, 2), torch.zeros(4))
