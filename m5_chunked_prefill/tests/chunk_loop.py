"""The scheduler of mixed steps without a model: a loop that appends made-up tokens, and distrusts every step."""
from __future__ import annotations

from m0_basics.request import Request, Sequence, SequenceStatus, next_seq_id
from m2_continuous_batching.policies import SchedulingParams, make_policy
from m2_continuous_batching.queues import Queues
from m2_continuous_batching.scheduler import SchedulerOutput
from m2_continuous_batching.tests.fake_loop import MAX_MODEL_LEN, SlotPool
from m5_chunked_prefill.scheduler import ChunkedPrefillScheduler
from m5_chunked_prefill.step_cost import StepBudget, StepCost, StepShape


class ChunkLoop:
    """Schedules, checks, updates. A sequence ends with max_tokens, or at the longest length."""

    def __init__(self, policy: str = "fcfs", rows: int = 4, budget: int | None = 8, slots: int = 1000,
                 max_model_len: int = MAX_MODEL_LEN) -> None:
        self.now = 0.0
        self.manager = SlotPool(slots)
        self.max_model_len = max_model_len
        queues = Queues(make_policy(policy), self.manager, rows, max_model_len, clock=lambda: self.now)
        self.cost = StepCost()
        limit = StepBudget(self.cost, 3.0, is_fixed=budget is not None)
        self.scheduler = ChunkedPrefillScheduler(queues, limit, budget)
        self.policy = policy
        self.num_steps = 0

    def add(self, request: Request, params: SchedulingParams | None = None) -> Request:
        self.scheduler.check_request(request, params or SchedulingParams())
        self.scheduler.queues.add(request, params or SchedulingParams())
        return request

    def step(self) -> SchedulerOutput:
        running = [e.sequence for e in self.scheduler.running]
        left = {s: s.num_tokens - s.num_computed_tokens for s in running}
        output = self.scheduler.schedule()
        self.num_steps += 1
        self._check(output, left)
        shape = StepShape.of(output.scheduled)
        self.cost.observe(shape, 1e-3 + 1e-4 * shape.num_tokens + 1e-8 * shape.pairs)
        ends = [s.sequence for s in output.scheduled if s.end == s.sequence.num_tokens]
        families = [self._make_outputs(sequence) for sequence in ends]
        self.scheduler.update_from_output(output)
        for family in families:
            self._append(family)
        self._check_queues()
        return output

    def run(self, limit: int) -> int:
        """Step until all is done, at most `limit` times; returns the number of steps."""
        for steps in range(limit + 1):
            if not self.scheduler.queues.has_unfinished_requests():
                return steps
            self.step()
        raise AssertionError(f"not done after {limit} steps")

    def _check(self, output: SchedulerOutput, left: dict[Sequence, int]) -> None:
        """What holds for every step, whatever the policy. `left`: tokens to run of those who ran before it."""
        scheduler = self.scheduler
        sequences = [s.sequence for s in output.scheduled]
        assert len(set(sequences)) == len(sequences), "a sequence is scheduled twice"
        assert not set(output.preempted) & set(sequences), "preempted in the step that runs it"
        assert len(set(output.preempted)) == len(output.preempted)
        assert set(output.preempted) <= set(left)
        assert output.total_num_scheduled_tokens <= scheduler.token_budget
        assert all(s.num_tokens > 0 and s.start == s.sequence.num_computed_tokens for s in output.scheduled)
        assert all(s.end <= s.sequence.num_tokens for s in output.scheduled)
        expired = {sequence for request in output.expired for sequence in request.sequences}
        decoding = {s for s, n in left.items() if n == 1} - set(output.preempted) - expired
        first = sequences[:len(decoding)]
        if len(decoding) <= scheduler.token_budget:
            assert set(first) == decoding, "every decode runs, and stands before the chunks"
        else:
            assert set(sequences) <= decoding, "no chunk while a decode is left out"
        assert output.scheduled or not scheduler.queues.has_unfinished_requests(), "something waits, and nothing runs"
        if self.policy == "fcfs" and any(left[s] == 1 for s in output.preempted):
            stay = [e.sequence for e in scheduler.running if left.get(e.sequence, 0) > 1]
            assert not stay, "who decodes was sent back while a half-read prompt stayed"

    def _check_queues(self) -> None:
        waiting = [e.sequence for e in self.scheduler.waiting]
        running = [e.sequence for e in self.scheduler.running]
        assert len({*waiting, *running}) == len(waiting) + len(running)
        assert len(running) <= self.scheduler.queues.max_num_seqs
        assert all(s.status is SequenceStatus.WAITING and s.num_computed_tokens == 0 for s in waiting)
        assert all(s.status is SequenceStatus.RUNNING and s.num_computed_tokens < s.num_tokens for s in running)
        assert set(self.manager.held) == {s.seq_id for s in running}
        assert self.manager.num_free >= 0

    def _make_outputs(self, sequence: Sequence) -> list[Sequence]:
        if sequence.index > 0 or sequence.output_token_ids:
            return [sequence]
        return [sequence, *(sequence.fork(next_seq_id(), i) for i in range(1, sequence.sampling_params.best_of or 1))]

    def _append(self, family: list[Sequence]) -> None:
        request = self.scheduler.queues.get_request(family[0])
        for child in family[1:]:
            self.scheduler.queues.fork(family[0], child)
            request.sequences.append(child)
        for one in family:
            if one.status is not SequenceStatus.RUNNING:
                continue
            one.append_token_id(0)
            if len(one.output_token_ids) == one.sampling_params.max_tokens or one.num_tokens == self.max_model_len:
                one.set_status(SequenceStatus.FINISHED_LENGTH_CAPPED)
                self.scheduler.queues.finish(one)
