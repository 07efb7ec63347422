"""The scheduler step: decisions by hand, and rules that hold for any load."""
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from interview.coding.scheduler_step import Request, Step, schedule_step


def ids(requests: list[Request]) -> list[str]:
    return [r.id for r in requests]


def test_running_first_then_a_chunk_of_the_next() -> None:
    running = [Request("a", 10, 9, 1), Request("b", 17, 16, 1)]
    waiting = [Request("c", 100), Request("d", 5)]
    step, free = schedule_step(running, waiting, 10, token_budget=50, max_num_seqs=8, block_size=16)
    assert step == Step([("a", 1), ("b", 1), ("c", 48)], [])
    assert (ids(running), ids(waiting)) == (["a", "b", "c"], ["d"])
    assert [r.num_blocks for r in running] == [1, 2, 3]
    assert free == 10 - 1 - 3


def test_places_are_limited() -> None:
    running, waiting = [Request("a", 2, 1, 1)], [Request("b", 3), Request("c", 3)]
    step, _ = schedule_step(running, waiting, 10, token_budget=50, max_num_seqs=2, block_size=16)
    assert step.scheduled == [("a", 1), ("b", 3)]
    assert ids(waiting) == ["c"]


def test_the_first_that_does_not_fit_blocks_those_behind() -> None:
    running: list[Request] = []
    waiting = [Request("big", 64), Request("small", 4)]
    step, free = schedule_step(running, waiting, 3, token_budget=100, max_num_seqs=8, block_size=16)
    assert (step.scheduled, ids(waiting), free) == ([], ["big", "small"], 3)


def test_a_victim_comes_from_the_tail_and_nobody_is_admitted() -> None:
    running = [Request("a", 17, 16, 1), Request("b", 20, 19, 2), Request("c", 5, 4, 1)]
    waiting = [Request("d", 1)]
    step, free = schedule_step(running, waiting, 0, token_budget=50, max_num_seqs=8, block_size=16)
    assert step == Step([("a", 1), ("b", 1)], ["c"])
    assert (ids(running), ids(waiting), free) == (["a", "b"], ["c", "d"], 0)
    assert (waiting[0].num_computed, waiting[0].num_blocks) == (0, 0)


def test_a_request_may_preempt_itself() -> None:
    running, waiting = [Request("a", 10, 9, 1), Request("b", 33, 32, 2)], []
    step, free = schedule_step(running, waiting, 0, token_budget=50, max_num_seqs=8, block_size=16)
    assert step == Step([("a", 1)], ["b"])
    assert (ids(running), ids(waiting), free) == (["a"], ["b"], 2)


def test_several_victims_for_one() -> None:
    running = [Request("a", 80, 16, 1), Request("b", 9, 8, 1), Request("c", 9, 8, 1), Request("d", 9, 8, 2)]
    waiting: list[Request] = []
    step, free = schedule_step(running, waiting, 0, token_budget=64, max_num_seqs=8, block_size=16)
    assert step == Step([("a", 64)], ["d", "c", "b"])
    assert (ids(waiting), free) == (["b", "c", "d"], 0)


def test_without_budget_a_running_request_waits_its_turn() -> None:
    running, waiting = [Request("a", 40, 0, 0), Request("b", 5, 4, 1)], [Request("c", 1)]
    step, _ = schedule_step(running, waiting, 10, token_budget=16, max_num_seqs=8, block_size=16)
    assert step == Step([("a", 16)], [])
    assert (ids(running), ids(waiting)) == (["a", "b"], ["c"])


@st.composite
def loads(draw: st.DrawFn) -> tuple[list[Request], list[Request], int, int, int, int]:
    block = draw(st.sampled_from([1, 4, 16]))

    def request(name: str, started: bool) -> Request:
        tokens = draw(st.integers(1, 60))
        computed = draw(st.integers(0, tokens - 1)) if started else 0
        return Request(name, tokens, computed, -(-computed // block))
    running = [request(f"r{i}", True) for i in range(draw(st.integers(0, 5)))]
    waiting = [request(f"w{i}", False) for i in range(draw(st.integers(0, 5)))]
    return (running, waiting, draw(st.integers(0, 12)), draw(st.integers(1, 80)),
            draw(st.integers(max(1, len(running)), 8)), block)


@given(loads())
def test_rules_that_always_hold(load: tuple[list[Request], list[Request], int, int, int, int]) -> None:
    running, waiting, free, budget, places, block = load
    everyone = sorted(ids(running) + ids(waiting))
    total = free + sum(r.num_blocks for r in running)
    order = ids(running) + ids(waiting)
    step, left = schedule_step(running, waiting, free, budget, places, block)
    assert sorted(ids(running) + ids(waiting)) == everyone
    assert left >= 0 and left + sum(r.num_blocks for r in running) == total
    assert sum(n for _, n in step.scheduled) <= budget
    assert len(running) <= places
    by_id = {r.id: r for r in running}
    for name, tokens in step.scheduled:
        request = by_id[name]                                   # never a victim
        assert 0 < tokens <= request.num_tokens - request.num_computed
        assert request.num_blocks * block >= request.num_computed + tokens
    assert ids(running) + ids(waiting) == order                 # who came first stays first
