"""Streams decode while long prompts arrive: how long do they stand still, and what does it cost in throughput?

Every budget is a point: its P99 time between two tokens of the streams, and the output tokens per second of the whole
run. All points of this engine are one engine whose budget is set before each run.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from m0_basics.tools.bench import (
    Contender,
    EngineContender,
    RequestRecord,
    RunResult,
    Series,
    Stats,
    Workload,
    line_plot,
)
from m2_continuous_batching.engine import engine_of

from ..llm import LLM
from ..scheduler import ChunkedPrefillScheduler

SLOWDOWNS = (1.25, 1.5, 2.0, 3.0, 6.0)
FIXED = (256,)                          # tokens of a step, whatever they cost
STREAM_PROMPT = 32                      # tokens: longer prompts are those that arrive


@dataclass(frozen=True)
class Budget:
    """How a step of the engine is limited: by its time over that of a step that only decodes, or by its tokens."""

    slowdown: float = 3.0
    num_tokens: int | None = None

    @property
    def name(self) -> str:
        return f"m5 {100 * self.slowdown:.0f}%" if self.num_tokens is None else f"m5 {self.num_tokens} tokens"

    def apply(self, llm: LLM) -> None:
        """Limit the steps of that engine so."""
        scheduler = engine_of(llm).scheduler
        assert isinstance(scheduler, ChunkedPrefillScheduler)
        scheduler.budget.max_step_slowdown = self.slowdown
        scheduler.budget.is_fixed = self.num_tokens is not None
        scheduler.token_budget = self.num_tokens or scheduler.max_num_batched_tokens


def budgets(llm: LLM) -> list[EngineContender]:
    """This engine, once for each budget."""
    each = (*map(Budget, SLOWDOWNS), *(Budget(num_tokens=n) for n in FIXED))
    return [EngineContender(budget.name, llm, before_run=partial(budget.apply, llm)) for budget in each]


def measure(contenders: Sequence[Contender], decoding: Contender, workload: Workload, rounds: int) -> dict[str, Any]:
    """Points by name, and the time of a step that only decodes: the streams alone, run by `decoding` in each round.

    The long prompts arrive in the first part of the time that the streams take alone, whatever the machine.
    """
    streams = replace(workload, requests=tuple(r for r in workload.requests if _is_stream(len(r.prompt_token_ids))))
    for contender in contenders:
        contender.warm_up(workload)
    workload = within(workload, decoding.run(streams).metrics.duration_s)
    runs: dict[str, list[RunResult]] = {c.name: [] for c in contenders}
    alone = []
    for _ in range(rounds):
        itls = Stats.of(_itls(decoding.run(streams).records), 1e3)
        assert itls is not None
        alone.append(itls)
        for contender in contenders:
            runs[contender.name].append(contender.run(workload))
    return {"decode_only_ms": median(a.median for a in alone), "decode_only_p99_ms": median(a.p99 for a in alone),
            "decode_only_rounds": [a.median for a in alone], "num_streams": len(streams.requests), "rounds": rounds,
            "workload": workload.summary(),
            "points": {c.name: point(runs[c.name]) | {"note": c.note} for c in contenders}}


def within(workload: Workload, seconds: float) -> Workload:
    """The workload, its long prompts arriving evenly from 10 to 60 % of `seconds`."""
    long = [r for r in workload.requests if not _is_stream(len(r.prompt_token_ids))]
    arrivals = {id(r): seconds * (0.1 + 0.5 * i / max(1, len(long) - 1)) for i, r in enumerate(long)}
    return replace(workload, requests=tuple(replace(r, arrival_time=arrivals.get(id(r), r.arrival_time))
                                            for r in workload.requests))


def point(runs: Sequence[RunResult]) -> dict[str, Any]:
    """Medians of the rounds, in milliseconds and tokens per second, and each round's own numbers."""
    each = []
    for run in runs:
        streams = [r for r in run.records if _is_stream(r.num_prompt_tokens)]
        long = [r for r in run.records if not _is_stream(r.num_prompt_tokens)]
        itls = Stats.of(_itls(streams), 1e3)
        assert itls is not None
        each.append({"itl_p99_ms": itls.p99, "itl_median_ms": itls.median, "itl_max_ms": 1e3 * max(_itls(streams)),
                     "long_ttft_ms": 1e3 * median([r.ttft or 0.0 for r in long]) if long else 0.0,
                     "output_throughput": run.metrics.output_throughput})
    return {key: median(e[key] for e in each) for key in each[0]} | {"rounds": each}


def compared(found: dict[str, Any], baseline: str = "m4") -> dict[str, Any]:
    """What each point gains on the baseline's P99, and keeps of its throughput: medians of the rounds' ratios."""
    base = found["points"][baseline]["rounds"]
    return {name: {"itl_p99_gain": median(b["itl_p99_ms"] / e["itl_p99_ms"]
                                          for b, e in zip(base, p["rounds"], strict=True)),
                   "throughput_share": median(e["output_throughput"] / b["output_throughput"]
                                              for b, e in zip(base, p["rounds"], strict=True)),
                   "over_decode_only": median(e["itl_p99_ms"] / alone for e, alone in
                                              zip(p["rounds"], found["decode_only_rounds"], strict=True))}
            for name, p in found["points"].items()}


def draw(found: dict[str, Any], path: Path) -> Path:
    """P99 over throughput: this engine's points as two lines, each with its budget; the others' as points."""
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for name, p in found["points"].items():
        kind, label = name, ""
        if name.startswith("m5 "):
            kind, label = ("m5, by cost" if name.endswith("%") else "m5, fixed budget"), name.removeprefix("m5 ")
        elif name.startswith("vllm"):
            kind, label = "vLLM", f"{int(name.removeprefix('vllm ')):,} tokens"
        lines.setdefault(kind, []).append((p["output_throughput"], p["itl_p99_ms"], label))
    series = {}
    for kind, points in lines.items():
        xs, ys, labels = zip(*sorted(points), strict=True)
        series[kind] = Series(xs, ys, labels=labels)
    return line_plot(series, path, title="Streams decode while long prompts arrive: down and to the right is better",
                     log_y=True, xlabel="output tokens per second", ylabel="P99 between two tokens, ms", unit=None)


def _is_stream(num_prompt_tokens: int) -> bool:
    return num_prompt_tokens <= STREAM_PROMPT


def _itls(records: Sequence[RequestRecord]) -> list[float]:
    return [itl for record in records for itl in record.itls]
