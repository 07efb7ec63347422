"""The offline engine: one request at a time, all its outputs side by side, each token computed once.

The first step runs the whole prompt (prefill), every later step one token per output (decode). Both are the
same line: run what is not computed yet.
"""
from __future__ import annotations

import time
from collections import deque

from torch import Tensor

from m0_basics.attention import ScheduledSequence
from m0_basics.config import reject
from m0_basics.engine import Engine
from m0_basics.model_runner import ModelRunner
from m0_basics.outputs import RequestOutput
from m0_basics.request import Request, Sequence, SequenceStatus, next_seq_id
from m0_basics.sampler import Sampler, SamplerOutput

from .kv_cache import CacheRows
from .output_processor import OutputProcessor


class OfflineEngine(Engine):
    """Serves requests in order of arrival; the next one starts when the one before is finished."""

    def __init__(self, runner: ModelRunner, sampler: Sampler, output_processor: OutputProcessor,
                 rows: CacheRows) -> None:
        self.runner = runner
        self.sampler = sampler
        self.output_processor = output_processor
        self.rows = rows
        self.max_num_seqs = rows.num_free
        self.waiting: deque[Request] = deque()

    def check_request(self, request: Request) -> None:
        params = request.sampling_params
        self.sampler.check(params)
        if (params.best_of or 1) > self.max_num_seqs:
            raise reject("best_of" if params.best_of != params.n else "n", params.best_of,
                         f"at most max_num_seqs={self.max_num_seqs}, the rows of the cache")

    def add_request(self, request: Request) -> None:
        self.check_request(request)
        self.waiting.append(request)

    def abort_request(self, request_id: str) -> None:
        for request in [r for r in self.waiting if r.request_id == request_id]:
            for sequence in request.sequences:
                if not sequence.is_finished:
                    self._release(sequence)
                    sequence.set_status(SequenceStatus.FINISHED_ABORTED)
            self.waiting.remove(request)

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[RequestOutput]:
        """Schedule, execute, sample, update."""
        if not self.waiting:
            return []
        request = self.waiting[0]
        scheduled = self._schedule(request)
        logits = self.runner.execute_model(scheduled)
        for s in scheduled:
            s.sequence.num_computed_tokens = s.end
        sequences, logits = self._fork(request, logits)
        return self._update(request, sequences, self.sampler(logits, sequences))

    def _schedule(self, request: Request) -> list[ScheduledSequence]:
        for sequence in request.get_seqs(SequenceStatus.WAITING):
            self.rows.allocate(sequence)
            sequence.set_status(SequenceStatus.RUNNING)
            request.metrics.first_scheduled_time = time.perf_counter()
        return [ScheduledSequence.rest(s) for s in request.get_seqs(SequenceStatus.RUNNING)]

    def _fork(self, request: Request, logits: Tensor) -> tuple[list[Sequence], Tensor]:
        """After the prefill, let the outputs part ways: the prompt was run once, its cache row is copied."""
        sequences = request.get_seqs(SequenceStatus.RUNNING)
        best_of = request.sampling_params.best_of or 1
        if best_of == len(request.sequences):
            return sequences, logits
        parent = sequences[0]
        for index in range(1, best_of):
            child = parent.fork(next_seq_id(), index)
            self.rows.fork(parent, child)
            request.sequences.append(child)
        return request.sequences.copy(), logits.repeat(best_of, 1)

    def _update(self, request: Request, sequences: list[Sequence], sampled: SamplerOutput) -> list[RequestOutput]:
        for sequence, token_id, logprobs in zip(sequences, sampled.token_ids, sampled.logprobs, strict=True):
            self.output_processor.process(sequence, token_id, logprobs)
            if sequence.is_finished:
                self._release(sequence)
        request.metrics.token_times += [time.perf_counter()] * len(sequences)
        if request.is_finished:
            self.waiting.popleft()
            request.metrics.finished_time = request.metrics.token_times[-1]
        if not (request.stream or request.is_finished):
            return []
        return [self.output_processor.make_output(request)]

    def _release(self, sequence: Sequence) -> None:
        if sequence.status is not SequenceStatus.WAITING:
            self.rows.free(sequence)
        self.output_processor.close(sequence)
