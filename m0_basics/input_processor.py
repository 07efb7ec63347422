"""The user's edge: from a prompt and its parameters to a request that the engine can trust."""
from __future__ import annotations

import itertools
import random
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from .config import ConfigError, reject, short
from .loading.tokenizer import Tokenizer
from .model_spec import ModelSpec
from .request import Request
from .sampling_params import SamplingParams, is_utf8

Prompt = str | Mapping[str, Any] | Sequence[int]        # text, {"prompt": ...}, {"prompt_token_ids": [...]}, or ids


class InputError(ConfigError):
    """A prompt that cannot be run."""


def is_token_ids(prompt: object) -> TypeGuard[Sequence[int]]:
    """Whether `prompt` is one prompt in token ids (and not a list of prompts)."""
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and isinstance(prompt[0], int)


def as_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several -> a list of prompts."""
    single = isinstance(prompts, str) or not isinstance(prompts, Sequence) or is_token_ids(prompts)
    many: Any = [prompts] if single else prompts
    return list(many)


class InputProcessor:
    """Tokenises and checks prompts against one model."""

    def __init__(self, spec: ModelSpec, tokenizer: Tokenizer | None, max_model_len: int, seed: int) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self._seeds = random.Random(seed)           # draws the seed of each request that brings none
        self._counter = itertools.count()
        self._checked: weakref.ref[SamplingParams] | None = None        # many prompts in a row share theirs

    def process(self, prompt: Prompt, params: SamplingParams, stream: bool = False,
                add_special_tokens: bool = True) -> Request:
        """Return a checked Request. Raises InputError or ConfigError; the engine is not touched."""
        if self._checked is None or self._checked() is not params:
            self.check_params(params)
            self._checked = weakref.ref(params)
        text, token_ids = self._tokenise(prompt, add_special_tokens)
        if not token_ids:
            raise InputError("the prompt is empty; allowed: at least one token")
        if len(token_ids) >= self.max_model_len:
            raise InputError(f"the prompt has {len(token_ids)} tokens; allowed: at most {self.max_model_len - 1}, "
                             f"so that one more fits into max_model_len={self.max_model_len}")
        self._check_tokens("prompt", token_ids)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        return Request(str(next(self._counter)), text, token_ids, params, seed, self.spec.eos_token_ids, stream,
                       _salt_of(prompt))

    def check_params(self, params: SamplingParams) -> None:
        """Raise InputError or ConfigError for parameters that do not fit this model, whatever the prompt."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self._check_tokens(name, getattr(params, name) or [])
        if self.tokenizer is None and (params.stop or params.bad_words or params.structured_outputs):
            raise InputError("stop, bad_words and structured_outputs need a tokenizer; allowed: none of them where "
                             "skip_tokenizer_init is set")
        ends = {*self.spec.eos_token_ids, *(params.stop_token_ids or [])}
        if params.min_tokens and params.allowed_token_ids and ends.issuperset(params.allowed_token_ids):
            raise reject("allowed_token_ids", params.allowed_token_ids,
                         f"also a token that does not end the output, where min_tokens={params.min_tokens}")

    def _tokenise(self, prompt: Prompt, add_special_tokens: bool) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            keys = set(prompt) & {"prompt", "prompt_token_ids"}
            if not keys or set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}:
                raise InputError(f"prompt has the keys {short(sorted(prompt, key=str))}; "
                                 "allowed: prompt (text), prompt_token_ids, cache_salt")
            if prompt.get("prompt_token_ids") is not None:
                return prompt.get("prompt"), self._token_list(prompt["prompt_token_ids"])
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError('the prompt is text, but skip_tokenizer_init is set; allowed: '
                                 '{"prompt_token_ids": [...]}')
            if not is_utf8(prompt):
                raise InputError("the prompt holds half a character (a lone surrogate); allowed: text that UTF-8 can "
                                 "write")
            self._check_length(prompt, self.tokenizer)
            return prompt, self.tokenizer.encode(prompt, add_special_tokens)
        return None, self._token_list(prompt)

    def _check_length(self, text: str, tokenizer: Tokenizer) -> None:
        """Refuse what cannot fit before it is tokenised, which takes seconds per megabyte."""
        longest = self.max_model_len * tokenizer.max_chars_per_token
        if len(text) > longest:
            raise InputError(f"the prompt has {len(text)} characters, more tokens than max_model_len="
                             f"{self.max_model_len} for sure; allowed: at most {longest} characters")

    @staticmethod
    def _token_list(token_ids: Any) -> list[int]:
        if not isinstance(token_ids, (list, tuple)) or not all(type(i) is int for i in token_ids):
            raise InputError(f"prompt of type {type(token_ids).__name__} is not valid; allowed: text, a list of token "
                             'ids, {"prompt": text} or {"prompt_token_ids": list of integers}')
        return list(token_ids)

    def _check_tokens(self, name: str, token_ids: Iterable[int]) -> None:
        if bad := [i for i in token_ids if not 0 <= i < self.spec.vocab_size]:
            raise reject(f"{name} token id", bad[0], f"0 to {self.spec.vocab_size - 1}, the model's vocabulary")


def _salt_of(prompt: Prompt) -> str:
    """The prompt's `cache_salt`: requests of different salts share nothing, in whatever an engine keeps of them."""
    salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
    if salt is None:
        return ""
    if not isinstance(salt, str) or not salt or not is_utf8(salt):
        raise InputError(f"cache_salt={short(salt)} is not valid; allowed: a text that is not empty, or None")
    return salt
