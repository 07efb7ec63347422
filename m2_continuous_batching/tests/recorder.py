"""A plugin by which tests look into a running engine, and decide when it goes on."""
from __future__ import annotations

import threading
import time

from m2_continuous_batching.plugins import SchedulerPlugin


class Recorder(SchedulerPlugin):
    """Writes down every step; slows steps down, holds one, and fails, when it is told to."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.hold_after: int | None = None      # so many steps; the next one sets `held` and waits for `go`
        self.held, self.go = threading.Event(), threading.Event()
        self.fail_with: BaseException | None = None
        self.threads: set[threading.Thread] = set()
        self.steps: list[list[tuple[int, int]]] = []         # (seq_id, tokens run) of each step
        self.completed = []

    def before_step(self, scheduler):
        self.threads.add(threading.current_thread())
        if self.fail_with is not None:
            raise self.fail_with
        if self.hold_after is not None and len(self.steps) >= self.hold_after:
            self.held.set()
            assert self.go.wait(120), "nobody let the step go on"
        time.sleep(self.step_s)

    def after_step(self, scheduler, stats):
        self.steps.append([(s.sequence.seq_id, s.num_tokens) for s in stats.output.scheduled])

    def on_request_completion(self, request):
        self.completed.append(request)
