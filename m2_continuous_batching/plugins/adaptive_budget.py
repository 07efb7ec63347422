"""A token budget that follows the load, so that running requests are not held up by too much prefill.

    running   token |--- prompts of others, up to the budget ---|-- decode --| token       the gap that a reader sees

A gap costs about  fixed + per_token * tokens.  If one of n tokens took t seconds, then n * target / t tokens would
have come closer to the target. Repeated, this settles where the gap *is* the target, and from below it never
overshoots: n -> n * target / (fixed + per_token * n) rises, is concave, and has its fixed point there.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from m0_basics.config import check_int, reject

from .base import SchedulerPlugin, StepStats

if TYPE_CHECKING:
    from ..scheduler import Scheduler

_GROWTH = 2.0               # most by which the budget grows at once: a long gap is worse than a slow start


class AdaptiveBudgetPlugin(SchedulerPlugin):
    """Keeps the time between two tokens of a running request (TPOT) under `target_tpot_s` seconds.

    It cannot do the impossible: one prompt runs whole, however long it is, and every running request gets its token.
    """

    def __init__(self, target_tpot_s: float, min_budget: int = 64, headroom: float = 0.9) -> None:
        """It starts at `min_budget`, never goes below it, and aims at `headroom` (0 to 1) of the target."""
        if isinstance(target_tpot_s, bool) or not target_tpot_s > 0:
            raise reject("target_tpot_s", target_tpot_s, "seconds above 0")
        check_int("min_budget", min_budget, 1)
        if not 0 < headroom <= 1:
            raise reject("headroom", headroom, "a number above 0, up to 1")
        self.limit_s = headroom * target_tpot_s
        self.min_budget = min_budget
        self.budget = float(min_budget)             # what the load asks for; the scheduler's is at least as much
        self._gap_s = 0.0                           # the gap that is under way: seconds and prompt tokens so far
        self._prompt_tokens = 0

    def before_step(self, scheduler: Scheduler) -> None:
        # With fewer tokens than requests they would take turns, and each would wait longer, not shorter.
        scheduler.token_budget = max(int(self.budget), self.min_budget, len(scheduler.running))

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self._gap_s += stats.duration_s
        self._prompt_tokens += stats.num_prompt_tokens
        decoded = stats.output.total_num_scheduled_tokens - stats.num_prompt_tokens
        if decoded:                                 # running requests got their token: the gap is over
            if self._prompt_tokens:
                self._follow(self._prompt_tokens, decoded, scheduler.max_num_batched_tokens)
            self._gap_s, self._prompt_tokens = 0.0, 0

    def _follow(self, prompt_tokens: int, decoded: int, most: int) -> None:
        """Learn from a gap in which prompts were run."""
        if self._gap_s <= self.limit_s and prompt_tokens < self.budget / 2:
            return                                  # a short gap with little in it says nothing about more
        wanted = (prompt_tokens + decoded) * self.limit_s / self._gap_s - decoded
        self.budget = min(max(wanted, self.min_budget), _GROWTH * self.budget, most)
