"""Async scheduling: while the model runs one step, conclude the step before it and choose the one after it.

    model thread   [ run n-1              ][ run n                ][ run n+1
    main thread    [ conclude n-2 pick n  ][ conclude n-1 pick n+1][ conclude n

Only what a token *means* as text is found out late. So a sequence that a stop string ends is run once more before
anyone notices, and that token is thrown away: a little work wasted to keep the model busy.
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
from m0_basics.request import SequenceStatus
from m0_basics.sampler import Sampler
from m1_offline.output_processor import OutputProcessor

from .engine import Failure, LLMEngine, Recorded
from .kv_cache_manager import SlotCopy
from .plugins.base import SchedulerPlugin
from .scheduler import Sampled, Scheduler, SchedulerOutput


class AsyncSchedulingEngine(LLMEngine):
    """`LLMEngine` with the step cut in two. The tokens are the same; they are reported one step later.

    The model thread gets a `Batch`, in which nothing changes any more. Of requests it touches the log-probabilities of
    prompts alone, and of the scheduler nothing.
    The queue lengths in `StepStats` are those after the next step was chosen.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, sampler: Sampler, output_processor: OutputProcessor,
                 copy_slots: Callable[[list[SlotCopy]], None], plugins: Items[SchedulerPlugin] = ()) -> None:
        """As `LLMEngine`; model and sampler run in a thread of their own."""
        super().__init__(scheduler, runner, sampler, output_processor, copy_slots, plugins)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._chosen: tuple[SchedulerOutput, int] | None = None     # ahead, for the next step; and its token budget
        self._recorded = Recorded([], 0)                            # by the previous step; not concluded yet

    def step(self) -> list[RequestOutput]:
        """Start what was chosen; meanwhile conclude the previous step and choose the next; then record the tokens."""
        start = time.perf_counter()
        self._aborted = []
        output, budget = self._take_chosen()
        ended = output.expired.copy()
        num_prompt_tokens = output.num_prefill_tokens
        self.copy_slots(output.copies)
        running = self._start(output.scheduled) if output.scheduled else None
        updated = self._conclude(self._recorded, ended)
        self._recorded = Recorded([], 0)
        if running is not None:
            self.scheduler.update_from_output(output)
            self._chosen = self._schedule()
            ended += self._chosen[0].expired                # now: if nobody else is left, no other step will say so
            sampled, failures = self._await(running, output.scheduled)
            for sequence, error in failures:
                self._fail(sequence, error, ended)
            self._recorded = self._record(output, sampled, ended)
            self._report(start, output, num_prompt_tokens, self._recorded.num_tokens, budget)
        return self._hand_out(updated, ended)

    def _take_chosen(self) -> tuple[SchedulerOutput, int]:
        """What was chosen ahead, less the sequences that have ended since; chosen now if nothing was."""
        chosen, self._chosen = self._chosen, None
        if chosen is None or not (chosen[0].scheduled or chosen[0].copies):
            return self._schedule()
        output, budget = chosen
        going_on = [s for s in output.scheduled if not s.sequence.is_finished and s.sequence.ends_as is None]
        return replace(output, scheduled=going_on, expired=[]), budget

    def _start(self, scheduled: list[ScheduledSequence]) -> Future[list[Sampled]]:
        """Hand the step to the model thread. What fails while it is prepared fails as if it had failed there."""
        try:
            return self._thread.submit(self._run, self._prepare(scheduled))
        except Exception as error:
            failed = Future[list[Sampled]]()
            failed.set_exception(error)
            return failed

    def _await(self, running: Future[list[Sampled]],
               scheduled: list[ScheduledSequence]) -> tuple[list[Sampled], list[Failure]]:
        """What the model thread has sampled. A failed step is run again here, less what has moved on meanwhile."""
        try:
            return running.result(), []
        except Exception as error:
            going_on = [s for s in scheduled if not s.sequence.is_finished]
            self._take_back(going_on)
            if len(scheduled) == 1:             # it was by itself: there is nobody else to blame
                return [], [(s.sequence, error) for s in going_on]
            again = [s for s in going_on if s.sequence.status is SequenceStatus.RUNNING]
            sampled, failures = self._run_each(again)
            failed = {sequence.seq_id for sequence, _ in failures}
            for s in again:
                if s.sequence.seq_id not in failed:
                    s.sequence.num_computed_tokens = s.end
            return sampled, failures

    def _take_back(self, scheduled: list[ScheduledSequence]) -> None:
        """Nothing was computed: who still runs is left at `start`; who was sent back meanwhile keeps no cache."""
        for s in scheduled:
            if s.sequence.status is SequenceStatus.RUNNING:
                s.sequence.num_computed_tokens = s.start
            else:
                self.scheduler.kv_cache_manager.free(s.sequence)
                s.sequence.num_computed_tokens = 0
                self.queues.sort_anew(s.sequence)
