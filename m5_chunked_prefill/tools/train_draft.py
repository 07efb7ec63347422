"""Train a small draft model for the target: the target's own embeddings and first layers, taught to write as it does.

The draft has the target's vocabulary and its width, so embeddings, the first layers and the last norm are copied. Those
layers are then trained on texts that the target wrote (the cross-entropy of its own tokens): a small distillation of
minutes on a CPU. Embeddings stay as they are.
"""
from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from m0_basics.base_llm import BaseLLM
from m0_basics.config import DEFAULT_MODEL, check_int, require
from m0_basics.loading.loader import resolve_model
from m0_basics.sampling_params import SamplingParams

from ..llm import LLM
from .copy_tasks import TASKS, tasks

_TRAINING_SEED = 1_000_000          # prompts that the benchmark does not use


def train_draft(folder: Path, model: str = DEFAULT_MODEL, num_layers: int = 2, num_prompts: int = 96,
                output_len: int = 96, num_passes: int = 3, max_model_len: int = 1024,
                kinds: Sequence[str] = tuple(TASKS)) -> list[float]:
    """Write a draft model of `num_layers` layers into `folder`; returns the mean loss of each pass.

    `num_prompts` prompts for each of the benchmark's tasks, or of those `kinds`; `output_len` tokens are written for
    each of them. A prompt and its answer have at most `max_model_len` tokens.
    """
    check_int("num_layers", num_layers, 1)
    transformers = require("transformers", "training a draft model")
    llm = LLM(model, max_model_len=max_model_len)
    texts = _texts(llm, kinds, num_prompts, output_len)
    source = resolve_model(model, torch.float32)
    target = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    draft = _first_layers(target, num_layers)
    losses = _fit(draft, texts, num_passes)
    folder.mkdir(parents=True, exist_ok=True)
    draft.to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return losses


def _texts(llm: BaseLLM, kinds: Sequence[str], num_prompts: int, output_len: int) -> list[tuple[list[int], int]]:
    """What the target answers, with its prompt, and where the answer begins."""
    tokenizer = llm.get_tokenizer()
    chats = [task.token_ids(tokenizer) for kind in kinds for task in tasks(kind, num_prompts, _TRAINING_SEED)]
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in chats], params)
    return [(ids + list(o.outputs[0].token_ids), len(ids)) for ids, o in zip(chats, outputs, strict=True)]


def _first_layers(target: Any, num_layers: int) -> Any:
    """A model of the target's class with its embeddings, first layers and last norm, its embeddings not trained."""
    settings = target.config.to_dict() | {"num_hidden_layers": num_layers}
    if settings.get("layer_types"):
        settings["layer_types"] = settings["layer_types"][:num_layers]
    config = type(target.config).from_dict(settings)
    draft = type(target)(config)
    known = draft.state_dict()
    draft.load_state_dict({name: w for name, w in target.state_dict().items() if name in known})
    for parameter in (*draft.get_input_embeddings().parameters(), *draft.get_output_embeddings().parameters()):
        parameter.requires_grad = False
    return draft


def _fit(draft: Any, texts: Sequence[tuple[list[int], int]], num_passes: int) -> list[float]:
    """Next-token cross-entropy on the answers. Returns the mean loss of each pass."""
    optimizer = torch.optim.AdamW([p for p in draft.parameters() if p.requires_grad], lr=5e-4, weight_decay=0.01)
    order, rng, losses = list(texts), random.Random(0), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_passes * len(order))
    for _ in range(num_passes):
        rng.shuffle(order)
        total = 0.0
        for ids, start in order:
            hidden = draft.model(torch.tensor([ids[:-1]])).last_hidden_state[0, start - 1:]
            loss = torch.nn.functional.cross_entropy(draft.lm_head(hidden), torch.tensor(ids[start:]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / len(order))
    return losses
