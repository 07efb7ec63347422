"""Perplexity against sums written out, and the same by a whole engine."""
from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m0_basics.config import ModelConfig
from m0_basics.loading.loader import load_model
from m6_prefix_cache import LLM
from m7_gptq.tools.perplexity import losses, perplexity, perplexity_of_llm, plain_logits, text_windows
from m7_gptq.tools.texts import evaluation_text

TINY = Path(__file__).parent / "tiny_qwen3"


def test_a_model_that_knows_nothing() -> None:
    windows = torch.randint(50, (3, 9))
    assert perplexity(lambda ids: torch.zeros(*ids.shape, 50), windows) == pytest.approx(50.0)


def test_losses_token_by_token() -> None:
    torch.manual_seed(0)
    table, windows = torch.randn(7, 7), torch.randint(7, (5, 6))

    def logits(ids: Tensor) -> Tensor:
        assert ids.shape[0] <= 2
        return table[ids]

    out = losses(logits, windows, batch=2)
    assert out.shape == (5, 5)
    for row, window in zip(out.tolist(), windows.tolist(), strict=True):
        for loss, before, token in zip(row, window, window[1:], strict=False):
            scores = table[before].tolist()
            assert loss == pytest.approx(math.log(sum(math.exp(s) for s in scores)) - scores[token], abs=1e-5)
    assert perplexity(logits, windows, 2) == pytest.approx(math.exp(float(out.mean())))


def test_an_engine_reports_the_same() -> None:
    """By m6's kernels and paged cache, against the plain model."""
    windows = text_windows(str(TINY), evaluation_text("dev"), 64, 6)
    model = load_model(ModelConfig(model=str(TINY), dtype="float32", device="cpu"))
    expected = perplexity(plain_logits(model), windows)
    llm = LLM(model=str(TINY), dtype="float32", device="cpu")
    assert perplexity_of_llm(llm, windows) == pytest.approx(expected, rel=1e-4)
    assert 2.0 < expected < 9.0
