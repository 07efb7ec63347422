"""The engine seam, and the naive loop behind it: one request at a time, the whole sequence at every step."""
from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping

from .attention import ScheduledSequence
from .config import EngineConfig
from .loading.tokenizer import Tokenizer
from .model_runner import ModelRunner
from .outputs import RequestOutput
from .request import Logprob, Request, Sequence, SequenceStatus
from .sampler import Sampler


class Engine(ABC):
    """Requests in, outputs out, one step at a time."""

    request_options: Mapping[str, type] = {}        # what else `check_request` and `add_request` take, by name

    @abstractmethod
    def check_request(self, request: Request) -> None:
        """Raise ConfigError for a request that this engine could never serve."""

    @abstractmethod
    def add_request(self, request: Request) -> None:
        """Queue a request. Raises ConfigError, and changes nothing, where `check_request` does."""

    @abstractmethod
    def abort_request(self, request_id: str) -> None:
        """Drop a request and all it holds; an unknown id is ignored (it may just have finished)."""

    @abstractmethod
    def step(self) -> list[RequestOutput]:
        """Run the model once. Returns finished requests, and the progress of those that stream; [] when idle."""

    @abstractmethod
    def has_unfinished_requests(self) -> bool:
        """Whether another step has anything to do."""


class NaiveEngine(Engine):
    """Recomputes everything: nothing is kept from one step to the next but the tokens."""

    def __init__(self, runner: ModelRunner, sampler: Sampler, tokenizer: Tokenizer | None,
                 config: EngineConfig) -> None:
        assert config.model_config.max_model_len is not None
        self.runner = runner
        self.sampler = sampler
        self.tokenizer = tokenizer
        self.max_model_len = config.model_config.max_model_len
        self.waiting: deque[Request] = deque()

    def check_request(self, request: Request) -> None:
        self.sampler.check(request.sampling_params)

    def add_request(self, request: Request) -> None:
        self.check_request(request)
        self.waiting.append(request)

    def abort_request(self, request_id: str) -> None:
        for request in [r for r in self.waiting if r.request_id == request_id]:
            request.sequences[0].set_status(SequenceStatus.FINISHED_ABORTED)
            self.waiting.remove(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[RequestOutput]:
        """Schedule, execute, sample, update."""
        if not self.waiting:
            return []
        request, sequence = self._schedule()
        logits = self.runner.execute_model([ScheduledSequence.rest(sequence)])
        sampled = self.sampler(logits, [sequence])
        return self._update(request, sequence, sampled.token_ids[0])

    def _schedule(self) -> tuple[Request, Sequence]:
        request = self.waiting[0]
        sequence = request.sequences[0]
        if sequence.status is SequenceStatus.WAITING:
            sequence.set_status(SequenceStatus.RUNNING)
            request.metrics.first_scheduled_time = time.perf_counter()
        return request, sequence

    def _update(self, request: Request, sequence: Sequence, token_id: int) -> list[RequestOutput]:
        append_token(sequence, token_id, None)
        status = check_stop(sequence, self.max_model_len)
        request.metrics.token_times.append(time.perf_counter())
        if status is not None:
            sequence.set_status(status)
            self.waiting.popleft()
            request.metrics.finished_time = request.metrics.token_times[-1]
        if not (request.stream or status):
            return []
        params = sequence.sampling_params
        if self.tokenizer is not None and params.detokenize:
            # The token that ended the output is no part of its text.
            token_ids = sequence.output_token_ids[:-1] if status is SequenceStatus.FINISHED_STOPPED else (
                sequence.output_token_ids)
            text = self.tokenizer.decode_output(token_ids, request.prompt_token_ids, params.skip_special_tokens)
            # A character whose bytes span tokens is not complete yet: hold it back until it is.
            sequence.output_text = text if status else text.rstrip("\ufffd")
        return [RequestOutput.from_request(request)]


def append_token(sequence: Sequence, token_id: int, logprobs: dict[int, Logprob] | None) -> None:
    """Add a sampled token, and its log-probability to the sequence's total where the sampler gave one."""
    sequence.append_token_id(token_id)
    if logprobs is not None:
        sequence.logprobs.append(logprobs)
        sequence.cumulative_logprob = (sequence.cumulative_logprob or 0.0) + logprobs[token_id].logprob


def check_stop(sequence: Sequence, max_model_len: int) -> SequenceStatus | None:
    """The state that the newest token ends the sequence in, or None. Sets `stop_reason` for a stop token."""
    params, output = sequence.sampling_params, sequence.output_token_ids
    num_tokens, token_id = len(output), output[-1]
    if num_tokens >= params.min_tokens:
        if token_id in sequence.eos_token_ids and not params.ignore_eos:
            return SequenceStatus.FINISHED_STOPPED
        if token_id in params.all_stop_token_ids:
            sequence.stop_reason = token_id
            return SequenceStatus.FINISHED_STOPPED
    if params.max_tokens is not None and num_tokens >= params.max_tokens:
        return SequenceStatus.FINISHED_LENGTH_CAPPED
    if sequence.num_tokens >= max_model_len:
        return SequenceStatus.FINISHED_LENGTH_CAPPED
    return None
