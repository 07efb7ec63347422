"""Async scheduling: while the model runs one step, conclude the step before it and choose the one after it.

    model thread   [ run n-1              ][ run n                ][ run n+1
    main thread    [ conclude n-2 pick n  ][ conclude n-1 pick n+1][ conclude n

Only what a token *means* is found out late: its text, and whether it ends the output. So a sequence that ends is
run once more before anyone notices, and that token is thrown away: a little work wasted to keep the model busy.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from m0_basics.attention import ScheduledSequence
from m0_basics.model_runner import Runner
from m0_basics.outputs import RequestOutput
from m0_basics.request import Sequence, SequenceStatus
from m0_basics.sampler import Sampler
from m1_offline.output_processor import OutputProcessor

from .engine import Failure, LLMEngine, Sampled, is_decode
from .kv_cache_manager import SlotCopy
from .plugins.base import SchedulerPlugin
from .scheduler import Scheduler, SchedulerOutput


class AsyncSchedulingEngine(LLMEngine):
    """`LLMEngine` with the step cut in two. The tokens are the same; they are reported one step later.

    The model thread gets a `Batch`, in which nothing changes any more, and touches neither scheduler nor requests.
    The queue lengths in `StepStats` are those after the next step was chosen.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, sampler: Sampler, output_processor: OutputProcessor,
                 copy_slots: Callable[[list[SlotCopy]], None], plugins: Items[SchedulerPlugin] = ()) -> None:
        """As `LLMEngine`; model and sampler run in a thread of their own."""
        super().__init__(scheduler, runner, sampler, output_processor, copy_slots, plugins)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._chosen: tuple[SchedulerOutput, int] | None = None     # ahead, for the next step; and its token budget
        self._recorded: list[Sequence] = []                         # sequences whose newest token is not concluded yet

    def step(self) -> list[RequestOutput]:
        """Start what was chosen; meanwhile conclude the previous step and choose the next; then record the tokens."""
        start = time.perf_counter()
        self._aborted = []
        output, budget = self._take_chosen()
        ended = output.expired.copy()
        num_prompt_tokens = sum(s.num_tokens for s in output.scheduled if not is_decode(s))
        self.copy_slots(output.copies)
        running = self._start(output.scheduled) if output.scheduled else None
        updated = self._conclude(self._recorded, ended)
        self._recorded = []
        if running is not None:
            starts = [s.sequence.num_computed_tokens for s in output.scheduled]
            self.scheduler.update_from_output(output)
            self._chosen = self._choose()
            ended += self._chosen[0].expired                # now: if nobody else is left, no other step will say so
            sampled, failures = self._await(running, output.scheduled, starts)
            for sequence, error in failures:
                self._fail(sequence, error, ended)
            self._recorded = self._record(sampled, ended)
            self._report(start, output, num_prompt_tokens, len(self._recorded), budget)
        return self._hand_out(updated, ended)

    def _take_chosen(self) -> tuple[SchedulerOutput, int]:
        """What was chosen ahead, less the sequences that have ended since; chosen now if nothing was.

        That a sequence has reached its length is known without its text: it is not run once more.
        """
        chosen, self._chosen = self._chosen, None
        if chosen is None or not (chosen[0].scheduled or chosen[0].copies):
            return self._choose()
        output, budget = chosen
        going_on = [s for s in output.scheduled if not s.sequence.is_finished and not self._is_complete(s.sequence)]
        return replace(output, scheduled=going_on, expired=[]), budget

    def _is_complete(self, sequence: Sequence) -> bool:
        most = sequence.sampling_params.max_tokens
        return (sequence.num_tokens >= self.output_processor.max_model_len
                or (most is not None and len(sequence.output_token_ids) >= most))

    def _start(self, scheduled: list[ScheduledSequence]) -> Future[list[Sampled]]:
        """Hand the step to the model thread. What fails while it is prepared fails as if it had failed there."""
        try:
            return self._thread.submit(self._run, self._prepare(scheduled))
        except Exception as error:
            failed = Future[list[Sampled]]()
            failed.set_exception(error)
            return failed

    def _await(self, running: Future[list[Sampled]], scheduled: list[ScheduledSequence],
               starts: list[int]) -> tuple[list[Sampled], list[Failure]]:
        """What the model thread has sampled. A failed step is run again here, less what has moved on meanwhile."""
        try:
            return running.result(), []
        except Exception as error:
            again = [(s, start) for s, start in zip(scheduled, starts, strict=True)
                     if s.sequence.status is SequenceStatus.RUNNING]
            if len(scheduled) == 1:             # it was by itself: there is nobody else to blame
                return [], [(s.sequence, error) for s, _ in again]
            for s, start in again:
                s.sequence.num_computed_tokens = start
            found = self._run_each([s for s, _ in again])
            for s, _ in again:
                s.sequence.num_computed_tokens = s.end
            return found
