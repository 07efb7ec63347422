"""One line in the log for every n steps, or every few seconds: what the engine is doing."""
from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from m0_basics.config import check_int, reject

from .base import SchedulerPlugin, StepStats

if TYPE_CHECKING:
    from ..scheduler import Scheduler


class LoggingPlugin(SchedulerPlugin):
    """Throughput since the last line, and how full queues and cache are now. Level INFO."""

    def __init__(self, every_steps: int = 1, every_s: float = 0.0, logger: logging.Logger | None = None) -> None:
        """A line is due when `every_steps` steps and `every_s` seconds have passed since the last one."""
        check_int("every_steps", every_steps, 1)
        if not every_s >= 0:
            raise reject("every_s", every_s, "seconds, 0 or more")
        self.every_steps = every_steps
        self.every_s = every_s
        self.logger = logger or logging.getLogger(__name__)
        self._steps = self._prompt_tokens = self._generation_tokens = self._preempted = 0
        self._since: float | None = None

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self._since = stats.start_time if self._since is None else self._since
        self._steps += 1
        self._prompt_tokens += stats.num_prompt_tokens
        self._generation_tokens += stats.num_generation_tokens
        self._preempted += stats.num_preempted
        elapsed = stats.end_time - self._since
        if self._steps >= self.every_steps and elapsed >= self.every_s:
            self._log(stats, max(elapsed, 1e-9))
            self._steps = self._prompt_tokens = self._generation_tokens = self._preempted = 0
            self._since = stats.end_time

    def _log(self, stats: StepStats, elapsed: float) -> None:
        self.logger.info(
            "step %d: prompt %.1f tokens/s, generation %.1f tokens/s, running %d, waiting %d, preempted %d, "
            "cache %.1f%%, budget %d", stats.index, self._prompt_tokens / elapsed, self._generation_tokens / elapsed,
            stats.num_running, stats.num_waiting, self._preempted, 100 * stats.kv_cache_usage, stats.token_budget)
