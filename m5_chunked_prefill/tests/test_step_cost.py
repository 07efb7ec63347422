"""F5.3: what a step costs, and how much of a prompt fits beside the decodes."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0_basics.attention import ScheduledSequence
from m0_basics.request import Sequence, SequenceData
from m0_basics.sampling_params import SamplingParams
from m2_continuous_batching.plugins.base import StepStats
from m2_continuous_batching.scheduler import SchedulerOutput
from m5_chunked_prefill.step_cost import StepBudget, StepCost, StepShape, nonnegative_least_squares


def shape_of(*sequences: tuple[int, int, int]) -> StepShape:
    shape = StepShape()
    for start, num_tokens, num_rows in sequences:
        shape.add(start, num_tokens, num_rows)
    return shape


def machine(shape: StepShape) -> float:
    """Seconds on an imagined machine: fixed, per token (less for the first 16), per row of logits, read, attended."""
    x = shape.num_tokens
    return (8e-3 + 1e-5 * min(x, 16) + 2e-4 * max(x - 16, 0) + 3e-5 * shape.num_rows + 2e-7 * shape.context
            + 4e-9 * shape.pairs)


def steps(dice: np.random.Generator, count: int) -> list[StepShape]:
    shapes = []
    for _ in range(count):
        shape = shape_of(*((int(dice.integers(1, 500)), 1, 1) for _ in range(dice.integers(0, 60))))
        for _ in range(dice.integers(0, 3) if shape.num_tokens else 1):
            shape.add(int(dice.integers(0, 2000)), int(dice.integers(1, 400)), int(dice.integers(0, 2)))
        shapes.append(shape)
    return shapes


def fitted(noise: float = 0.0, count: int = 120) -> StepCost:
    dice, cost = np.random.default_rng(0), StepCost()
    for shape in steps(dice, count):
        cost.observe(shape, machine(shape) * float(np.exp(noise * dice.normal())))
    return cost


def test_a_step_is_counted_by_hand() -> None:
    """A decode behind 9 tokens, and a chunk [4, 7): 2 x 9 + 1 and 2 x 4 x 3 + 9 pairs."""
    shape = shape_of((9, 1, 1), (4, 3, 0))
    assert (shape.num_tokens, shape.num_rows, shape.context, shape.pairs) == (4, 1, 13, 52)
    more = shape.plus(0, 2, 1)
    assert (more.num_tokens, more.num_rows, more.context, more.pairs) == (6, 2, 13, 56)
    assert shape.num_tokens == 4
    assert shape_of((0, 70, 3)).features().tolist() == [1, 16, 48, 6, 3, 0, 4900]


def test_guesses_are_priced_as_the_step_will_be_counted() -> None:
    """Three for each of two decodes, against the shape of that very step."""
    decodes = shape_of((9, 1, 1), (30, 1, 1))
    drafted = shape_of((9, 4, 4), (30, 4, 4))
    planned = decodes.with_guesses(2, 6)
    assert (planned.num_tokens, planned.num_rows, planned.context) == (8, 8, 39)
    assert planned.pairs == drafted.pairs
    assert decodes.with_guesses(2, 0).features().tolist() == decodes.features().tolist()


def test_time_that_went_into_guessing_is_not_the_steps() -> None:
    """A step of 10 ms in which a draft model ran for 4."""
    cost = StepCost()
    scheduled = [ScheduledSequence(Sequence(0, SequenceData([1, 2], [3]), SamplingParams(), 0), 2, 1)]
    stats = StepStats(0, 0.0, 0.010, SchedulerOutput(scheduled), 0, 1, 1, 0, 0, 0.0, 8)
    for _ in range(6):
        cost.apart = 0.004
        cost.after_step(None, stats)        # type: ignore[arg-type]
    assert cost.predict(StepShape.of(scheduled)) == pytest.approx(0.006, rel=1e-3)
    assert cost.apart == 0


@pytest.mark.parametrize(("noise", "error"), [(0.0, 0.02), (0.1, 0.08)])
def test_predictions(noise: float, error: float) -> None:
    cost = fitted(noise)
    unseen = steps(np.random.default_rng(1), 60)
    errors = [abs((cost.predict(s) or 0) / machine(s) - 1) for s in unseen]
    assert np.median(errors) < error


def test_a_step_that_was_held_up_does_not_count() -> None:
    """One of ten took twenty times as long."""
    dice, cost = np.random.default_rng(0), StepCost()
    for i, shape in enumerate(steps(dice, 120)):
        cost.observe(shape, machine(shape) * (20 if i % 10 == 3 else 1))
    errors = [abs((cost.predict(s) or 0) / machine(s) - 1) for s in steps(np.random.default_rng(1), 60)]
    assert np.median(errors) < 0.1


def test_what_never_ran_is_not_free() -> None:
    """Decodes and prompts of 40 tokens, for a long time; then one of 6,000. A chunk grows as its cost becomes known."""
    dice, cost = np.random.default_rng(0), StepCost()
    for _ in range(400):
        shape = shape_of(*((int(dice.integers(1, 500)), 1, 1) for _ in range(8)))
        if dice.random() < 0.5:
            shape.add(0, int(dice.integers(20, 40)), 1)
        cost.observe(shape, machine(shape))
    decodes = shape_of(*((300, 1, 1) for _ in range(8)))
    budget, start, chunks = StepBudget(cost, 3.0, is_fixed=False), 0, list[int]()
    while start < 6000:
        chunk = budget.chunk(decodes, decodes, start, 6000 - start)
        step = decodes.plus(start, chunk, 0)
        assert machine(step) <= 4 * machine(decodes), (start, chunk)
        cost.observe(step, machine(step))
        chunks.append(chunk)
        start += chunk
    assert chunks[0] <= StepBudget.FIRST
    assert len(chunks) < 200


def test_large_steps_are_remembered() -> None:
    """A thousand small steps later, a large one is still priced right."""
    cost = fitted()
    for _ in range(1000):
        cost.observe(shape := shape_of((100, 1, 1), (0, 5, 0)), machine(shape))
    large = shape_of((0, 600, 1))
    assert cost.time(large) == pytest.approx(machine(large), rel=0.15)


def test_a_surprise_is_learnt_at_once() -> None:
    """A step may have been held up by something else, once; what lies beyond all that is likely does not count."""
    cost, shape = fitted(), shape_of((100, 1, 1), (50, 1, 1))
    before = cost.time(shape)
    for _ in range(2):
        cost.observe(shape, 2.5 * machine(shape))
    assert cost.time(shape) > before
    cost, before = fitted(), cost.time(shape)
    for _ in range(2):
        cost.observe(shape, 50 * machine(shape))
    assert cost.time(shape) < before


def test_nothing_is_known_at_first() -> None:
    cost = StepCost()
    shape = shape_of((3, 1, 1))
    for _ in range(5):
        assert cost.predict(shape) is None
        cost.observe(shape, 0.01)
    cost.observe(shape, 0.01)
    assert cost.predict(shape) == pytest.approx(0.01, rel=1e-3)


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    cost = fitted()
    shape = shape_of((100, 1, 1), (50, 1, 1))
    for _ in range(200):
        cost.observe(shape, 3 * machine(shape))
    assert cost.predict(shape) == pytest.approx(3 * machine(shape), rel=0.1)


@given(st.integers(0, 2**32 - 1))
def test_least_squares(seed: int) -> None:
    """No coordinate below zero, and the gradient is what the optimum of a bounded problem has."""
    dice = np.random.default_rng(seed)
    a, b = dice.normal(size=(12, 4)), dice.normal(size=12)
    x = nonnegative_least_squares(a, b, num_rounds=5000)
    assert (x >= 0).all()
    gradient = a.T @ (a @ x - b)
    scale = np.sqrt((a * a).sum(axis=0))
    assert (gradient / scale > -1e-3).all()
    assert abs(gradient[x > 1e-9] / scale[x > 1e-9]).max(initial=0) < 1e-3


class TestBudget:
    DECODES = ((100, 1, 1), (200, 1, 1), (50, 1, 1))

    def chunk(self, num_tokens: int, slowdown: float = 3.0, start: int = 0, is_fixed: bool = False,
              cost: StepCost | None = None) -> int:
        budget = StepBudget(cost or fitted(), slowdown, is_fixed)
        decodes = shape_of(*self.DECODES)
        return budget.chunk(decodes, shape_of(*self.DECODES), start, num_tokens)

    def test_the_step_takes_as_long_as_it_may(self) -> None:
        decodes = shape_of(*self.DECODES)
        for slowdown in (2.0, 4.0, 8.0):
            chunk = self.chunk(4000, slowdown)
            assert chunk % StepBudget.SMALLEST == 0
            assert machine(decodes.plus(0, chunk, 0)) <= 1.05 * slowdown * machine(decodes)
            assert machine(decodes.plus(0, chunk + 32, 0)) > 0.95 * slowdown * machine(decodes)

    def test_a_chunk_far_back_is_smaller(self) -> None:
        assert self.chunk(4000, 8.0, start=6000) < self.chunk(4000, 8.0)

    def test_progress_in_any_case(self) -> None:
        assert self.chunk(4000, slowdown=1.0) == StepBudget.SMALLEST
        assert self.chunk(3, slowdown=1.0) == 3

    def test_a_second_chunk_only_where_there_is_room(self) -> None:
        budget, decodes = StepBudget(fitted(), 1.0, is_fixed=False), shape_of(*self.DECODES)
        assert budget.chunk(decodes, decodes.plus(0, 16, 0), 0, 100) == 0

    def test_a_fixed_budget_asks_nobody(self) -> None:
        assert self.chunk(4000, is_fixed=True) == 4000

    def test_while_nothing_is_known(self) -> None:
        assert self.chunk(4000, cost=StepCost()) == StepBudget.FIRST
        assert StepBudget(StepCost(), 3.0, False).chunk(StepShape(), StepShape(), 0, 4000) == StepBudget.FIRST

    def test_where_nothing_decodes_the_fixed_cost_is_made_small(self) -> None:
        """The fixed cost is a tenth of the step's time."""
        cost = fitted()
        for start in (0, 2000):
            chunk = StepBudget(cost, 3.0, False).chunk(StepShape(), StepShape(), start, 4000)
            assert chunk % StepBudget.SMALLEST == 0
            assert cost.time(shape_of((start, chunk, 0))) == pytest.approx(10 * cost.fixed, rel=0.05)

    def test_where_nothing_decodes_no_crumbs(self) -> None:
        """A machine on which nothing is fixed: each token costs the same."""
        cost = StepCost()
        for num_tokens in range(1, 200, 7):
            cost.observe(shape_of((0, num_tokens, 0)), 1e-3 * num_tokens)
        assert StepBudget(cost, 3.0, False).chunk(StepShape(), StepShape(), 0, 4000) == StepBudget.EFFICIENT

    def test_a_prompt_that_ends_does_not_wait_for_a_piece_of_another(self) -> None:
        budget, ending = StepBudget(fitted(), 3.0, False), shape_of((0, 8, 1))
        assert budget.chunk(StepShape(), ending, 0, 4000) == 0
        assert budget.chunk(StepShape(), ending, 0, 8) == 8             # this one ends as well
