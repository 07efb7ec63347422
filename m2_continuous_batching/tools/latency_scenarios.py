"""Two situations in which throughput is not the question: who waits, and for how long?

  policies   more requests than rows, every fifth one urgent: what does a policy do for the urgent ones, and what
             does it cost the others?
  budget     streams are being read when a burst of prompts arrives: how long do the streams stand still, with the
             whole budget and with one that follows the load?
"""
from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median
from typing import Any

from m0_basics.request import Request
from m0_basics.tools.bench import BenchRequest, EngineContender, RequestRecord, RunResult, Stats, Workload, get_workload

from ..llm import LLM
from ..plugins.adaptive_budget import AdaptiveBudgetPlugin
from ..policies import SchedulingParams

POLICIES = ("fcfs", "priority", "ageing:1")
URGENT_EVERY = 5
LESS_URGENT = 10                    # the others' priority; the urgent ones have 0
POLICY_ROWS = 8
TPOT_TARGET_S = 0.25


def measure(options: dict[str, Any], rounds: int, quick: bool) -> dict[str, Any]:
    """Both scenarios, as plain values for JSON; the contenders of each take turns."""
    return {"policies": _policies(options, rounds, quick), "budget": _budget(options, rounds, quick)}


def _policies(options: dict[str, Any], rounds: int, quick: bool) -> dict[str, Any]:
    """Per policy: TTFT in ms of urgent and other requests, and the longest wait. Medians of the rounds."""
    size = "poisson-10:rate=40,output_max=20" if quick else "poisson-40:rate=4"
    contenders = {}
    for policy in POLICIES:
        llm = LLM(**(options | {"policy": policy, "max_num_seqs": POLICY_ROWS}))
        contenders[policy] = EngineContender(policy, llm, add_request=_adder(llm))
    workload = get_workload(size).fit_vocabulary(llm.spec.vocab_size)
    runs = _take_turns(contenders, workload, rounds)
    result = {}
    for policy, results in runs.items():
        waits = [([r.ttft or 0.0 for r in run.records[::URGENT_EVERY]],
                  [r.ttft or 0.0 for i, r in enumerate(run.records) if i % URGENT_EVERY]) for run in results]
        result[policy] = {
            "urgent_ttft_p99_ms": median(_p99_ms(urgent) for urgent, _ in waits),
            "others_ttft_p99_ms": median(_p99_ms(others) for _, others in waits),
            "longest_ttft_ms": median(1e3 * max(urgent + others) for urgent, others in waits),
            "output_throughput": median(run.metrics.output_throughput for run in results),
        }
    return result


def _adder(llm: LLM) -> Any:
    def add(index: int, request: Request) -> None:
        priority = 0 if index % URGENT_EVERY == 0 else LESS_URGENT
        llm.engine.add_request(request, SchedulingParams(priority=priority))
    return add


def burst_workload(num_streams: int, num_prompts: int, stream_len: int, at: float, seed: int = 0) -> Workload:
    """Streams with short prompts from the start, and a burst of longer prompts with short outputs at second `at`."""
    rng = random.Random(seed)

    def request(prompt_len: int, output_len: int, arrival: float) -> BenchRequest:
        return BenchRequest(tuple(rng.randrange(100, 49_000) for _ in range(prompt_len)), output_len, arrival)

    streams = [request(16, stream_len, 0.0) for _ in range(num_streams)]
    burst = [request(rng.randint(96, 160), 16, at) for _ in range(num_prompts)]
    return Workload("burst", (*streams, *burst), f"{num_streams} streams, then {num_prompts} prompts at once")


def _budget(options: dict[str, Any], rounds: int, quick: bool) -> dict[str, Any]:
    """With the whole budget and with the adaptive one: how long the streams' tokens took. Medians of the rounds."""
    num_streams = 2 if quick else 8
    fixed = LLM(**options)
    adaptive = LLM(**options, plugins=[AdaptiveBudgetPlugin(target_tpot_s=TPOT_TARGET_S)])
    workload = (burst_workload(num_streams, 4, 12, 0.05) if quick else burst_workload(num_streams, 24, 96, 1.0))
    workload = workload.fit_vocabulary(fixed.spec.vocab_size)
    runs = _take_turns({"fixed": EngineContender("fixed", fixed), "adaptive": EngineContender("adaptive", adaptive)},
                       workload, rounds)
    result: dict[str, Any] = {"target_ms": 1e3 * TPOT_TARGET_S}
    for name, results in runs.items():
        result[name] = {
            "stream_itl_p99_ms": median(_p99_ms(_itls(run.records[:num_streams])) for run in results),
            "stream_itl_max_ms": median(1e3 * max(_itls(run.records[:num_streams])) for run in results),
            "burst_ttft_mean_ms": median(_mean_ms([r.ttft or 0.0 for r in run.records[num_streams:]])
                                         for run in results),
            "output_throughput": median(run.metrics.output_throughput for run in results),
        }
    return result


def _take_turns(contenders: dict[str, EngineContender], workload: Workload, rounds: int) -> dict[str, list[RunResult]]:
    for contender in contenders.values():
        contender.warm_up(workload)
    runs: dict[str, list[RunResult]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            runs[name].append(contender.run(workload))
    return runs


def _itls(records: Sequence[RequestRecord]) -> list[float]:
    return [itl for record in records for itl in record.itls]


def _p99_ms(seconds: list[float]) -> float:
    stats = Stats.of(seconds, 1e3)
    assert stats is not None
    return stats.p99


def _mean_ms(seconds: list[float]) -> float:
    stats = Stats.of(seconds, 1e3)
    assert stats is not None
    return stats.mean
