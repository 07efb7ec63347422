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
import itertools
import json
import random
import re
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from m0_basics.config import ConfigError, reject, require, short
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.model_spec import ModelSpec
from m0_basics.request import Logprob, Sequence
from m0_basics.sampler import Sampler, SamplerOutput
from m0_basics.sampling_params import SamplingParams, StructuredOutputsParams, is_utf8
from m1_offline.logits_processing import KeptFor

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# Each of these bans tokens as well, and the two bans together may leave none.
_REFUSED_BESIDE = ("min_tokens", "allowed_token_ids", "bad_words")
# One space, or a new line and its indentation. Without a limit a small model may go on with spaces until max_tokens.
_JSON_WHITESPACE = r"( |\n {0,8})?"
_NUM_GRAMMARS = 64          # distinct constraints kept compiled, beside those of requests that are there
# The library counts its work, and gives up at a limit: so a constraint takes a few seconds at most to compile, and
# a step some milliseconds; what is refused does not depend on the machine. More rows than its default: for objects of
# many properties.
_LIMITS = {"initial_lexer_fuel": 400_000, "max_items_in_row": 10_000, "max_grammar_size": 30_000}
_FIRST_STEPS = 4            # that are tried on arrival: most that is too complex is found out there


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
        self._compiled = KeptFor[SamplingParams, Any](self._compile)

    def check(self, params: SamplingParams) -> None:
        """As the inner sampler; raises ConfigError for a constraint that does not compile or cannot be met.

        Compiles it, once: until the request's parameters are gone what is compiled stays with them.
        """
        if params.structured_outputs is None:
            self.inner.check(params)
        else:
            self._compiled(params)

    def is_compiled(self, params: SamplingParams) -> bool:
        """Whether `check` finds what it would have to compile. Raises ConfigError for a schema that is not JSON."""
        constraint = params.structured_outputs
        return constraint is None or self.grammars is None or self.grammars.has(constraint)

    def _compile(self, params: SamplingParams) -> LLMatcher:
        """A matcher that stands at the beginning, to be copied for each sequence."""
        constraint = params.structured_outputs
        assert constraint is not None
        self.inner.check(dataclasses.replace(params, structured_outputs=None))
        if self.grammars is None:
            raise reject("structured_outputs", constraint, "None where skip_tokenizer_init is set")
        for name in _REFUSED_BESIDE:
            if value := getattr(params, name):
                raise reject(name, value, "unset beside structured_outputs: the two bans together may leave no token")
        return self.grammars.new_matcher(constraint)

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
        for _, rows in itertools.groupby(enumerate(sequences), key=lambda item: item[1].seq_id):
            (row, sequence), *drafted = rows
            walk = self._walks.get(sequence)
            if walk is None:
                walk = self._walks[sequence] = _Walk(self._compiled(sequence.sampling_params).deep_copy())
            fill_next_token_bitmask(walk.follow(sequence.output_token_ids), bits, row)
            walk.check()
            if drafted:
                self._next_tokens_of_drafts(walk.matcher, drafted, bits)
        return torch.from_numpy(bits)

    @staticmethod
    def _next_tokens_of_drafts(matcher: LLMatcher, drafted: list[tuple[int, Sequence]], bits: np.ndarray) -> None:
        """The same for a sequence with one, two, .. guesses behind it: the matcher goes ahead, and back at the end.

        Behind a guess that is not allowed everything is: that row will not be used.
        """
        from llguidance.numpy import fill_next_token_bitmask
        num_ahead, is_possible = 0, True
        for row, sequence in drafted:
            guess = sequence.output_token_ids[-1]
            if is_possible and not matcher.is_stopped():
                is_possible = matcher.validate_tokens([guess]) == 1 and matcher.consume_token(guess)
                num_ahead += is_possible
            if is_possible:
                fill_next_token_bitmask(matcher, bits, row)
            else:
                bits[row] = -1
        matcher.rollback(num_ahead)


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
        self._compiled: dict[tuple[str, str], LLMatcher] = {}       # the one used last stands last
        self._using = threading.Lock()                              # of this table, for moments
        self._compiling = threading.Lock()
        self._ll_tokenizer: LLTokenizer | None = None       # made for the first constraint: it takes a moment

    def new_matcher(self, constraint: StructuredOutputsParams) -> LLMatcher:
        """A matcher that stands at the beginning. Raises ConfigError that names what is wrong."""
        source = grammar_source(constraint)
        matcher = self._find(source)
        if matcher is None:
            with self._compiling:
                matcher = self._find(source)            # another thread may have compiled it meanwhile
                if matcher is None:
                    matcher = self._compile_alone(*source)
                    self._keep(source, matcher)
        return matcher.deep_copy()

    def has(self, constraint: StructuredOutputsParams) -> bool:
        """Whether `new_matcher` would find it compiled."""
        return self._find(grammar_source(constraint)) is not None

    def _find(self, source: tuple[str, str]) -> LLMatcher | None:
        with self._using:
            matcher = self._compiled.pop(source, None)
            if matcher is not None:
                self._compiled[source] = matcher
            return matcher

    def _keep(self, source: tuple[str, str], matcher: LLMatcher) -> None:
        with self._using:
            self._compiled[source] = matcher
            if len(self._compiled) > _NUM_GRAMMARS:
                del self._compiled[next(iter(self._compiled))]

    def _compile_alone(self, kind: str, text: str) -> LLMatcher:
        llguidance = require("llguidance", "structured output", extra="structured")
        if self._ll_tokenizer is None:
            if not self.eos_token_ids:
                raise ConfigError("structured_outputs needs an end-of-sequence token, and this model has none; "
                                  "allowed: no structured_outputs")
            self._ll_tokenizer = llguidance.LLTokenizer(json.dumps(plain_tokenizer(self.tokenizer.to_json())),
                                                        n_vocab=self.vocab_size, eos_token=self.eos_token_ids)
        make = {"json": lambda: llguidance.LLMatcher.grammar_from_json_schema(
                    text, defaults={"whitespace_pattern": _JSON_WHITESPACE}),
                "regex": lambda: llguidance.LLMatcher.grammar_from_regex(text),
                # One expression: of a rule for each choice the parser holds two thousand at the most.
                "choice": lambda: llguidance.LLMatcher.grammar_from_regex("|".join(map(literal, json.loads(text))))}
        try:
            matcher: LLMatcher = llguidance.LLMatcher(self._ll_tokenizer, make[kind](), log_level=0,
                                                      limits=llguidance.LLParserLimits(**_LIMITS))
        except (ValueError, RecursionError) as error:
            raise _invalid(kind, text, str(error)) from error
        if matcher.is_error():
            raise _invalid(kind, text, matcher.get_error())
        self._try_first_steps(kind, text, matcher.deep_copy())
        return matcher

    def _try_first_steps(self, kind: str, text: str, probe: LLMatcher) -> None:
        """Go some tokens into the constraint: only then the library finds that nothing can follow, or too much."""
        draw = random.Random(0)
        for _ in range(_FIRST_STEPS):
            bits = np.frombuffer(probe.compute_bitmask(), np.uint8)
            if "NoExtension" in probe.get_error() or (probe.is_stopped() and not probe.is_accepting()
                                                      and not probe.is_error()):
                raise reject(f"structured_outputs.{kind}", text, "a constraint that some text meets")
            if probe.is_error():
                raise _invalid(kind, text, probe.get_error())
            if probe.is_stopped():
                return
            probe.consume_token(int(draw.choice(np.flatnonzero(np.unpackbits(bits, bitorder="little")))))
        if probe.is_error():
            raise _invalid(kind, text, probe.get_error())


_ALLOWED = {"json": "a JSON schema of the keywords that llguidance knows", "regex": "a regular expression without "
            "look-around and back-references", "choice": "a list of texts"}


def _invalid(kind: str, text: str, error: str) -> ConfigError:
    """The library's messages go on with a dump of its state, or with a drawing of the place."""
    return ConfigError(f"structured_outputs.{kind}={short(text)} is not valid: {_first_line(error)}; "
                       f"allowed: {_ALLOWED[kind]}, and not too complex")


def grammar_source(constraint: StructuredOutputsParams) -> tuple[str, str]:
    """The kind of a constraint and what it says, as text. Raises ConfigError for a schema that is not JSON."""
    schema = constraint.json
    if constraint.regex is not None:
        kind, text, strings = "regex", constraint.regex, constraint.regex
    elif constraint.choice is not None:
        kind, text, strings = "choice", json.dumps(list(constraint.choice)), "".join(constraint.choice)
    else:
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            kind, text, strings = "json", json.dumps(schema), json.dumps(schema, ensure_ascii=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(f"structured_outputs.json={short(constraint.json)} is not JSON, or too deep: {error}; "
                              "allowed: a JSON schema, as a dict or as text") from error
        if not isinstance(schema, dict):
            raise reject("structured_outputs.json", constraint.json, "a JSON schema that is an object")
    if not is_utf8(strings):
        raise ConfigError(f"structured_outputs.{kind} holds half a character (a lone surrogate); "
                          "allowed: text that UTF-8 can write")
    return kind, text


def literal(text: str) -> str:
    """The regular expression that only `text` matches. An empty one is written as a group."""
    return re.sub(r"[^\w\s]", lambda found: f"\\x{{{ord(found[0]):x}}}", text) or "()"


def plain_tokenizer(tokenizer_json: str) -> dict[str, Any]:
    """`tokenizer.json` for a library that learns by tokenising: every text is written in plain tokens.

    A constraint may ask for the very text of a special token, such as `<|im_end|>`, and means these characters and
    not the token. So special tokens get names that no text contains. Padding and truncation would bend it, too.
    """
    source: dict[str, Any] = json.loads(tokenizer_json) | {"padding": None, "truncation": None, "post_processor": None}
    names = {token["content"]: f"\0special token {token['id']}\0" for token in source["added_tokens"]
             if token["special"]}
    for token in source["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = source["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): token_id for text, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return source


def unpack_bits(words: Tensor) -> Tensor:
    """int32 [C, W] -> bool [C, 32 * W]: bit i of word w is column 32 * w + i."""
    bits = words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device)
    return (bits & 1).bool().flatten(1)


def _possible(entry: dict[int, Logprob] | None) -> dict[int, Logprob] | None:
    return entry and {i: logprob for i, logprob in entry.items() if logprob.logprob > float("-inf")}


def _first_line(error: str) -> str:
    return " ".join(error.partition("<state>")[0].split())[:300]
