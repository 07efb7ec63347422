"""The engine loop: schedule, execute, sample, update. From here on every milestone runs this loop unchanged.

One step serves all requests at once, each at its own place: some run their prompt, others their newest token.
What fails for one request ends that request; the others do not notice.
"""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from m0_basics.attention import ScheduledSequence
from m0_basics.base_llm import BaseLLM
from m0_basics.config import ConfigError
from m0_basics.engine import Engine
from m0_basics.model_runner import ModelInputs, Runner
from m0_basics.outputs import RequestOutput
from m0_basics.request import Request, Sequence, SequenceStatus, next_seq_id
from m0_basics.sampler import Sampler
from m1_offline.output_processor import OutputProcessor

from .kv_cache_manager import SlotCopy
from .plugins.base import SchedulerPlugin, StepStats
from .policies import SchedulingParams
from .scheduler import Sampled, Scheduler, SchedulerOutput

logger = logging.getLogger(__name__)
Failure = tuple[Sequence, Exception]


@dataclass(frozen=True)
class Batch:
    """A step, ready to run. Nothing in it changes while it runs, whatever becomes of the queues meanwhile."""

    inputs: ModelInputs
    sequences: list[Sequence]       # those that sample: the inputs', and outputs that part from them in this step
    rows: Tensor | None             # which row of the logits each of them samples from; None: each from its own


@dataclass(frozen=True)
class Recorded:
    """What a step has added, to be concluded."""

    sequences: list[Sequence]       # each once, however many tokens it got
    num_tokens: int                 # in all


class LLMEngine(Engine):
    """Requests join and leave after every step."""

    request_options: Mapping[str, type] = {"scheduling_params": SchedulingParams}

    def __init__(self, scheduler: Scheduler, runner: Runner, sampler: Sampler, output_processor: OutputProcessor,
                 copy_slots: Callable[[list[SlotCopy]], None], plugins: Items[SchedulerPlugin] = ()) -> None:
        """`copy_slots` makes the copies in the KV cache that the scheduler's bookkeeping asks for."""
        self.scheduler = scheduler
        self.queues = scheduler.queues
        self.runner = runner
        self.sampler = sampler
        self.output_processor = output_processor
        self.copy_slots = copy_slots
        self.plugins = list(plugins)
        self._num_steps = 0
        self._aborted: list[Request] = []           # since the step began: by plugins, so the step has to report them

    def check_request(self, request: Request, scheduling_params: SchedulingParams | None = None) -> None:
        self.sampler.check(request.sampling_params)
        self.scheduler.check_request(request, scheduling_params or SchedulingParams())

    def add_request(self, request: Request, scheduling_params: SchedulingParams | None = None) -> None:
        self.check_request(request, scheduling_params)
        self.queues.add(request, scheduling_params or SchedulingParams())

    def abort_request(self, request_id: str) -> None:
        if (request := self.queues.abort(request_id)) is not None:
            self._aborted.append(request)
            self._complete(request)

    def has_unfinished_requests(self) -> bool:
        return self.queues.has_unfinished_requests()

    def step(self) -> list[RequestOutput]:
        """Schedule, execute, sample, update."""
        start = time.perf_counter()
        self._aborted = []
        output, budget = self._schedule()
        ended = output.expired.copy()                       # requests that end in this step without a token
        num_prompt_tokens = output.num_prefill_tokens
        self.copy_slots(output.copies)
        sampled, failures = self._run_isolated(output.scheduled) if output.scheduled else ([], [])
        for sequence, error in failures:
            self._fail(sequence, error, ended)
        self.scheduler.update_from_output(output)
        recorded = self._record(output, sampled, ended)
        updated = self._conclude(recorded, ended)
        if output.scheduled:
            self._report(start, output, num_prompt_tokens, recorded.num_tokens, budget)
        return self._hand_out(updated, ended)

    def _schedule(self) -> tuple[SchedulerOutput, int]:
        """What runs next, and the token budget that it was chosen under."""
        for plugin in self.plugins:
            plugin.before_step(self.scheduler)
        return self.scheduler.schedule(), self.scheduler.token_budget

    def _run_isolated(self, scheduled: list[ScheduledSequence]) -> tuple[list[Sampled], list[Failure]]:
        """Run the step; if it raises, run each sequence alone, so that only the one to blame ends with the error."""
        try:
            return self._run(self._prepare(scheduled)), []
        except Exception as error:
            if len(scheduled) == 1:
                if scheduled[0].draft_token_ids:        # a guess may lead where no token is allowed: run without
                    return self._run_isolated([scheduled[0].without_drafts()])
                return [], [(scheduled[0].sequence, error)]
            logger.warning("a step of %d sequences failed (%s); each is run by itself", len(scheduled), error)
        return self._run_each(scheduled)

    def _run_each(self, scheduled: list[ScheduledSequence]) -> tuple[list[Sampled], list[Failure]]:
        """Each sequence in a step of its own. Returns what was sampled, and who failed."""
        sampled, failures = list[Sampled](), list[Failure]()
        for s in scheduled:
            one, failure = self._run_isolated([s])
            sampled += one
            failures += failure
        return sampled, failures

    def _prepare(self, scheduled: list[ScheduledSequence]) -> Batch:
        """Read everything that the step needs from the sequences."""
        inputs = self.runner.prepare_inputs(scheduled)
        sampling, rows = self._fan_out(inputs.sampled)
        parted = len(rows) > len(inputs.sampled)
        return Batch(inputs, sampling, torch.tensor(rows, device=inputs.input_ids.device) if parted else None)

    def _run(self, batch: Batch) -> list[Sampled]:
        """Execute the model and sample. To run it twice gives the same: no token is recorded before `_record`."""
        logits = self.runner.execute(batch.inputs)
        if batch.rows is not None:
            logits = logits[batch.rows]
        sampled = self.sampler(logits, batch.sequences)
        return list(zip(batch.sequences, sampled.token_ids, sampled.logprobs, strict=True))

    def _fan_out(self, sequences: list[Sequence]) -> tuple[list[Sequence], list[int]]:
        """With a prompt's first run its outputs part ways: all of them sample, from the same row of the logits.

        Takes the sequences that the logits' rows belong to. Returns those that sample, and the row of each. Outputs
        made here belong to the request once their first token is recorded.
        """
        sampling, rows = list[Sequence](), list[int]()
        for row, sequence in enumerate(sequences):
            num_outputs = (sequence.sampling_params.best_of or 1) if _is_first_token(sequence) else 1
            sampling.append(sequence)
            sampling += [sequence.fork(next_seq_id(), index) for index in range(1, num_outputs)]
            rows += [row] * num_outputs
        return sampling, rows

    def _record(self, output: SchedulerOutput, sampled: list[Sampled], ended: list[Request]) -> Recorded:
        """Append the tokens to their sequences: all that the next step needs.

        A sequence that was sent back to the queue meanwhile, or found no room as a fork, loses its token. Nothing
        depends on when a token is drawn, so it will draw the same one when its turn comes. Behind a token that ends its
        sequence nothing is appended.
        """
        accepted = self.scheduler.accept(output, sampled)
        dropped = self._add_forks([sequence for sequence, _, _ in accepted])
        recorded, num_tokens = dict[int, Sequence](), 0
        for sequence, token_id, logprobs in accepted:
            if sequence.status is SequenceStatus.RUNNING and sequence.ends_as is None and sequence not in dropped:
                try:
                    self.output_processor.record(sequence, token_id, logprobs)
                    recorded[sequence.seq_id] = sequence
                    num_tokens += 1
                except Exception as error:
                    self._fail(sequence, error, ended)
        for sequence in recorded.values():                  # a drafted token that was right may lie behind the last one
            sequence.num_computed_tokens = min(sequence.num_computed_tokens, sequence.num_tokens)
        return Recorded(list(recorded.values()), num_tokens)

    def _add_forks(self, sequences: list[Sequence]) -> set[Sequence]:
        """Let the request and the scheduler know of the outputs that part from the first one with this token.

        Returns those that are dropped: where the first one was sent back to the queue meanwhile, or has ended. They
        part when it runs again.
        """
        dropped: set[Sequence] = set()
        for parent, children in _families(sequences):
            if parent.status is not SequenceStatus.RUNNING:
                dropped.update(children)
                continue
            request = self.queues.get_request(parent)
            for child in children:
                child.prompt_logprobs = parent.prompt_logprobs.copy()       # which this step has recorded
                self.queues.fork(parent, child)
                request.sequences.append(child)
        return dropped

    def _conclude(self, recorded: Recorded, ended: list[Request]) -> list[tuple[Request, int]]:
        """What the newest tokens mean: text, and who is finished. Returns requests with how many tokens each got."""
        updated: dict[str, Request] = {}
        for sequence in recorded.sequences:
            if sequence.is_finished:
                continue
            request = self.queues.get_request(sequence)
            try:
                self.output_processor.conclude(sequence, text_is_read=request.stream)
                updated[request.request_id] = request
                if sequence.is_finished:
                    self.queues.finish(sequence)
            except Exception as error:
                self._fail(sequence, error, ended)
        return [(request, sum(len(s.output_token_ids) for s in request.sequences) - len(request.metrics.token_times))
                for request in updated.values()]

    def _fail(self, sequence: Sequence, error: Exception, ended: list[Request]) -> None:
        """End the sequence's request with an error; what it held goes back."""
        if sequence.is_finished:
            return                              # another output of the request failed before it
        request = self.queues.get_request(sequence)
        logger.error("request %s failed", request.request_id, exc_info=error)
        for other in request.sequences:
            if not other.is_finished:
                other.stop_reason = f"error: {type(error).__name__}: {error}"
        self.queues.abort(request.request_id)
        ended.append(request)

    def _hand_out(self, updated: list[tuple[Request, int]], ended: list[Request]) -> list[RequestOutput]:
        """Outputs of the requests that finished, and of those that stream. A token counts as there from now on."""
        now = time.perf_counter()
        for request, num_tokens in updated:
            request.metrics.token_times += [now] * num_tokens
        concerned = [*(request for request, _ in updated), *ended]
        for request in {id(request): request for request in concerned}.values():
            if request.is_finished and request not in self._aborted:
                self._complete(request)
        news = {id(request): request for request in (*concerned, *self._aborted)}.values()
        return [self.output_processor.make_output(request) for request in news if request.stream or request.is_finished]

    def _complete(self, request: Request) -> None:
        """The last thing that happens to a request."""
        request.metrics.finished_time = time.perf_counter()
        for sequence in request.sequences:
            try:
                self.output_processor.close(sequence)
            except Exception as error:          # its text stays as it is
                logger.error("the text of request %s is not whole", request.request_id, exc_info=error)
        for plugin in self.plugins:
            plugin.on_request_completion(request)

    def _report(self, start: float, output: SchedulerOutput, num_prompt_tokens: int, num_sampled: int,
                token_budget: int) -> None:
        if not self.plugins:
            return
        scheduler = self.scheduler
        stats = StepStats(self._num_steps, start, time.perf_counter(), output, num_prompt_tokens, num_sampled,
                          len(scheduler.running), len(scheduler.waiting), len(output.preempted),
                          scheduler.kv_cache_manager.usage, token_budget)
        self._num_steps += 1
        for plugin in self.plugins:
            plugin.after_step(scheduler, stats)


def _is_first_token(sequence: Sequence) -> bool:
    """Whether the request's first output is about to get, or is getting, its first token."""
    return sequence.index == 0 and not sequence.output_token_ids


def _families(sequences: list[Sequence]) -> Iterator[tuple[Sequence, list[Sequence]]]:
    """First outputs that get their first token, each with the outputs that part from it, which follow it."""
    firsts = [i for i, sequence in enumerate(sequences) if _is_first_token(sequence)]
    for i in firsts:
        num_outputs = sequences[i].sampling_params.best_of or 1
        yield sequences[i], sequences[i + 1:i + num_outputs]


def engine_of(llm: BaseLLM) -> LLMEngine:
    """The engine of an `LLM`. Raises ConfigError for one of an earlier milestone."""
    if not isinstance(llm.engine, LLMEngine):
        raise ConfigError(f"the engine of {type(llm).__module__} serves one request at a time; allowed: an LLM of "
                          "m2_continuous_batching or of a later milestone")
    return llm.engine
