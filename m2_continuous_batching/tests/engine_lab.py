"""An engine over a tiny model, what is watched in it, and a policy that preempts at random."""
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from m0_basics.outputs import RequestOutput
from m0_basics.request import Request
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.conformance import greedy
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import reference_greedy
from m2_continuous_batching import LLM
from m2_continuous_batching.plugins import Plugin, SchedulerPlugin, StepStats
from m2_continuous_batching.policies import FCFSPolicy, QueuedSequence
from m2_continuous_batching.scheduler import PrefillFirstScheduler, Scheduler

NUM_TOKENS = 16


class Whimsical(FCFSPolicy):
    """Whoever waits displaces whoever runs, if the dice say so."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def may_displace(self, waiting: QueuedSequence, victim: QueuedSequence) -> bool:
        return self.dice.random() < 0.3


class Watcher(SchedulerPlugin):
    """Counts what the engine reports, and calls `hook` (name of the hook) at each of its hooks."""

    def __init__(self, hook: Callable[[str], None] = lambda name: None) -> None:
        self.hook = hook
        self.stats: list[StepStats] = []
        self.completed: Counter[str] = Counter()
        self.preempted = 0

    def before_step(self, scheduler: Scheduler) -> None:
        self.hook("before_step")

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self.stats.append(stats)
        self.preempted += stats.num_preempted
        self.hook("after_step")

    def on_request_completion(self, request: Request) -> None:
        self.completed[request.request_id] += 1
        self.hook("on_request_completion")


class Lab:
    """An engine over a tiny model, and what is watched in it."""

    def __init__(self, tiny_model: TinyModels, **options: Any) -> None:
        self.folder = tiny_model("qwen3")
        self.watcher = Watcher()
        plugins: list[Plugin] = [self.watcher]
        self.llm = LLM(str(self.folder), plugins, **{"dtype": "float32", "max_num_seqs": 3, "max_model_len": 96,
                                                    **options})
        self.engine = self.llm.engine
        assert isinstance(self.engine.scheduler, PrefillFirstScheduler)
        self.scheduler = self.engine.scheduler

    def request(self, prompt: list[int], params: SamplingParams | None = None) -> Request:
        return self.llm.input_processor.process(prompt, params or greedy())

    def add(self, prompts: list[list[int]], params: SamplingParams | None = None) -> list[Request]:
        requests = [self.request(p, params) for p in prompts]
        for request in requests:
            self.engine.add_request(request)
        return requests

    def finish(self, limit: int = 2000) -> dict[str, RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        for _ in range(limit):
            if not self.engine.has_unfinished_requests():
                return outputs
            outputs |= {o.request_id: o for o in self.engine.step()}
        raise AssertionError("not done")

    def run(self, prompts: Any, params: Any = None, **kwargs: Any) -> list[RequestOutput]:
        return self.llm.generate(prompts, params or greedy(), use_tqdm=False, **kwargs)

    def reference(self, prompts: list[list[int]], max_tokens: int = NUM_TOKENS) -> list[list[int]]:
        return reference_greedy(self.folder, prompts, max_tokens)

    def check_empty(self) -> None:
        assert not self.engine.has_unfinished_requests()
        assert self.scheduler.kv_cache_manager.usage == 0
        assert (self.scheduler.waiting, self.scheduler.running) == ([], [])
        queues = self.scheduler.queues
        assert (queues._entries, queues._requests, queues._deadlines) == ({}, {}, {})
        assert self.engine.output_processor._states == {}
        assert all(count == 1 for count in self.watcher.completed.values()), "completed more than once"


def preempting(tiny_model: TinyModels, seed: int, **options: Any) -> Lab:
    """A lab in which running sequences are sent back at random."""
    lab = Lab(tiny_model, **{"max_num_seqs": 2, **options})
    lab.scheduler.queues.policy = Whimsical(seed)
    return lab
