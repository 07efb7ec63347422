"""What the engine did: totals of the run, the latest steps one by one, and the latency of finished requests.

Totals are exact however long the engine runs; of steps and requests only the latest are kept, so memory is bounded.
"""
from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from m0_basics.config import check_int
from m0_basics.request import Request, SequenceStatus
from m0_basics.tools.bench.metrics import RequestRecord, RunMetrics, Stats, compute_metrics

from .base import SchedulerPlugin, StepStats

if TYPE_CHECKING:
    from ..scheduler import Scheduler


@dataclass(frozen=True)
class StepRow:
    """One step. Times are `time.perf_counter()` seconds; `tokens` says how many tokens each sequence ran, by seq_id."""

    index: int
    start_time: float
    end_time: float
    tokens: dict[int, int]
    num_prompt_tokens: int
    num_generation_tokens: int
    num_waiting: int
    num_preempted: int
    kv_cache_usage: float           # 0 to 1
    token_budget: int

    @classmethod
    def of(cls, stats: StepStats) -> StepRow:
        """Plain numbers: a row keeps no sequence alive."""
        return cls(stats.index, stats.start_time, stats.end_time,
                   {s.sequence.seq_id: s.num_tokens for s in stats.output.scheduled}, stats.num_prompt_tokens,
                   stats.num_generation_tokens, stats.num_waiting, stats.num_preempted, stats.kv_cache_usage,
                   stats.token_budget)

    @property
    def duration_s(self) -> float:
        return self.end_time - self.start_time

    @property
    def budget_utilisation(self) -> float:
        """Tokens run over the budget; a single long prompt may exceed it."""
        return sum(self.tokens.values()) / self.token_budget


@dataclass
class Totals:
    """Since the collector was made, or reset."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    step_time_s: float = 0.0
    num_finished: int = 0
    num_aborted: int = 0


class MetricsCollector(SchedulerPlugin):
    """Give it to an engine: `LLM(..., plugins=[MetricsCollector()])`."""

    def __init__(self, max_steps: int = 10_000, max_requests: int = 10_000) -> None:
        """Keep the latest `max_steps` steps and `max_requests` finished requests."""
        check_int("max_steps", max_steps, 1)
        check_int("max_requests", max_requests, 1)
        self.totals = Totals()
        self.steps: deque[StepRow] = deque(maxlen=max_steps)
        self.records: deque[RequestRecord] = deque(maxlen=max_requests)

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self.steps.append(StepRow.of(stats))
        totals = self.totals
        totals.num_steps += 1
        totals.num_prompt_tokens += stats.num_prompt_tokens
        totals.num_generation_tokens += stats.num_generation_tokens
        totals.num_preemptions += stats.num_preempted
        totals.step_time_s += stats.duration_s

    def on_request_completion(self, request: Request) -> None:
        """Requests that were aborted, or failed, are counted and have no latency."""
        if any(s.status is SequenceStatus.FINISHED_ABORTED for s in request.sequences):
            self.totals.num_aborted += 1
        else:
            self.totals.num_finished += 1
            self.records.append(RequestRecord.from_request(request))

    def request_metrics(self) -> RunMetrics | None:
        """TTFT, TPOT, ITL and latency of the requests that are kept; None while there are none."""
        if not self.records:
            return None
        start = min(r.arrival_time for r in self.records)
        return compute_metrics(self.records, max(r.finish_time for r in self.records) - start)

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON: the totals; `steps` and `requests` hold statistics of those that are kept."""
        rows = self.steps
        requests = self.request_metrics()
        statistics = {
            "duration_ms": Stats.of((r.duration_s for r in rows), 1e3),
            "batch_size": Stats.of(float(len(r.tokens)) for r in rows),
            "num_waiting": Stats.of(float(r.num_waiting) for r in rows),
            "budget_utilisation": Stats.of(r.budget_utilisation for r in rows),
            "kv_cache_usage": Stats.of(r.kv_cache_usage for r in rows),
        }
        return {**dataclasses.asdict(self.totals),
                "steps": {name: stats and dataclasses.asdict(stats) for name, stats in statistics.items()},
                "requests": requests and requests.to_dict()}

    def timeline(self) -> list[dict[str, Any]]:
        """One row per step that is kept, seconds from the first of them: what a picture of the run needs."""
        if not self.steps:
            return []
        origin = self.steps[0].start_time
        return [{"step": row.index, "start_s": row.start_time - origin, "end_s": row.end_time - origin,
                 "tokens": dict(row.tokens)} for row in self.steps]

    def reset(self) -> None:
        """Forget everything."""
        self.totals = Totals()
        self.steps.clear()
        self.records.clear()
