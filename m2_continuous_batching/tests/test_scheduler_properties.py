"""F2.2, F2.5, F2.6, F2.7: whatever arrives and leaves, whatever the policy, each step and both queues are in order."""
from __future__ import annotations

from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from m0_basics.request import Request, SequenceStatus
from m2_continuous_batching.policies import SchedulingParams, SLAPolicy, make_policy
from m2_continuous_batching.queues import TIME_LIMIT
from m2_continuous_batching.tests.fake_loop import MAX_MODEL_LEN, FakeLoop, SlotPool, make_request

POLICIES = ["fcfs", "priority", "ageing:3", "sjf", "shortest-first:2", "round-robin:1", "round-robin:2",
            "sla:a=0.5,b=0.25,c=0", "sla:a=0,b=0.6"]


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, aborts, steps, time passing and plugins meddling. `FakeLoop` checks each step."""

    slot_pool: ClassVar[bool] = False

    @initialize(policy=st.sampled_from(POLICIES), num_rows=st.integers(1, 4), extra=st.integers(0, 12))
    def begin(self, policy: str, num_rows: int, extra: int) -> None:
        manager = SlotPool(MAX_MODEL_LEN + extra) if self.slot_pool else None
        self.loop = FakeLoop(make_policy(policy), num_rows, MAX_MODEL_LEN + extra, manager)
        self.policy = policy
        self.requests: list[Request] = []
        self.limits: dict[str, float] = {}
        self.reordered = False

    @rule(num_prompt=st.integers(1, 14), max_tokens=st.none() | st.integers(1, 8), n=st.integers(1, 3),
          priority=st.integers(-2, 2), rank=st.integers(0, 2), timeout=st.none() | st.floats(0.5, 8))
    def add(self, num_prompt: int, max_tokens: int | None, n: int, priority: int, rank: int,
            timeout: float | None) -> None:
        policy = self.loop.scheduler.queues.policy
        names = list(policy.classes) if isinstance(policy, SLAPolicy) else [None]
        request = make_request(num_prompt, max_tokens, self.loop.now, n)
        self.loop.add(request, SchedulingParams(priority, names[rank % len(names)], timeout))
        self.requests.append(request)
        if timeout is not None:
            self.limits[request.request_id] = self.loop.now + timeout

    @precondition(lambda self: self.loop.scheduler.queues.has_unfinished_requests())
    @rule(seconds=st.floats(0, 2), times=st.integers(1, 4))
    def step(self, seconds: float, times: int) -> None:
        for _ in range(times):
            output = self.loop.step()
            for request in output.expired:
                assert self.loop.now > self.limits[request.request_id]
                assert TIME_LIMIT in {s.stop_reason for s in request.sequences}
            late = [i for i, limit in self.limits.items() if limit < self.loop.now]
            assert all(r.is_finished for r in self.requests if r.request_id in late), "outlives its time limit"
            self.loop.now += seconds

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        known = not request.is_finished
        assert (self.loop.scheduler.queues.abort(request.request_id) is request) == known
        assert request.is_finished
        assert self.loop.scheduler.queues.abort(request.request_id) is None
        self.loop.check_queues()

    @rule(budget=st.integers(1, 3) | st.integers(1, 60))
    def set_budget(self, budget: int) -> None:
        scheduler = self.loop.scheduler
        scheduler.token_budget = budget
        assert scheduler.token_budget == min(budget, scheduler.max_num_batched_tokens)

    @rule(rotate=st.integers(1, 3))
    def reorder(self, rotate: int) -> None:
        """As a plugin may."""
        waiting = self.loop.scheduler.waiting
        if len(waiting) > 1:
            waiting[:] = waiting[rotate % len(waiting):] + waiting[:rotate % len(waiting)]
            self.reordered = True

    def teardown(self) -> None:
        """With no more arrivals everything ends: each step adds a token at least, so their number is a bound."""
        if not hasattr(self, "loop"):
            return
        left = sum(r.sampling_params.n * min(r.sampling_params.max_tokens or MAX_MODEL_LEN, MAX_MODEL_LEN)
                   for r in self.requests)
        self.loop.run(left + 1)
        assert all(r.is_finished for r in self.requests)
        assert self.loop.manager.usage == 0
        assert not self.loop.scheduler.queues._requests
        assert not self.loop.scheduler.queues._deadlines
        if self.policy == "fcfs" and not self.reordered:
            order = {r.request_id: i for i, r in enumerate(self.requests)}
            admitted = [order[i] for i in self.loop.admitted]
            assert admitted == sorted(admitted), "somebody overtook"
        for request in self.requests:
            for sequence in request.sequences:
                wanted = min(request.sampling_params.max_tokens or MAX_MODEL_LEN,
                             MAX_MODEL_LEN - sequence.num_prompt_tokens)
                aborted = sequence.status is SequenceStatus.FINISHED_ABORTED
                assert aborted or len(sequence.output_token_ids) == wanted


class SlotPoolMachine(SchedulerMachine):
    """The same where slots run out in mid-decode, and sequences are preempted from the tail."""

    slot_pool = True


TestRows = SchedulerMachine.TestCase
TestSlotPool = SlotPoolMachine.TestCase
TestRows.settings = TestSlotPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
