"""Who waits how long while others keep coming: the scheduler's policies over long runs."""
from __future__ import annotations

from collections import deque

import pytest

from m0_basics.request import Request
from m2_continuous_batching.policies import SchedulingParams
from m2_continuous_batching.tests.fake_loop import FakeLoop, loop_of, make_request


class TestStarvation:
    """F2.5: who waits how long, while the queue never gets empty."""

    @pytest.mark.parametrize(("policy", "bound"), [("fcfs", 8), ("ageing:10", 60), ("round-robin:1", 60)])
    def test_nobody_starves_under_endless_arrivals(self, policy: str, bound: int) -> None:
        """One row; more urgent and shorter requests come at every step, one second apart, for ever."""
        loop = loop_of(policy, rows=1)
        old = loop.add(make_request(4, 5), SchedulingParams(priority=5))
        self.flood(loop)

        def arrives() -> bool:
            loop.now += 1
            if int(loop.now) % 2 == 0:
                loop.add(make_request(1, 2, arrival=loop.now), SchedulingParams(priority=0))
            return old.is_finished

        assert loop.run(bound, until=arrives) < bound
        assert old.is_finished

    def flood(self, loop: FakeLoop) -> None:
        for _ in range(3):
            loop.add(make_request(1, 2, arrival=loop.now), SchedulingParams(priority=0))

    def test_priority_does_starve(self) -> None:
        """As its docstring says; this is what ageing is for. With arrivals at an end it is served."""
        loop = loop_of("priority", rows=1)
        old = loop.add(make_request(4, 5), SchedulingParams(priority=5))
        for _ in range(100):
            loop.now += 1
            loop.add(make_request(1, 2, arrival=loop.now), SchedulingParams(priority=0))
            loop.step()
        assert not old.sequences[0].output_token_ids
        loop.run(300)
        assert old.is_finished

    def test_urgent_waits_fall_and_the_longest_wait_stays_bounded(self) -> None:
        """Simulated time, a second a step, four rows, more load than they bear; every second request is urgent."""
        urgent, longest = {}, {}
        for policy in ("fcfs", "priority", "ageing:20"):
            waits = self.waits(policy)
            urgent[policy] = max(w for p, w in waits if p == 0)
            longest[policy] = max(w for _, w in waits)
        assert urgent["priority"] < 4 < urgent["ageing:20"] < urgent["fcfs"] * 0.7
        assert longest["fcfs"] < longest["ageing:20"] < longest["priority"]
        assert longest["ageing:20"] < longest["fcfs"] + 40, "two steps of priority are worth 40 s of waiting, no more"

    @staticmethod
    def waits(policy: str) -> list[tuple[int, float]]:
        """(priority, seconds from arrival to the first token) of each request."""
        loop = loop_of(policy, rows=4)
        pending = deque((i / 0.8, i % 2 * 2) for i in range(200))
        requests: list[tuple[int, Request]] = []
        first: dict[str, float] = {}
        while pending or loop.scheduler.queues.has_unfinished_requests():
            while pending and pending[0][0] <= loop.now:
                arrival, priority = pending.popleft()
                requests.append((priority, loop.add(make_request(3, 4, arrival), SchedulingParams(priority=priority))))
            loop.step()
            loop.now += 1
            first |= {r: loop.now for r in loop.admitted if r not in first}
        return [(p, first[r.request_id] - r.metrics.arrival_time) for p, r in requests]
