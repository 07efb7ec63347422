"""What changes logits before a token is chosen: allowed tokens, banned words, bias, minimum length, penalties.

Each function skips the rows that did not ask for it, so a plain greedy batch passes through untouched.
R rows (sequences), V vocabulary.
"""
from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.request import Sequence
from m0_basics.sampler import tokens_too_early

_NEVER = float("-inf")


def adjust_logits(logits: Tensor, sequences: list[Sequence], tokenizer: Tokenizer | None) -> Tensor:
    """Apply everything, in vLLM's order, to logits [R, V]; they may be changed in place."""
    for row, sequence in enumerate(sequences):
        params = sequence.sampling_params
        if params.allowed_token_ids is not None:
            allowed = torch.tensor(params.allowed_token_ids, device=logits.device)
            kept = logits[row, allowed]
            logits[row] = _NEVER
            logits[row, allowed] = kept
        banned = tokens_too_early(sequence)
        if params.bad_words and tokenizer is not None:
            banned = banned + banned_by_words(sequence, tokenizer)
        if banned:
            logits[row, torch.tensor(banned, device=logits.device)] = _NEVER
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=logits.device)
            logits[row, ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    return apply_penalties(logits, sequences)


def banned_by_words(sequence: Sequence, tokenizer: Tokenizer) -> list[int]:
    """Tokens that would complete a bad word now: the last token of each whose other tokens were just generated."""
    output = sequence.output_token_ids
    words = bad_word_tokens(tuple(sequence.sampling_params.bad_words or ()), tokenizer)
    return [word[-1] for word in words if len(word) == 1 or output[-(len(word) - 1):] == word[:-1]]


@lru_cache(maxsize=256)
def bad_word_tokens(words: tuple[str, ...], tokenizer: Tokenizer) -> list[list[int]]:
    """Each word as it is written at the start of a text and after a space."""
    spellings = [text for word in words for text in (word.lstrip(), " " + word.lstrip())]
    token_lists = [tokenizer.encode(text, add_special_tokens=False) for text in spellings]
    return [ids for i, ids in enumerate(token_lists) if ids and ids not in token_lists[:i]]


def apply_penalties(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Repetition penalty (CTRL, section 4.1) over prompt and output; presence and frequency (OpenAI's) over output."""
    rows = [i for i, s in enumerate(sequences) if s.sampling_params.repetition_penalty != 1.0
            or s.sampling_params.presence_penalty != 0.0 or s.sampling_params.frequency_penalty != 0.0]
    if not rows:
        return logits
    chosen = [sequences[i] for i in rows]
    x = logits[rows]
    in_output = count_tokens([s.output_token_ids for s in chosen], x)
    in_prompt = count_tokens([s.data.prompt_token_ids for s in chosen], x)

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(s.sampling_params, name) for s in chosen], device=x.device).unsqueeze(1)

    seen = (in_output + in_prompt) > 0
    repetition = torch.where(seen, column("repetition_penalty"), 1.0)
    x = torch.where(x > 0, x / repetition, x * repetition)
    x -= column("frequency_penalty") * in_output + column("presence_penalty") * (in_output > 0)
    logits[rows] = x
    return logits


def count_tokens(token_ids: list[list[int]], like: Tensor) -> Tensor:
    """How often each token occurs in each list -> [R, V], of the shape and device of `like`."""
    counts = torch.zeros_like(like)
    flat = torch.tensor([i for ids in token_ids for i in ids], device=like.device, dtype=torch.long)
    row = torch.tensor([r for r, ids in enumerate(token_ids) for _ in ids], device=like.device, dtype=torch.long)
    return counts.index_put_((row, flat), torch.ones((), dtype=like.dtype, device=like.device), accumulate=True)
