"""Structured output: only tokens that keep the text within a JSON schema, a regular expression or a list of choices.

    request 0   { "a" :      allowed: digits, space, -       \\
    request 1   (free)       everything                       >  one step, one batch
    request 2   "y" of yes   allowed: e, es                  /

A matcher (llguidance: an Earley parser over the bytes of tokens) walks along with each constrained sequence and says
which tokens may come next; the logits of all others become -inf. What then chooses a token does not know of it.
The grammar decides where the output may end, and ends it when nothing else can follow.
"""
from __future__ import annotations

import dataclasses
import json
import threading
from functools import lru_cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from m0_basics.config import ConfigError, reject, require
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.model_spec import ModelSpec
from m0_basics.request import Logprob, Sequence
from m0_basics.sampler import Sampler, SamplerOutput
from m0_basics.sampling_params import SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Each of these bans tokens as well, and the two bans together may leave none.
_REFUSED_BESIDE = ("min_tokens", "allowed_token_ids", "bad_words")
# One space, or a new line and its indentation. Without a limit a small model may go on with spaces until max_tokens.
_JSON_WHITESPACE = r"( |\n {0,8})?"
_NUM_GRAMMARS = 64          # distinct constraints kept compiled


class StructuredSampler(Sampler):
    """Another sampler, with a mask before it for the rows that have a constraint.

    The text is complete when the request ends with "stop"; "length" may cut it anywhere. With `ignore_eos` the
    end-of-sequence token is repeated after the end, and the text stays as it is. Log-probabilities are those under the
    constraint, as in vLLM; tokens that it rules out are left out of them.
    """

    def __init__(self, inner: Sampler, tokenizer: Tokenizer | None, spec: ModelSpec) -> None:
        self.inner = inner
        self.grammars = None if tokenizer is None else Grammars(tokenizer, spec)
        self.supported = frozenset({*inner.supported, "structured_outputs"})
        self._walks: WeakKeyDictionary[Sequence, _Walk] = WeakKeyDictionary()

    def check(self, params: SamplingParams) -> None:
        """As the inner sampler; raises ConfigError for a constraint that does not compile or cannot be met."""
        constraint = params.structured_outputs
        if constraint is None:
            return self.inner.check(params)
        self.inner.check(dataclasses.replace(params, structured_outputs=None))
        if self.grammars is None:
            raise reject("structured_outputs", constraint, "None where skip_tokenizer_init is set")
        for name in _REFUSED_BESIDE:
            if value := getattr(params, name):
                raise reject(name, value, "unset beside structured_outputs: the two bans together may leave no token")
        self.grammars.new_matcher(constraint)
        return None

    @torch.inference_mode()     # the runner's logits come from there, and may be changed only there
    def __call__(self, logits: Tensor, sequences: list[Sequence]) -> SamplerOutput:
        rows = [i for i, s in enumerate(sequences) if s.sampling_params.structured_outputs is not None]
        if not rows:
            return self.inner(logits, sequences)
        index = torch.tensor(rows, device=logits.device)
        allowed = unpack_bits(self._next_tokens([sequences[i] for i in rows]).to(logits.device))[:, :logits.shape[1]]
        logits[index] = logits[index].masked_fill_(~allowed, float("-inf"))
        output = self.inner(logits, sequences)
        constrained = set(rows)
        return SamplerOutput(output.token_ids, [_possible(entry) if i in constrained else entry
                                                for i, entry in enumerate(output.logprobs)])

    def _next_tokens(self, sequences: list[Sequence]) -> Tensor:
        """The tokens that may come next to C constrained sequences, a bit each: int32 [C, vocab / 32]."""
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
        assert self.grammars is not None
        bits = allocate_token_bitmask(len(sequences), self.grammars.vocab_size)
        for row, sequence in enumerate(sequences):
            constraint = sequence.sampling_params.structured_outputs
            assert constraint is not None
            walk = self._walks.get(sequence)
            if walk is None:
                walk = self._walks[sequence] = _Walk(self.grammars.new_matcher(constraint))
            fill_next_token_bitmask(walk.follow(sequence.output_token_ids), bits, row)
            walk.check()
        return torch.from_numpy(bits)


class _Walk:
    """A matcher and how far along its sequence it is.

    The sequence is the truth: what it has got since the last time is read from it. So it does not matter how often a
    step is run, whether the sequence was preempted in between, or that it is a fork that begins in the middle.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self.num_consumed = 0

    def follow(self, token_ids: list[int]) -> LLMatcher:
        for token_id in token_ids[self.num_consumed:]:
            if self.matcher.is_stopped():
                break                       # at the end of the text, where only the end is allowed, again and again
            self.matcher.consume_token(token_id)
        self.num_consumed = len(token_ids)
        return self.matcher

    def check(self) -> None:
        """A matcher that meets a limit of the library would allow the end of the sequence: an error is better."""
        if self.matcher.is_error():
            raise RuntimeError(f"structured output failed: {_first_line(self.matcher.get_error())}")


class Grammars:
    """Compiled constraints over one tokenizer, each compiled once and copied for every sequence.

    Safe for several threads: one compiles at a time, and what is compiled already is there without waiting for it.
    """

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec) -> None:
        self.tokenizer = tokenizer
        self.eos_token_ids = list(spec.eos_token_ids)
        # The model's matrix may have more rows than there are tokens: those are in no grammar.
        self.vocab_size = max(len(tokenizer), spec.vocab_size)
        self._compiled = lru_cache(_NUM_GRAMMARS)(self._compile)
        self._compiling = threading.Lock()
        self._ll_tokenizer: LLTokenizer | None = None       # made for the first constraint: it takes a moment

    def new_matcher(self, constraint: StructuredOutputsParams) -> LLMatcher:
        """A matcher that stands at the beginning. Raises ConfigError that names what is wrong."""
        kind, text = grammar_source(constraint)
        return self._compiled(kind, text).deep_copy()

    def _compile(self, kind: str, text: str) -> LLMatcher:
        with self._compiling:
            return self._compile_alone(kind, text)

    def _compile_alone(self, kind: str, text: str) -> LLMatcher:
        llguidance = require("llguidance", "structured output", extra="structured")
        if self._ll_tokenizer is None:
            if not self.eos_token_ids:
                raise ConfigError("structured_outputs needs an end-of-sequence token, and this model has none; "
                                  "allowed: no structured_outputs")
            # Padding and truncation are of no use here, and would bend what the library learns by tokenising.
            source = json.loads(self.tokenizer.to_json()) | {"padding": None, "truncation": None}
            self._ll_tokenizer = llguidance.LLTokenizer(json.dumps(source), n_vocab=self.vocab_size,
                                                        eos_token=self.eos_token_ids)
        make = {"json": lambda: llguidance.LLMatcher.grammar_from_json_schema(
                    text, defaults={"whitespace_pattern": _JSON_WHITESPACE}),
                "regex": lambda: llguidance.LLMatcher.grammar_from_regex(text),
                "choice": lambda: llguidance.grammar_from("choice", text)}
        matcher: LLMatcher = llguidance.LLMatcher(self._ll_tokenizer, make[kind](), log_level=0)
        if matcher.is_error():
            raise ConfigError(f"structured_outputs.{kind}={text!r} is not valid: {_first_line(matcher.get_error())}; "
                              f"allowed: {_ALLOWED[kind]}")
        probe = matcher.deep_copy()
        probe.compute_bitmask()             # only now does it find out that nothing can follow
        if probe.is_stopped() and not probe.is_accepting():
            raise reject(f"structured_outputs.{kind}", text, "a constraint that some text meets")
        return matcher


_ALLOWED = {"json": "a JSON schema of the keywords that llguidance knows", "regex": "a regular expression without "
            "look-around and back-references", "choice": "a list of texts"}


def grammar_source(constraint: StructuredOutputsParams) -> tuple[str, str]:
    """The kind of a constraint and what it says, as text. Raises ConfigError for a schema that is not JSON."""
    if constraint.regex is not None:
        return "regex", constraint.regex
    if constraint.choice is not None:
        return "choice", json.dumps(list(constraint.choice))
    schema = constraint.json
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(schema)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"structured_outputs.json={constraint.json!r} is not JSON: {error}; "
                          "allowed: a JSON schema, as a dict or as text") from error
    if not isinstance(schema, dict):
        raise reject("structured_outputs.json", constraint.json, "a JSON schema that is an object")
    return "json", text


def unpack_bits(words: Tensor) -> Tensor:
    """int32 [C, W] -> bool [C, 32 * W]: bit i of word w is column 32 * w + i."""
    bits = words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device)
    return (bits & 1).bool().flatten(1)


def _possible(entry: dict[int, Logprob] | None) -> dict[int, Logprob] | None:
    return entry and {i: logprob for i, logprob in entry.items() if logprob.logprob > float("-inf")}


def _first_line(error: str) -> str:
    """The library's messages go on with a dump of its state, or with a drawing of the place."""
    return " ".join(error.partition("<state>")[0].split())[:300]
