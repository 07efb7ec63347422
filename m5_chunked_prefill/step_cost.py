"""What a step costs: a model of its time, fitted to the steps that ran.

    t = c + b(x) + r R + g L + a (2 L x + x^2)        summed over the step's sequences

    x    tokens that a sequence runs            b is bent: the first rows are nearly free while weights come from memory
    L    tokens before them, in the cache       g: they are read; a: each new token meets them, and those before it
    R    rows that need logits

The shape is known, the numbers are the machine's. No coefficient is below zero: more work is never less time.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from m0_basics.attention import ScheduledSequence
from m2_continuous_batching.plugins.base import SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Scheduler

Vector = NDArray[np.float64]
KNEES = (16, 64)                # rows at which a product's time bends
_NUM_KEPT = 96                  # steps of each kind that the fit sees
_NUM_LARGEST = 12               # and the largest ones, however long ago: small steps say nothing of a large one
_REFIT_EVERY = (8, 32)          # steps; the second once the windows are full
_SURPRISE = 2.0                 # a step this many times longer or shorter than predicted: the fit is renewed at once
_MIN_STEPS = 6                  # before the first fit
_OUTLIER = 3.0                  # a step this many times longer than predicted was held up by something else


class StepShape:
    """How much a step has to do: what its time depends on. Grows as sequences are added."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_rows = 0           # that need logits
        self.context = 0            # tokens before the new ones, of all sequences
        self.pairs = 0              # 2 L x + x^2: twice the pairs of a query and a key

    def add(self, start: int, num_tokens: int, num_rows: int) -> None:
        """Tokens [start, start + num_tokens) of one sequence."""
        self.num_tokens += num_tokens
        self.num_rows += num_rows
        self.context += start
        self.pairs += 2 * start * num_tokens + num_tokens * num_tokens

    def plus(self, start: int, num_tokens: int, num_rows: int) -> StepShape:
        """A copy with more to do."""
        more = StepShape()
        more.num_tokens, more.num_rows = self.num_tokens, self.num_rows
        more.context, more.pairs = self.context, self.pairs
        more.add(start, num_tokens, num_rows)
        return more

    def with_guesses(self, num_sequences: int, num_guesses: int) -> StepShape:
        """A copy for a step of decodes, `num_sequences` of them, with so many guesses spread over them."""
        more = self.plus(0, 0, num_guesses)
        more.num_tokens += num_guesses
        more.pairs += (2 * self.context + num_guesses) * num_guesses // num_sequences + 2 * num_guesses
        return more

    @classmethod
    def of(cls, scheduled: Iterable[ScheduledSequence]) -> StepShape:
        """The shape of a step, asked before or after it ran."""
        shape = cls()
        for s in scheduled:
            drafts = len(s.draft_token_ids)
            samples = s.end - drafts >= s.sequence.num_prompt_tokens      # at least: a chunk of a recomputation may not
            shape.add(s.start, s.num_tokens, (1 + drafts) if samples else 0)
        return shape

    def features(self) -> Vector:
        """The numbers that the coefficients multiply."""
        x, (first, second) = self.num_tokens, KNEES
        return np.array([1.0, min(x, first), min(max(x - first, 0), second - first), max(x - second, 0), self.num_rows,
                         self.context, self.pairs])


class StepCost(SchedulerPlugin):
    """Watches the steps of an engine and predicts the time of the next one."""

    def __init__(self) -> None:
        self._terms: tuple[float, ...] | None = None
        self._apart = 0.0           # seconds of the step under way that went into something else
        self._decodes = deque[tuple[Vector, float]](maxlen=_NUM_KEPT)       # kept apart: decodes are many
        self._mixed = deque[tuple[Vector, float]](maxlen=_NUM_KEPT)
        self._largest: list[tuple[int, int, Vector, float]] = []            # tokens, the step's number, as above
        self._num_steps = self._num_new = 0

    @property
    def coefficients(self) -> Vector | None:
        """Seconds of each feature; None until enough steps ran."""
        return None if self._terms is None else np.array(self._terms)

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self.observe(StepShape.of(stats.output.scheduled), stats.duration_s - self._apart)
        self._apart = 0.0

    def leave_out(self, seconds: float) -> None:
        """So many seconds of the step under way are not the model's: of guessing, say, which is counted elsewhere."""
        self._apart += seconds

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step of that shape took so long."""
        kept, features = self._decodes if shape.num_tokens == shape.num_rows else self._mixed, shape.features()
        kept.append((features, seconds))
        self._num_steps += 1
        self._num_new += 1
        self._largest.append((shape.num_tokens, self._num_steps, features, seconds))
        self._largest = sorted(self._largest, key=lambda step: step[:2])[-_NUM_LARGEST:]
        if self._terms is None:
            is_due = self._num_steps >= _MIN_STEPS
        else:
            ratio = seconds / max(self.time(shape), 1e-9)
            is_due = (self._num_new >= _REFIT_EVERY[len(kept) == _NUM_KEPT]
                      or (self._num_new > 1 and not 1 / _SURPRISE < ratio < _SURPRISE))
        if is_due:
            self._num_new = 0
            self._terms = tuple(self._fit().tolist())

    def predict(self, shape: StepShape) -> float | None:
        """Seconds that a step will take; None while too little is known."""
        return None if self._terms is None else self.time(shape)

    def time(self, shape: StepShape) -> float:
        """Seconds that a step will take. Asked only once something is known: `features` times the coefficients."""
        assert self._terms is not None
        constant, first, second, slope, row, read, pair = self._terms
        x = shape.num_tokens
        return (constant + first * min(x, KNEES[0]) + second * min(max(x - KNEES[0], 0), KNEES[1] - KNEES[0])
                + slope * max(x - KNEES[1], 0) + row * shape.num_rows + read * shape.context + pair * shape.pairs)

    @property
    def fixed(self) -> float | None:
        """Seconds that a large step takes beyond what its tokens cost; None while too little is known."""
        if self._terms is None:
            return None
        constant, first, second, slope = self._terms[:4]
        return constant + KNEES[0] * max(0.0, first - slope) + (KNEES[1] - KNEES[0]) * max(0.0, second - slope)

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest step so far: far beyond it, nothing is known."""
        return self._largest[-1][0] if self._largest else 0

    def _fit(self) -> Vector:
        """Least squares of the relative errors. Steps that were held up do not count in a second pass.

        Rows beyond a knee that no step has reached cost what those before it do.
        """
        steps = [*self._decodes, *self._mixed, *((f, s) for _, _, f, s in self._largest)]
        features, seconds = np.array([f for f, _ in steps]), np.array([s for _, s in steps])
        known = self.coefficients               # little has changed since
        fitted = nonnegative_least_squares(features / seconds[:, None], np.ones(len(steps)), known)
        usual = seconds < _OUTLIER * np.maximum(features @ fitted, 1e-9)
        if not usual.all() and usual.sum() >= _MIN_STEPS:
            of_usual = features[usual] / seconds[usual, None]
            fitted = nonnegative_least_squares(of_usual, np.ones(len(of_usual)), fitted)
        for i in (2, 3):
            if not features[:, i].any():
                fitted[i] = fitted[i - 1]
        return fitted


def nonnegative_least_squares(a: Vector, b: Vector, start: Vector | None = None, num_rounds: int = 200) -> Vector:
    """x >= 0 that makes |a x - b| small: a [n, k], b [n] -> x [k], by descent along one coordinate after the other.

    Columns are scaled to length 1. A column that says nothing is left at 0. From `start` on, a good guess takes few of
    the rounds.
    """
    scale = np.sqrt((a * a).sum(axis=0))
    scale[scale == 0] = 1
    a = a / scale
    gram, target = a.T @ a, a.T @ b
    # A little towards zero: features that move together share the time instead of one taking all.
    gram[np.diag_indices_from(gram)] += 1e-6
    first = np.zeros(len(target)) if start is None else start * scale * (a != 0).any(axis=0)
    rest, x = (target - gram @ first).tolist(), first.tolist()              # plain floats: faster where there are few
    rows = gram.tolist()
    for _ in range(num_rounds):
        largest = 0.0
        for i, row in enumerate(rows):
            new = max(0.0, x[i] + rest[i] / row[i])
            change, x[i] = new - x[i], new
            if change:
                rest = [r - g * change for r, g in zip(rest, row, strict=True)]
                largest = max(largest, abs(change))
        if largest < 1e-7:
            break
    return np.array(x) / scale


class StepBudget:
    """How many tokens of a prompt a step may still take."""

    SMALLEST = 4                # tokens of a chunk: products take their rows in tiles of about so many
    EFFICIENT = 32              # where nothing decodes, no fewer
    FIRST = 128                 # while nothing is known
    FIXED_SHARE = 0.1           # of a step's time, where nothing decodes: larger chunks would gain no more than that

    def __init__(self, cost: StepCost, max_step_slowdown: float, is_fixed: bool) -> None:
        """`is_fixed`: the number of tokens is the limit, whatever they cost."""
        self.cost, self.max_step_slowdown, self.is_fixed = cost, max_step_slowdown, is_fixed

    def chunk(self, decodes: StepShape, step: StepShape, start: int, num_tokens: int) -> int:
        """Of a sequence's `num_tokens` tokens from `start` on, how many fit into the step beside what is in it.

        `decodes`: the step without chunks. The first chunk has at least `SMALLEST` tokens. A prompt that ends in this
        step does not wait for a piece of another.
        """
        if self.is_fixed:
            return num_tokens
        most = self._most(decodes, step, start, num_tokens)
        if most >= num_tokens:
            return num_tokens
        if not decodes.num_tokens and step.num_rows:
            return 0
        if step.num_tokens == decodes.num_tokens:               # the first one
            most = max(most, self.SMALLEST if decodes.num_tokens else self.EFFICIENT)
        return min(num_tokens, most - most % self.SMALLEST)

    def _most(self, decodes: StepShape, step: StepShape, start: int, num_tokens: int) -> int:
        """The most tokens with which the step is within its limit."""
        fixed = self.cost.fixed
        if fixed is None:
            return self.FIRST - (step.num_tokens - decodes.num_tokens)
        limit = self.cost.time(decodes) * self.max_step_slowdown if decodes.num_tokens else fixed / self.FIXED_SHARE
        low, high = 0, min(num_tokens, max(self.FIRST, 2 * self.cost.most_tokens))
        while low < high:
            middle = (low + high + 1) // 2
            seconds = self.cost.time(step.plus(start, middle, 0))
            low, high = (middle, high) if seconds <= limit else (low, middle - 1)
        return low
