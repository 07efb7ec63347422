"""A contender: anything that can run a workload. Here the lab's own engines; peers are in `peers.py`.

A contender only serves requests and says when each token came. What is derived from that (metrics, memory, the
check that it did all of the work) is the same for all of them and stands here once.
"""
from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from m0_basics.base_llm import BaseLLM
from m0_basics.request import Request
from m0_basics.sampling_params import SamplingParams

from .memory import MemoryMeter
from .metrics import SLO, RequestRecord, RunMetrics, compute_metrics
from .workloads import BenchRequest, Workload


class BenchError(RuntimeError):
    """A contender failed, or did not do the work it was given."""


@dataclass(frozen=True)
class Served:
    """What a contender reports, in the order of the workload's requests. Times are seconds since its start."""

    duration_s: float
    records: tuple[RequestRecord, ...]
    token_ids: tuple[tuple[int, ...], ...]      # the output of each request


@dataclass(frozen=True)
class RunResult:
    """One run: its metrics, and what they were computed from."""

    metrics: RunMetrics
    records: tuple[RequestRecord, ...]
    token_ids: tuple[tuple[int, ...], ...]


class Contender(ABC):
    """Runs workloads, greedy and with the end-of-sequence token ignored."""

    pid: int | None = None          # the process to measure the memory of; None is this one

    def __init__(self, name: str, note: str = "") -> None:
        """`note` is what a reader of the results must know about it, such as another precision."""
        self.name = name
        self.note = note

    @abstractmethod
    def serve(self, workload: Workload) -> Served:
        """Run every request to its full length, none before its arrival time."""

    def warm_up(self, workload: Workload) -> None:
        """Get first-call costs (allocation, compilation, page faults) out of the way."""
        self.serve(workload.warm_up())

    def run(self, workload: Workload, slo: SLO | None = None) -> RunResult:
        """Serve the workload and measure. Raises BenchError where the outputs do not have the lengths asked for."""
        with MemoryMeter(self.pid) as meter:
            served = self.serve(workload)
        lengths = [len(ids) for ids in served.token_ids]
        wanted = [r.output_len for r in workload.requests]
        if lengths != wanted:
            i = next((i for i, (a, b) in enumerate(zip(lengths, wanted, strict=False)) if a != b), len(lengths))
            got = f"{lengths[i]} output tokens, not {wanted[i]}" if i < len(lengths) else "no answer"
            raise BenchError(f"{self.name}: request {i} of {workload.name} got {got}")
        metrics = compute_metrics(served.records, served.duration_s, slo, meter.peak)
        return RunResult(metrics, served.records, served.token_ids)

    def close(self) -> None:  # noqa: B027 - most contenders hold nothing to give back
        """Free what it holds. It cannot run afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


class Arrivals:
    """Hands out a workload's requests when their time has come. The clock starts when this is made."""

    def __init__(self, workload: Workload) -> None:
        self._pending = deque(enumerate(workload.requests))
        self.start = time.perf_counter()

    def __bool__(self) -> bool:
        """Whether requests are still to come."""
        return bool(self._pending)

    def due(self, limit: int | None = None) -> list[tuple[int, BenchRequest]]:
        """(index, request) of each that has arrived and was not handed out yet, at most `limit` of them."""
        arrived: list[tuple[int, BenchRequest]] = []
        while self._pending and len(arrived) != limit and self._pending[0][1].arrival_time <= self.elapsed():
            arrived.append(self._pending.popleft())
        return arrived

    def wait(self) -> None:
        """Sleep until the next request arrives."""
        if self._pending:
            time.sleep(max(0.0, self._pending[0][1].arrival_time - self.elapsed()))

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start


class EngineContender(Contender):
    """Any milestone's `LLM`, driven step by step as its own `generate` does. The times are the engine's."""

    def __init__(self, name: str, llm: BaseLLM, note: str = "",
                 add_request: Callable[[int, Request], None] | None = None,
                 before_run: Callable[[], object] = lambda: None) -> None:
        """The LLM stays the caller's: several contenders may share its weights, and closing this frees nothing.

        `add_request(index, request)` puts the workload's request number `index` into the engine, for engines that
        are told more about a request than the seam says; default: `engine.add_request(request)`. `before_run`: what to
        do to the engine before each run, the clock not running yet.
        """
        super().__init__(name, note)
        self.llm = llm
        self.add_request = add_request or (lambda _, request: llm.engine.add_request(request))
        self.before_run = before_run

    def serve(self, workload: Workload) -> Served:
        self.before_run()
        requests: dict[str, Request] = {}       # in the workload's order: dicts keep it
        arrivals = Arrivals(workload)
        try:
            self._drive(arrivals, requests)
            duration = arrivals.elapsed()
        finally:
            for request_id in requests:         # only a failed run leaves any
                self.llm.engine.abort_request(request_id)
        if lost := [i for i, r in enumerate(requests.values()) if r.metrics.finished_time is None]:
            raise BenchError(f"{self.name}: requests {lost} of {workload.name} did not finish")
        return Served(duration, tuple(RequestRecord.from_request(r, arrivals.start) for r in requests.values()),
                      tuple(tuple(r.sequences[0].output_token_ids) for r in requests.values()))

    def _drive(self, arrivals: Arrivals, requests: dict[str, Request]) -> None:
        engine, process = self.llm.engine, self.llm.input_processor.process
        while arrivals or engine.has_unfinished_requests():
            for index, r in arrivals.due():
                params = SamplingParams(temperature=0, max_tokens=r.output_len, ignore_eos=True)
                request = process({"prompt_token_ids": list(r.prompt_token_ids)}, params)
                # It may have come while a step was running: that wait is the engine's doing and belongs to its TTFT.
                request.metrics.arrival_time = arrivals.start + r.arrival_time
                self.add_request(index, request)
                requests[request.request_id] = request
            if engine.has_unfinished_requests():
                engine.step()
            else:
                arrivals.wait()
