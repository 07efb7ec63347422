"""References: what transformers computes from the same folder, for a milestone to be compared with.

And the other side of the comparison where it is the model alone: a runner that recomputes everything.
"""
from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m0_basics import request
from m0_basics.attention import FullAttention, ScheduledSequence
from m0_basics.config import ModelConfig
from m0_basics.loading.loader import load_model
from m0_basics.model_runner import ModelRunner
from m0_basics.sampling_params import SamplingParams

TokenIds = Sequence[int]


@lru_cache(maxsize=16)
def reference_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model in `folder`, loaded once. Its generation settings are reset to plain greedy."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()
    model.generation_config = GenerationConfig()
    return model


def reference_greedy(folder: Path, prompts_token_ids: Sequence[TokenIds], max_tokens: int,
                     dtype: torch.dtype = torch.float32, eos: TokenIds = (), **settings: Any) -> list[list[int]]:
    """What transformers' `generate` appends to each prompt, run alone, greedily.

    Goes on after an end-of-sequence token unless `eos` names it. `settings` are further arguments of `generate`
    (such as repetition_penalty).
    """
    prompts = tuple(tuple(prompt) for prompt in prompts_token_ids)
    return [list(_greedy(folder, prompt, max_tokens, dtype, tuple(eos), tuple(sorted(settings.items()))))
            for prompt in prompts]


@lru_cache(maxsize=4096)        # every milestone's tests ask for the same references
def _greedy(folder: Path, prompt: tuple[int, ...], max_tokens: int, dtype: torch.dtype, eos: tuple[int, ...],
            settings: tuple[tuple[str, Any], ...]) -> tuple[int, ...]:
    model = reference_model(folder, dtype)
    input_ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False,
                                max_new_tokens=max_tokens, eos_token_id=list(eos) or None, pad_token_id=0,
                                **dict(settings))
    return tuple(output[0, len(prompt):].tolist())


def reference_logits(folder: Path, token_ids: TokenIds, dtype: torch.dtype = torch.float32) -> Tensor:
    """transformers' logits [tokens, vocab] in float32 for every position of one sequence, without a cache."""
    with torch.inference_mode():
        logits: Tensor = reference_model(folder, dtype)(torch.tensor([list(token_ids)]), use_cache=False).logits
    return logits[0].float()


def assert_same_tokens(ours: Sequence[TokenIds], reference: Sequence[TokenIds]) -> None:
    """Fail, naming the first sequence and step that differ, unless both hold the same token ids."""
    assert len(ours) == len(reference), f"{len(ours)} outputs, {len(reference)} references"
    for i, (mine, theirs) in enumerate(zip(ours, reference, strict=True)):
        a, b = list(mine), list(theirs)
        if a == b:
            continue
        step = next((s for s, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        around = slice(max(0, step - 3), step + 4)
        raise AssertionError(f"output {i} of {len(ours)} differs from step {step} on ({len(a)} and {len(b)} tokens); "
                             f"ours [{around.start}:] {a[around]}, reference {b[around]}")


def mixed_length_prompts(vocab: int, n: int, seed: int, longest: int = 60) -> list[list[int]]:
    """`n` random prompts in token ids below `vocab`, from one token to `longest`, in no order of length."""
    rng = random.Random(seed)
    lengths = [1 + (longest - 1) * i // max(n - 1, 1) for i in range(n)]
    rng.shuffle(lengths)
    return [[rng.randrange(vocab) for _ in range(length)] for length in lengths]


def make_runner(folder: Path, dtype: str = "float32") -> ModelRunner:
    """m0's model over `folder` (or a GGUF file), attention recomputed at each call."""
    return ModelRunner(load_model(ModelConfig(str(folder), dtype=dtype)), FullAttention())


def schedule(prompts: Sequence[list[int]], **settings: Any) -> list[ScheduledSequence]:
    """All tokens of each prompt in one step; `settings` are sampling parameters."""
    params = SamplingParams(**settings)
    return [ScheduledSequence.rest(request.Sequence(i, request.SequenceData(prompt), params, seed=0))
            for i, prompt in enumerate(prompts)]


@torch.inference_mode()
def all_logits(runner: ModelRunner, prompts: Sequence[list[int]]) -> list[Tensor]:
    """Logits [tokens, vocab] at every position of every prompt, run as one packed batch."""
    inputs = runner.prepare_inputs(schedule(prompts))
    hidden, metadata = runner.forward(inputs), inputs.metadata
    return [runner.model.compute_logits(hidden[start:stop]) for start, stop in pairwise(metadata.query_start_loc)]
