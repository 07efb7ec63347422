"""The real scheduler over a clock that is worked out: what a policy does, without a model and without noise.

    requests -> schedule() -> a step takes fixed + tokens x per_token seconds -> update, one token each -> ...

Everything but the time is the engine's own code: policies, budgets, rows, preemption. The same trace gives the
same numbers on every machine, so documents may quote them as computed.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from m0_basics.request import Request, RequestMetrics, SequenceStatus
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.bench.metrics import RequestRecord
from m0_basics.tools.bench.workloads import BenchRequest

from ..kv_cache_manager import KVCacheManager, RowKVCacheManager
from ..plugins.base import SchedulerPlugin, StepStats
from ..policies import SchedulingParams, make_policy
from ..queues import Queues
from ..scheduler import PrefillFirstScheduler, SchedulerOutput


@dataclass
class SimulatedClock:
    """Seconds, set by the simulation."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step: a fixed part (weights read, overhead) and one for each token run."""

    fixed_s: float
    per_token_s: float

    def __call__(self, num_tokens: int) -> float:
        return self.fixed_s + num_tokens * self.per_token_s


@dataclass(frozen=True)
class SimulatedStep:
    """What one step ran."""

    seconds: float
    seq_lens: tuple[int, ...]       # of its sequences, once it is done
    num_tokens: int                 # run
    num_prefill_tokens: int         # of them; the others were decodes
    num_sampled: int
    recomputed: int                 # tokens run that had been run before: the price of preemption
    preempted: int
    start: float = 0.0              # when it began

    @property
    def is_decode(self) -> bool:
        return self.num_prefill_tokens == 0


@dataclass(frozen=True)
class Simulation:
    """The steps, and a record of each request in the order in which they were given."""

    steps: list[SimulatedStep]
    records: list[RequestRecord]

    @property
    def seconds(self) -> float:
        """From the first arrival, at 0, to the last token."""
        return max(r.finish_time for r in self.records)


@dataclass
class Simulator:
    """One run's parts. `declared` is the max_tokens that requests ask for; None: the length that they will have.

    `kv_cache_manager` is a cache other than a row for each sequence.
    """

    max_num_seqs: int
    policy: str = "fcfs"
    cost: StepCost = StepCost(1.0, 0.0)
    token_budget: int = 2048        # where the soft budget starts; a plugin may change it
    row_size: int = 2048
    declared: int | None = None
    plugins: Sequence[SchedulerPlugin] = ()
    kv_cache_manager: KVCacheManager | None = None
    clock: SimulatedClock = field(default_factory=SimulatedClock)

    def run(self, requests: Sequence[BenchRequest],
            params: Callable[[int], SchedulingParams] = lambda i: SchedulingParams()) -> Simulation:
        """Serve `requests`, in the order of their arrival; `params(i)` says how urgent request i is."""
        cache = self.kv_cache_manager or RowKVCacheManager(self.max_num_seqs, self.row_size)
        queues = Queues(make_policy(self.policy), cache, self.max_num_seqs, self.row_size, self.clock)
        scheduler = PrefillFirstScheduler(queues, max(self.token_budget, self.row_size))
        scheduler.token_budget = self.token_budget
        made = [self._request(i, r) for i, r in enumerate(requests)]
        steps: list[SimulatedStep] = []
        arrived = 0
        while arrived < len(made) or queues.has_unfinished_requests():
            if not queues.has_unfinished_requests():
                self.clock.now = max(self.clock.now, requests[arrived].arrival_time)
            while arrived < len(made) and requests[arrived].arrival_time <= self.clock.now:
                scheduler.check_request(made[arrived], params(arrived))
                queues.add(made[arrived], params(arrived))
                arrived += 1
            steps.append(self._step(scheduler, requests, len(steps)))
        return Simulation(steps, [RequestRecord.from_request(r) for r in made])

    def _request(self, index: int, request: BenchRequest) -> Request:
        sampling = SamplingParams(temperature=0, max_tokens=self.declared or request.output_len)
        return Request(str(index), None, list(request.prompt_token_ids), sampling,
                       metrics=RequestMetrics(arrival_time=request.arrival_time))

    def _step(self, scheduler: PrefillFirstScheduler, requests: Sequence[BenchRequest], index: int) -> SimulatedStep:
        start = self.clock.now
        for plugin in self.plugins:
            plugin.before_step(scheduler)
        output = scheduler.schedule()
        assert output.scheduled, "something waits, and nothing can run"
        self.clock.now += self.cost(output.total_num_scheduled_tokens)
        finishing = [s for s in output.scheduled if s.reaches_newest]
        # A token behind the prompt is run once by itself; run together with others, it is run again.
        recomputed = sum(s.num_tokens - 1 for s in output.scheduled if s.sequence.output_token_ids and not s.is_decode)
        step = SimulatedStep(self.clock.now - start, tuple(s.end for s in output.scheduled),
                             output.total_num_scheduled_tokens, output.num_prefill_tokens,
                             len(finishing), recomputed, len(output.preempted), start)
        scheduler.update_from_output(output)
        for s in finishing:
            request = scheduler.queues.get_request(s.sequence)
            s.sequence.append_token_id(0)
            request.metrics.token_times.append(self.clock.now)
            if len(s.sequence.output_token_ids) == requests[int(request.request_id)].output_len:
                s.sequence.set_status(SequenceStatus.FINISHED_LENGTH_CAPPED)
                request.metrics.finished_time = self.clock.now
                scheduler.queues.finish(s.sequence)
        self._report(scheduler, output, step, index)
        return step

    def _report(self, scheduler: PrefillFirstScheduler, output: SchedulerOutput, step: SimulatedStep,
                index: int) -> None:
        stats = StepStats(index, step.start, self.clock.now, output, step.num_prefill_tokens, step.num_sampled,
                          len(scheduler.running), len(scheduler.waiting), step.preempted,
                          scheduler.kv_cache_manager.usage, scheduler.token_budget)
        for plugin in self.plugins:
            plugin.after_step(scheduler, stats)
