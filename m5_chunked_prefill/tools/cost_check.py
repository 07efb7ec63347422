"""How far the cost model is off: each step's time predicted before it runs, from the steps before it."""
from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np

from m2_continuous_batching.plugins.base import SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Scheduler

from ..step_cost import StepCost, StepShape

_LEARNT_AFTER = 32              # steps, before the predictions count


class CostCheck(SchedulerPlugin):
    """A plugin that notes what steps had to do and how long it took; afterwards each is predicted from those before."""

    def __init__(self) -> None:
        self.steps: list[tuple[StepShape, float]] = []

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self.steps.append((StepShape.of(stats.output.scheduled), stats.duration_s))

    def predictions(self) -> tuple[StepCost, list[tuple[StepShape, float, float]]]:
        """Each step with its predicted and its true seconds, and the model as it is behind the last one."""
        cost, found = StepCost(), list[tuple[StepShape, float, float]]()
        for number, (shape, seconds) in enumerate(self.steps):
            if number >= _LEARNT_AFTER:
                found.append((shape, cost.time(shape), seconds))
            cost.observe(shape, seconds)
        return cost, found

    def summary(self) -> dict[str, Any]:
        """Relative errors, of steps that only decode and of mixed ones, and what the coefficients have come to."""
        found: dict[str, Any] = {}
        cost, predictions = self.predictions()
        for kind, is_mixed in (("decode", False), ("mixed", True)):
            errors = [abs(predicted / seconds - 1) for shape, predicted, seconds in predictions
                      if (shape.num_tokens > shape.num_rows) == is_mixed]
            if errors:
                found[kind] = {"num_steps": len(errors), "error_median": median(errors),
                               "error_p90": float(np.percentile(errors, 90)),
                               "within_15_percent": sum(e <= 0.15 for e in errors) / len(errors)}
        if cost.coefficients is not None:
            found["coefficients"] = [float(c) for c in cost.coefficients]
        return found
