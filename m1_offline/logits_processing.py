"""What changes logits before a token is chosen: allowed tokens, banned words, bias, minimum length, penalties.

Each function skips the rows that did not ask for it, so a plain greedy batch passes through untouched. What a request
gives as lists is turned into tensors and a trie once: a step costs the same, however long the lists are.
R rows (sequences), V vocabulary.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.request import Sequence
from m0_basics.sampler import tokens_too_early
from m0_basics.sampling_params import SamplingParams

_NEVER = float("-inf")
K = TypeVar("K")
V = TypeVar("V")


class KeptFor(Generic[K, V]):
    """`make(owner)`, made once for each owner and kept for as long as that lives. Owners are told by identity."""

    def __init__(self, make: Callable[[K], V]) -> None:
        self._make = make
        self._made: dict[int, V] = {}

    def __call__(self, owner: K) -> V:
        if (found := self._made.get(id(owner))) is None:
            found = self._made[id(owner)] = self._make(owner)
            # The callback comes before the number can belong to another object.
            weakref.finalize(owner, self._made.pop, id(owner), None).atexit = False
        return found

    def __len__(self) -> int:
        return len(self._made)


@dataclass(eq=False)
class _Node:
    """One place in the trie of bad words: the tokens that would complete one here, and where to look further back."""

    before: dict[int, _Node] = field(default_factory=dict)
    last: dict[int, None] = field(default_factory=dict)         # an ordered set
    tensor: Tensor | None = None

    def on(self, device: torch.device) -> Tensor:
        """`last` as a tensor, made once."""
        if self.tensor is None or self.tensor.device != device:
            self.tensor = torch.tensor(list(self.last), device=device, dtype=torch.long)
        return self.tensor


class BadWords:
    """Words that must not be generated, as a trie of their tokens but the last, from the newest backwards.

        words  c-a-t, c-o-w, e      root: e    root -a-> -c-> : t    root -o-> -c-> : w

    A step follows the output backwards for as long as it is the end of some word's beginning, and no further.
    """

    def __init__(self, words: list[str], tokenizer: Tokenizer) -> None:
        """Each word as it is written at the start of a text and after a space."""
        self.root = _Node()
        spellings = dict.fromkeys(text for word in words for text in (word.lstrip(), " " + word.lstrip()))
        for token_ids in tokenizer.encode_batch(list(spellings), add_special_tokens=False):
            if token_ids:
                node = self.root
                for token_id in reversed(token_ids[:-1]):
                    node = node.before.setdefault(token_id, _Node())
                node.last[token_ids[-1]] = None

    def reached(self, output: list[int]) -> list[_Node]:
        """The places in the trie that an output leads to; the tokens in their `last` would complete a word."""
        node: _Node | None = self.root
        found = []
        for token_id in (*reversed(output), None):
            if node is None:
                break
            if node.last:
                found.append(node)
            node = None if token_id is None else node.before.get(token_id)
        return found


class LogitEdits:
    """What one request's parameters do to a row of logits: their lists as tensors."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self.params = params
        self.bad_words = BadWords(params.bad_words, tokenizer) if params.bad_words and tokenizer else None
        allowed, bias = params.allowed_token_ids, params.logit_bias or {}
        self._allowed = None if allowed is None else torch.tensor(allowed, dtype=torch.long)
        self._biased = torch.tensor(list(bias), dtype=torch.long)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32)
        self._too_early: Tensor | None = None

    def apply(self, row: Tensor, sequence: Sequence) -> None:
        """row [V], changed in place. Raises ValueError where nothing is left to choose from."""
        if self._allowed is not None:
            self._allowed = self._allowed.to(row.device)
            kept = row[self._allowed]
            row.fill_(_NEVER)
            row[self._allowed] = kept
        banned = self._banned(row, sequence)
        for token_ids in banned:
            row[token_ids] = _NEVER
        if banned and row.max() == _NEVER:
            raise ValueError("no token is left to choose: all are ruled out by allowed_token_ids, bad_words and "
                             "min_tokens together")
        if self.params.logit_bias:
            self._biased, self._bias = self._biased.to(row.device), self._bias.to(row.device)
            row[self._biased] += self._bias

    def _banned(self, row: Tensor, sequence: Sequence) -> list[Tensor]:
        """Token ids, some of them several times."""
        banned = []
        if len(sequence.output_token_ids) < self.params.min_tokens:
            if self._too_early is None or self._too_early.device != row.device:
                ids = [i for i in tokens_too_early(sequence) if i < len(row)]
                self._too_early = torch.tensor(ids, device=row.device, dtype=torch.long)
            banned.append(self._too_early)
        if self.bad_words is not None:
            banned += [node.on(row.device) for node in self.bad_words.reached(sequence.output_token_ids)]
        return banned


def adjust_logits(logits: Tensor, sequences: list[Sequence], edits: Callable[[SamplingParams], LogitEdits],
                  seen: TokenCounts) -> Tensor:
    """Apply everything, in vLLM's order, to logits [R, V]; they may be changed in place."""
    for row, sequence in enumerate(sequences):
        params = sequence.sampling_params
        if (params.allowed_token_ids is not None or params.bad_words or params.logit_bias
                or len(sequence.output_token_ids) < params.min_tokens):
            edits(params).apply(logits[row], sequence)
    return apply_penalties(logits, sequences, seen)


def apply_penalties(logits: Tensor, sequences: list[Sequence], seen: TokenCounts) -> Tensor:
    """Repetition penalty (CTRL, section 4.1) over prompt and output; presence and frequency (OpenAI's) over output.

    `seen(sequences, like)` counts their tokens in prompt and in output.
    """
    rows = [i for i, s in enumerate(sequences) if s.sampling_params.repetition_penalty != 1.0
            or s.sampling_params.presence_penalty != 0.0 or s.sampling_params.frequency_penalty != 0.0]
    if not rows:
        return logits
    chosen = [sequences[i] for i in rows]
    x = logits[rows]
    in_prompt, in_output = seen(chosen, x)

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(s.sampling_params, name) for s in chosen], device=x.device).unsqueeze(1)

    repetition = torch.where(in_prompt + in_output > 0, column("repetition_penalty"), 1.0)
    x = torch.where(x > 0, x / repetition, x * repetition)
    x -= column("frequency_penalty") * in_output + column("presence_penalty") * (in_output > 0)
    logits[rows] = x
    return logits


class TokenCounts:
    """Which tokens a sequence holds, and how often. Each token is read once, and kept as an array.

    The sequence is the truth: what it has got since the last time is read from it, as often as a step is run.
    """

    def __init__(self) -> None:
        self._read: WeakKeyDictionary[Sequence, _TokenArrays] = WeakKeyDictionary()

    def __call__(self, sequences: list[Sequence], like: Tensor) -> tuple[Tensor, Tensor]:
        """How often each token is in the prompt, and in the output: both [R, V], of the type and device of `like`."""
        arrays = [self._of(s) for s in sequences]
        return _count([a.prompt for a in arrays], like), _count([a.output for a in arrays], like)

    def _of(self, sequence: Sequence) -> _TokenArrays:
        found = self._read.get(sequence)
        if found is None:
            found = self._read[sequence] = _TokenArrays(np.unique(np.array(sequence.data.prompt_token_ids, np.int64)))
        output = sequence.output_token_ids
        known = found.output if len(found.output) <= len(output) else found.output[:0]
        found.output = np.concatenate([known, np.array(output[len(known):], np.int64)])
        return found


@dataclass(eq=False)
class _TokenArrays:
    prompt: np.ndarray          # its different tokens
    output: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))       # all of them, in order


def _count(token_ids: list[np.ndarray], like: Tensor) -> Tensor:
    """How often each token occurs in each array -> [R, V]."""
    rows = np.repeat(np.arange(len(token_ids)), [len(ids) for ids in token_ids])
    where = torch.from_numpy(np.stack([rows, np.concatenate(token_ids)])).to(like.device)
    one = torch.ones((), dtype=like.dtype, device=like.device)
    return torch.zeros_like(like).index_put_((where[0], where[1]), one, accumulate=True)
