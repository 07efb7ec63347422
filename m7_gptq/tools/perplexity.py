"""Perplexity: how surprised a model is by a text that it was not made for; e to the mean loss of a token.

    loss of token t = -log p(t | the tokens before it in its window)

The first token of a window has nothing before it and does not count. Only values from the same text, windows and
tokenizer compare.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from m0_basics.config import ConfigError, ModelConfig
from m0_basics.loading.loader import load_tokenizer
from m0_basics.model import CausalLM
from m0_basics.sampling_params import SamplingParams

from ..calibration import cut_windows, hidden_states

Logits = Callable[[Tensor], Tensor]         # token ids [num, length] -> logits [num, length, vocabulary]


def losses(logits: Logits, windows: Tensor, batch: int = 4) -> Tensor:
    """The loss of each token but the first of each window, float32 [num, length - 1]."""
    rows = []
    for part in windows.split(batch):
        out = logits(part)[:, :-1].float()
        picked = out.gather(2, part[:, 1:].unsqueeze(2)).squeeze(2)
        rows.append(out.logsumexp(2) - picked)
    return torch.cat(rows)


def perplexity(logits: Logits, windows: Tensor, batch: int = 4) -> float:
    """Of windows [num, length]; `batch` of them run at once."""
    return math.exp(float(losses(logits, windows, batch).mean(dtype=torch.float64)))


def plain_logits(model: CausalLM) -> Logits:
    """Of the engine's plain model, every position, without a cache."""
    def logits(windows: Tensor) -> Tensor:
        with torch.no_grad():
            return model.compute_logits(hidden_states(model, windows))

    return logits


def perplexity_of_llm(llm: Any, windows: Tensor) -> float:
    """The same by any milestone's `LLM`: its own kernels, cache and scheduler, through `prompt_logprobs`."""
    prompts = [{"prompt_token_ids": window} for window in windows.tolist()]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    total, count = 0.0, 0
    for output in llm.generate(prompts, params, use_tqdm=False):
        for token, logprobs in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            total -= logprobs[token].logprob
            count += 1
    return math.exp(total / count)


def text_windows(model: str, text: str, length: int = 512, num_windows: int | None = None) -> Tensor:
    """`text` in the tokens of `model` (a name or folder), cut to windows."""
    tokenizer = load_tokenizer(ModelConfig(model=model, dtype="float32", device="cpu"))
    if tokenizer is None:
        raise ConfigError(f"model={model!r} has no tokenizer; allowed: a model with one")
    return cut_windows(tokenizer.encode(text), length, num_windows)
