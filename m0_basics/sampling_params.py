"""Sampling parameters of one request, with the names and defaults of vLLM's `SamplingParams`.

Everything is checked once, in the constructor; after that the object never changes, so many requests
may share it and an engine may trust it.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Self

from .config import ConfigError, check_int, option, reject, short

_SAMPLING_EPS = 1e-5      # a temperature below this is greedy, as in vLLM
# Logits are float32. Whatever is added to them, and then divided by a penalty and a temperature, has to stay finite:
# an infinity less another is not a number, and what is drawn from that is no token.
_MAX_BIAS = 1e9
_MAX_PENALTY = 1e6


class SamplingType(IntEnum):
    """How the next token is chosen."""

    GREEDY = 0
    RANDOM = 1
    RANDOM_SEED = 2


@dataclass(frozen=True)
class StructuredOutputsParams:
    """A constraint on the text: exactly one of a JSON schema, a regular expression, or a list of choices."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.json, self.regex, self.choice)) != 1:
            raise reject("structured_outputs", self, "exactly one of json, regex, choice")
        if not isinstance(self.json, str | dict | None):
            raise reject("structured_outputs.json", self.json, "a JSON schema, as a dict or as text")
        if not isinstance(self.regex, str | None):
            raise reject("structured_outputs.regex", self.regex, "a regular expression")
        if self.choice is not None and not (isinstance(self.choice, list | tuple) and self.choice
                                            and all(isinstance(text, str) for text in self.choice)):
            raise reject("structured_outputs.choice", self.choice, "a list of at least one text")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build from a mapping, as JSON holds it. An unknown key is an error that lists those that exist."""
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(options) - set(known), key=str):
            raise ConfigError(f"unknown key {', '.join(map(str, unknown))} in structured_outputs; "
                              f"allowed: {', '.join(known)}")
        return cls(**options)


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks of the sampler, and when it wants to stop."""

    n: int = option(1, "Outputs to return for the prompt.")
    best_of: int | None = option(None, "Outputs to generate; the n most probable are returned (default: n).")
    presence_penalty: float = option(0.0, "Subtracted once from the logit of each token already in the output.")
    frequency_penalty: float = option(0.0, "Subtracted for each time a token is already in the output.")
    repetition_penalty: float = option(1.0, "Divides the logit of tokens in the prompt or output (> 1 discourages).")
    temperature: float = option(1.0, "Divides the logits; 0 is greedy.")
    top_p: float = option(1.0, "Keep the smallest set of tokens with at least this probability.")
    top_k: int = option(0, "Keep the k most probable tokens (0: all).")
    min_p: float = option(0.0, "Keep tokens at least this fraction as probable as the most probable one.")
    seed: int | None = option(None, "Seed of this request: same seed, same outputs.")
    stop: str | list[str] | None = option(None, "Text that ends the output; it is cut off.")
    stop_token_ids: list[int] | None = option(None, "Token ids that end the output.")
    bad_words: list[str] | None = option(None, "Words that must not be generated.")
    ignore_eos: bool = option(False, "Go on after the end-of-sequence token.")
    max_tokens: int | None = option(16, "Most tokens to generate (None: up to the model's length).")
    min_tokens: int = option(0, "Fewest tokens before an end-of-sequence or stop token may come.")
    logprobs: int | None = option(None, "Return the log-probabilities of this many top tokens at each step.")
    prompt_logprobs: int | None = option(None, "The same for each token of the prompt.")
    detokenize: bool = option(True, "Turn the output into text.")
    skip_special_tokens: bool = option(True, "Leave special tokens out of the text.")
    logit_bias: dict[int, float] | None = option(None, "Added to the logits of these token ids.")
    allowed_token_ids: list[int] | None = option(None, "Only these token ids may be generated.")
    include_stop_str_in_output: bool = option(False, "Keep the stop string at the end of the text.")
    structured_outputs: StructuredOutputsParams | None = option(None, "A JSON schema, regex or choice to obey.")

    def __post_init__(self) -> None:
        self._check_types()
        structured = self.structured_outputs
        normalise = {
            "stop": [self.stop] if isinstance(self.stop, str) else list(self.stop or []),
            "stop_token_ids": list(self.stop_token_ids or []),
            "bad_words": list(self.bad_words or []),
            "best_of": self.n if self.best_of is None else self.best_of,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "structured_outputs": (StructuredOutputsParams.from_options(structured)
                                   if isinstance(structured, Mapping) else structured),
        }
        for name, value in normalise.items():
            object.__setattr__(self, name, value)
        self._check_counts()
        self._check_numbers()
        self._check_tokens()
        self._check_together()

    def _check_types(self) -> None:
        for name, allowed in (("stop", "text, or a list of it"), ("bad_words", "a list of text"),
                              ("stop_token_ids", "a list of token ids"), ("allowed_token_ids", "a list of token ids")):
            value = getattr(self, name)
            if not (value is None or isinstance(value, (list, tuple)) or (name == "stop" and isinstance(value, str))):
                raise reject(name, value, f"None, {allowed}")
        if not isinstance(self.structured_outputs, StructuredOutputsParams | Mapping | None):
            raise reject("structured_outputs", self.structured_outputs,
                         "None, StructuredOutputsParams, or a dict of its fields")
        if not isinstance(self.logit_bias, Mapping | None):
            raise reject("logit_bias", self.logit_bias, "a dict of token id -> number")
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise reject(name, getattr(self, name), "True or False")

    def _check_counts(self) -> None:
        check_int("n", self.n, 1)
        check_int("best_of", self.best_of, 1)
        check_int("top_k", self.top_k, 0)
        check_int("max_tokens", self.max_tokens, 1, optional=True)
        check_int("min_tokens", self.min_tokens, 0)
        check_int("logprobs", self.logprobs, 0, optional=True)
        check_int("prompt_logprobs", self.prompt_logprobs, 0, optional=True)
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise reject("seed", self.seed, "an integer or None")

    def _check_numbers(self) -> None:
        def within(name: str, low: float, high: float, allowed: str, open_low: bool = False) -> None:
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or not low <= value <= high or (open_low and value == low):
                raise reject(name, value, allowed)

        within("temperature", 0.0, 1e6, "a number >= 0 (0 is greedy)")
        within("top_p", 0.0, 1.0, "a number above 0, up to 1", open_low=True)
        within("min_p", 0.0, 1.0, "a number from 0 to 1")
        within("presence_penalty", -2.0, 2.0, "a number from -2 to 2")
        within("frequency_penalty", -2.0, 2.0, "a number from -2 to 2")
        within("repetition_penalty", 1 / _MAX_PENALTY, _MAX_PENALTY,
               f"a number from {1 / _MAX_PENALTY:g} to {_MAX_PENALTY:g} (1 changes nothing)")

    def _check_tokens(self) -> None:
        def is_token(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= 0

        for name in ("stop_token_ids", "allowed_token_ids"):
            if not all(map(is_token, getattr(self, name) or [])):
                raise reject(name, getattr(self, name), "a list of token ids >= 0")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise reject("allowed_token_ids", [], "None, or at least one token id")
        for name in ("stop", "bad_words"):
            if not all(isinstance(text, str) and text and is_utf8(text) for text in getattr(self, name)):
                raise reject(name, getattr(self, name), "non-empty text, or a list of it")
        for token, bias in (self.logit_bias or {}).items():
            number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
            if not is_token(token) or not number or not abs(bias) <= _MAX_BIAS:
                raise reject("logit_bias", {token: bias}, "a dict of token id -> number from "
                                                          f"-{_MAX_BIAS:g} to {_MAX_BIAS:g}")

    def _check_together(self) -> None:
        assert self.best_of is not None
        if self.best_of < self.n:
            raise reject("best_of", self.best_of, f"at least n, {self.n}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise reject("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")
        if self.stop and not self.detokenize:
            raise reject("detokenize", False, "True where stop strings are given (they are found in the text)")
        if self.sampling_type is SamplingType.GREEDY and self.best_of > 1:
            raise reject("best_of" if self.best_of > self.n else "n", self.best_of,
                         "1 where temperature is 0 (greedy outputs are all the same)")

    @property
    def sampling_type(self) -> SamplingType:
        """GREEDY, RANDOM, or RANDOM_SEED where the request brings its own seed."""
        if self.temperature < _SAMPLING_EPS:
            return SamplingType.GREEDY
        return SamplingType.RANDOM if self.seed is None else SamplingType.RANDOM_SEED

    @cached_property
    def all_stop_token_ids(self) -> frozenset[int]:
        """`stop_token_ids` to look things up in: each step asks, however many there are."""
        return frozenset(self.stop_token_ids or ())

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Build from keyword arguments. An unknown one is an error that lists those that exist."""
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise ConfigError(f"unknown sampling parameter {', '.join(unknown)}; allowed: {', '.join(known)}")
        return cls(**options)

    def require_supported(self, supported: Iterable[str], engine: str) -> None:
        """Refuse a parameter that `engine` would otherwise ignore in silence."""
        supported = set(supported)
        for f in dataclasses.fields(self):
            if f.name not in supported and getattr(self, f.name) != getattr(_DEFAULTS, f.name):
                raise ConfigError(f"{f.name}={short(getattr(self, f.name))}: {engine} does not support it; "
                                  f"it supports: {', '.join(sorted(supported))}")


_DEFAULTS = SamplingParams()


@dataclass(frozen=True)
class BeamSearchParams:
    """Parameters of a beam search (vLLM's `BeamSearchParams`)."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        check_int("beam_width", self.beam_width, 1)
        check_int("max_tokens", self.max_tokens, 1)
        penalty = self.length_penalty
        # Beyond that, a long output's length to this power is no float any more, or is 0.
        if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not -10 <= penalty <= 10:
            raise reject("length_penalty", penalty, "a number from -10 to 10 (1 ranks by the mean log-probability)")


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can write `text`: a lone surrogate, which Python and JSON can hold, is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_batch(options: Iterable[Mapping[str, Any]]) -> list[SamplingParams]:
    """Build many parameter sets, checking each distinct one once (requests of one client are mostly alike)."""
    made: dict[str, SamplingParams] = {}
    result = []
    for o in options:
        key = repr(sorted(o.items()))
        if key not in made:
            made[key] = SamplingParams.from_options(**o)
        result.append(made[key])
    return result
