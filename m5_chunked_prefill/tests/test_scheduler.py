"""F5.1, F5.3, F5.4: mixed steps by hand, and every order of events by machine."""
from __future__ import annotations

from itertools import pairwise

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from m0_basics.request import Request
from m2_continuous_batching.policies import SchedulingParams
from m2_continuous_batching.tests.fake_loop import MAX_MODEL_LEN, make_request, who
from m5_chunked_prefill.tests.chunk_loop import ChunkLoop

LONG = 2000                 # max_model_len where prompts are long


def test_a_thousand_tokens_in_chunks_of_256() -> None:
    """F5.1: 256, 256, 256, 232, and the first token comes with the last of them; then it decodes."""
    loop = ChunkLoop(budget=256, slots=4000, max_model_len=LONG)
    a = loop.add(make_request(1000, 3))
    steps = []
    while not a.is_finished:
        steps.append((who(loop.step(), a)["a"], len(a.sequences[0].output_token_ids)))
    assert steps == [(256, 0), (256, 0), (256, 0), (232, 1), (1, 2), (1, 3)]


def test_decodes_never_wait_for_a_prompt() -> None:
    """The picture of the module's docstring: A gets a token in every step, B's chunks are what is left of it."""
    loop = ChunkLoop(budget=8, max_model_len=LONG)
    a = loop.add(make_request(3, 9))
    loop.step()
    b, c = loop.add(make_request(20, 4)), loop.add(make_request(2, 4))
    steps = [who(loop.step(), a, b, c) for _ in range(4)]
    assert steps == [{"a": 1, "b": 7}, {"a": 1, "b": 7}, {"a": 1, "b": 6, "c": 1}, {"a": 1, "b": 1, "c": 1}]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    """By arrival it waits for all of the long one; shortest first it overtakes, once, and a third one as well."""
    for policy, first in (("fcfs", {"a": 8}), ("shortest-first:8", {"b": 3, "a": 5})):
        loop = ChunkLoop(policy, budget=8, max_model_len=LONG, slots=4000)
        a = loop.add(make_request(100, 2))
        loop.step()
        b = loop.add(make_request(3, 2))
        assert who(loop.step(), a, b) == first, policy


def test_nobody_starves_behind_short_ones() -> None:
    """A short prompt arrives in every step and could take it whole; the long one still gets on."""
    loop = ChunkLoop("shortest-first:8", rows=8, budget=8, max_model_len=LONG, slots=4000)
    long = loop.add(make_request(64, 1))
    while not long.is_finished and loop.num_steps < 200:
        loop.add(make_request(8, 1))
        loop.step()
    assert 8 < loop.num_steps < 100, "later than alone, and not never"


def test_a_half_read_prompt_gives_way_to_a_decode() -> None:
    """F5.4: 22 slots. a takes one in each step, b holds nine and lacks three: in the end b leaves, and a goes on."""
    loop = ChunkLoop(budget=10, slots=22)
    a = loop.add(make_request(9, 7))
    loop.step()                                     # a holds 9, its first token is there
    b = loop.add(make_request(12, 2))
    assert who(loop.step(), a, b) == {"a": 1, "b": 9}
    for _ in range(3):                              # up to 13 + 9 slots; b waits, and keeps what it has
        output = loop.step()
        assert who(output, a, b) == {"a": 1}
        assert not output.preempted
    output = loop.step()
    assert output.preempted == [b.sequences[0]]
    assert who(output, a, b) == {"a": 1}
    loop.run(40)
    assert a.is_finished
    assert b.is_finished


def test_who_is_amid_its_prompt_waits_and_keeps_what_it_has() -> None:
    """The first of two prompts takes the last free slots; the second stays, and goes on where it stopped."""
    loop = ChunkLoop(budget=6, slots=16)
    a, b = loop.add(make_request(9, 2)), loop.add(make_request(6, 2))
    assert who(loop.step(), a, b) == {"a": 6}
    assert who(loop.step(), a, b) == {"a": 3, "b": 3}
    output = loop.step()
    assert who(output, a, b) == {"a": 1, "b": 3}
    assert not output.preempted


def test_a_budget_smaller_than_the_decodes_takes_turns() -> None:
    loop = ChunkLoop(rows=3, budget=3)
    requests = [loop.add(make_request(1, 8)) for _ in range(3)]
    loop.step()
    loop.scheduler.token_budget = 2
    ran = [set(who(loop.step(), *requests)) for _ in range(6)]
    assert all(len(step) == 2 for step in ran)
    assert all(one | other == {"a", "b", "c"} for one, other in pairwise(ran))


class MixedMachine(RuleBasedStateMachine):
    """Any order of arrivals, aborts, steps, time passing and changes of the budget. `ChunkLoop` checks each step."""

    @initialize(policy=st.sampled_from(["fcfs", "priority", "ageing:3", "sjf", "shortest-first:2", "round-robin:2",
                                        "sla:a=0.5,b=0.25,c=0"]),
                rows=st.integers(1, 4), budget=st.none() | st.integers(1, 30), extra=st.integers(0, 20))
    def begin(self, policy: str, rows: int, budget: int | None, extra: int) -> None:
        self.loop = ChunkLoop(policy, rows, budget, MAX_MODEL_LEN + extra)
        self.names = ["a", "b", "c"] if policy.startswith("sla") else [None]
        self.requests: list[Request] = []

    @rule(num_prompt=st.integers(1, 18), max_tokens=st.integers(1, 8), n=st.integers(1, 3),
          priority=st.integers(-2, 2), rank=st.integers(0, 2), timeout=st.none() | st.floats(0.5, 20))
    def add(self, num_prompt: int, max_tokens: int, n: int, priority: int, rank: int, timeout: float | None) -> None:
        request = make_request(num_prompt, max_tokens, self.loop.now, n)
        if self.loop.scheduler.queues.max_num_seqs >= n:
            self.loop.add(request, SchedulingParams(priority, self.names[rank % len(self.names)], timeout))
            self.requests.append(request)

    @precondition(lambda self: self.loop.scheduler.queues.has_unfinished_requests())
    @rule(seconds=st.floats(0, 2), times=st.integers(1, 4))
    def step(self, seconds: float, times: int) -> None:
        for _ in range(times):
            self.loop.step()
            self.loop.now += seconds

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        self.loop.scheduler.queues.abort(request.request_id)
        assert request.is_finished

    @rule(budget=st.integers(1, 40))
    def set_budget(self, budget: int) -> None:
        self.loop.scheduler.token_budget = budget

    def teardown(self) -> None:
        """With no more arrivals everything ends, and all slots are free."""
        if not hasattr(self, "loop"):
            return
        self.loop.run(40 * MAX_MODEL_LEN * (1 + sum(r.sampling_params.n for r in self.requests)))
        assert all(r.is_finished for r in self.requests)
        assert self.loop.manager.usage == 0


TestMixed = MixedMachine.TestCase
TestMixed.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
