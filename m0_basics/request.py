"""A request, its sequences, and the states a sequence passes through.

    Request        one prompt with its sampling parameters; owns one Sequence per output
    Sequence       one output in the making: state, progress, log-probabilities
    SequenceData   the token ids, nothing else

    ids        [ prompt ................. | output ........ ]
    progress   [ computed (0 .. num_computed_tokens) | still to run ]

`num_computed_tokens` is the only progress state. There is no "prefill" or "decode" flag: a sequence with
many tokens still to run is prefilling, one with a single token to run is decoding.
"""
from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import reduce
from operator import add

from .sampling_params import SamplingParams


@dataclass(frozen=True)
class Logprob:
    """Natural-log probability of one token, its rank (1 is the most probable), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class SequenceStatus(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"                                 # queued, holds nothing
    RUNNING = "running"                                 # in the engine's batch
    SWAPPED = "swapped"                                 # its cache lies in host memory
    FINISHED_STOPPED = "stop"                           # end-of-sequence token, stop token or stop string
    FINISHED_LENGTH_CAPPED = "length"                   # max_tokens or max_model_len
    FINISHED_ABORTED = "abort"                          # cancelled, or failed

    @property
    def is_finished(self) -> bool:
        return self in _FINISHED

    @property
    def finish_reason(self) -> str | None:
        """"stop", "length" or "abort"; None while it is not finished."""
        return self.value if self.is_finished else None


# A tuple: it is searched by identity, and hashing a member of an Enum is a call into Python.
_FINISHED = (SequenceStatus.FINISHED_STOPPED, SequenceStatus.FINISHED_LENGTH_CAPPED, SequenceStatus.FINISHED_ABORTED)
LEGAL_TRANSITIONS: dict[SequenceStatus, frozenset[SequenceStatus]] = {
    SequenceStatus.WAITING: frozenset({SequenceStatus.RUNNING, SequenceStatus.FINISHED_ABORTED}),
    SequenceStatus.RUNNING: frozenset({SequenceStatus.WAITING, SequenceStatus.SWAPPED, *_FINISHED}),
    SequenceStatus.SWAPPED: frozenset({SequenceStatus.RUNNING, SequenceStatus.WAITING,
                                       SequenceStatus.FINISHED_ABORTED}),
    **{status: frozenset() for status in _FINISHED},
}


class IllegalTransitionError(RuntimeError):
    """A bug in an engine: a sequence was moved between two states that have no arrow between them."""


@dataclass
class SequenceData:
    """Token ids of one sequence. The prompt is shared by all forks and never changed."""

    prompt_token_ids: list[int]
    output_token_ids: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output joined: a new list at each call, so use `token_slice` inside an engine."""
        return self.prompt_token_ids + self.output_token_ids

    def token_slice(self, start: int, stop: int) -> list[int]:
        """Token ids [start, stop) without joining the two lists."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt:stop - num_prompt]
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        return self.prompt_token_ids[start:] + self.output_token_ids[:stop - num_prompt]

    def copy(self) -> SequenceData:
        """Own output list, same prompt list. Token ids are immutable, so a copy of the list is deep enough."""
        return SequenceData(self.prompt_token_ids, self.output_token_ids.copy())


@dataclass(eq=False)
class Sequence:
    """One output in the making."""

    seq_id: int
    data: SequenceData
    sampling_params: SamplingParams
    seed: int                                       # the request's; with `index` it fixes every random choice
    eos_token_ids: tuple[int, ...] = ()             # the model's
    index: int = 0                                  # which of the request's outputs this is
    status: SequenceStatus = SequenceStatus.WAITING
    ends_as: SequenceStatus | None = None           # set when its last token is recorded; its status once concluded
    num_computed_tokens: int = 0                    # advanced by the engine, after each step
    cumulative_logprob: float | None = None         # this and the next two are filled from the sampler's output
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)    # filled by the ModelRunner
    output_text: str = ""                           # filled by the detokenizer
    stop_reason: int | str | None = None            # the stop string or token that ended it
    cache_salt: str = ""                            # the request's

    @property
    def num_tokens(self) -> int:
        return len(self.data)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.data.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.data.output_token_ids

    @property
    def is_finished(self) -> bool:
        return self.status.is_finished

    def set_status(self, status: SequenceStatus) -> None:
        """Move to another state. Raises IllegalTransitionError where the state machine has no such arrow."""
        if status not in LEGAL_TRANSITIONS[self.status]:
            allowed = ", ".join(sorted(s.name for s in LEGAL_TRANSITIONS[self.status])) or "none, it is final"
            raise IllegalTransitionError(
                f"sequence {self.seq_id}: {self.status.name} -> {status.name}; allowed: {allowed}")
        self.status = status

    def append_token_id(self, token_id: int) -> None:
        self.data.output_token_ids.append(token_id)

    def fork(self, seq_id: int, index: int) -> Sequence:
        """A copy that grows on its own: changing it leaves this sequence as it was."""
        return Sequence(seq_id, self.data.copy(), self.sampling_params, self.seed, self.eos_token_ids, index,
                        self.status, self.ends_as, self.num_computed_tokens, self.cumulative_logprob,
                        self.logprobs.copy(), self.prompt_logprobs.copy(), self.output_text, self.stop_reason,
                        self.cache_salt)

    def with_drafts(self, token_ids: Iterable[int]) -> Sequence:
        """For the sampler: this sequence as it would be with `token_ids` behind its newest token."""
        data = SequenceData(self.data.prompt_token_ids, [*self.data.output_token_ids, *token_ids])
        return Sequence(self.seq_id, data, self.sampling_params, self.seed, self.eos_token_ids, self.index, self.status)

    def truncate(self, num_output_tokens: int) -> None:
        """Forget the output tokens behind the first `num_output_tokens`, and their log-probabilities."""
        del self.output_token_ids[num_output_tokens:], self.logprobs[num_output_tokens:]
        self.num_computed_tokens = min(self.num_computed_tokens, self.num_tokens)
        if self.logprobs:           # summed anew, in order: what the sum was before those tokens came, to the last bit
            chosen = zip(self.logprobs, self.output_token_ids, strict=True)
            self.cumulative_logprob = reduce(add, (entry[token_id].logprob for entry, token_id in chosen), 0.0)


@dataclass
class RequestMetrics:
    """Times on one monotonic clock, in seconds. Owned by the engine that serves the request."""

    arrival_time: float = field(default_factory=time.perf_counter)
    first_scheduled_time: float | None = None
    token_times: list[float] = field(default_factory=list)      # one entry for each token of each output: when it came
    finished_time: float | None = None

    @property
    def first_token_time(self) -> float | None:
        return self.token_times[0] if self.token_times else None


_seq_counter = itertools.count()


def next_seq_id() -> int:
    """A number no other sequence of this process has."""
    return next(_seq_counter)


@dataclass(eq=False)
class Request:
    """One prompt, its sampling parameters and its sequences."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()
    stream: bool = False                                        # report after each step, not only at the end
    cache_salt: str = ""                                        # requests of different salts share nothing
    num_cached_tokens: int = 0                                  # of the prompt, that were in the cache when it began
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.sequences:
            self.sequences = [Sequence(next_seq_id(), SequenceData(self.prompt_token_ids), self.sampling_params,
                                       self.seed, self.eos_token_ids, cache_salt=self.cache_salt)]

    @property
    def is_finished(self) -> bool:
        return all(sequence.is_finished for sequence in self.sequences)

    def get_seqs(self, status: SequenceStatus | None = None) -> list[Sequence]:
        """The request's sequences, all of them or those in one state."""
        return [s for s in self.sequences if status is None or s.status is status]
