"""Benchmark of milestone 2: continuous batching against one request at a time, static batches, and transformers.

  ragged      64 requests of all lengths, at once: where continuous batching should win
  equal       32 requests of the same lengths: where static batching wastes nothing, so there is little to win
  poisson     requests that arrive over time, at several rates: throughput, latencies, goodput; at the lowest rate
              there is hardly ever anything to batch
  async       scheduling that overlaps execution, against plain steps
  step_costs  how much of a decode step is not the model
  latency     what policies and the adaptive budget do to those who wait (`latency_scenarios.py`)
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import m1_offline
from m0_basics.base_llm import BaseLLM
from m0_basics.tools.bench import (
    SLO,
    BenchReport,
    Comparison,
    Contender,
    EngineContender,
    RunMetrics,
    Series,
    Stats,
    Workload,
    compare,
    get_workload,
    line_plot,
    make_peers,
    throughput_bars,
)
from m1_offline.static_batching import StaticBatchLLM

from .llm import LLM
from .tools import latency_scenarios
from .tools.step_costs import step_costs
from .tools.timeline import as_rows, draw_timelines, record_timeline

DEFAULT_PEERS = ("transformers", "transformers-static", "transformers-continuous")
MAX_NUM_SEQS = 32                   # rows, of m2 and of the static batches alike
RATES = (0.5, 2.0, 6.0)             # requests per second
SLO_POISSON = SLO(ttft_ms=2000.0, tpot_ms=200.0)
POISSON_METRICS = ("ttft_ms", "tpot_ms", "itl_ms", "request_goodput", "output_throughput")


def run(config_options: dict[str, Any], *, workload: str | None = None, rounds: int = 3, quick: bool = False,
        peers: Sequence[str] = (), peer_python: Sequence[Path] = (), output_dir: Path) -> BenchReport:
    """Run everything, or one named `workload` over all contenders; print, save JSON and figures, return the report.

    `quick` shrinks every part until it takes seconds; its numbers mean nothing.
    """
    names = list(peers) or list(DEFAULT_PEERS)
    named = get_workload(workload) if workload is not None else None
    ragged = get_workload("ragged-64:num_requests=6,output_max=20" if quick else "ragged-64")
    longest = max(1024, (named or ragged).longest)
    options = {"max_model_len": longest, "max_num_seqs": MAX_NUM_SEQS, **config_options}
    one_at_a_time = m1_offline.LLM(**_known_to(m1_offline.LLM, options))
    static = StaticBatchLLM(**_known_to(StaticBatchLLM, options))
    llm = LLM(**options)
    ragged = ragged.fit_vocabulary(llm.spec.vocab_size)
    ours: list[Contender] = [
        EngineContender("m1", one_at_a_time, "one request at a time"),
        EngineContender("m1-static", static, f"left-padded batches of {options['max_num_seqs']}"),
        EngineContender("m2", llm, f"continuous batching, {options['max_num_seqs']} rows"),
    ]
    with ExitStack() as stack:
        others = [stack.enter_context(peer) for peer in make_peers(names, peer_python, llm, options["max_model_len"])]
        if named is not None:
            comparison = compare([*ours, *others], named.fit_vocabulary(llm.spec.vocab_size), rounds, baseline="m1")
            report = BenchReport.create("m2_continuous_batching", options, (comparison,))
            report.print()
            report.save(output_dir / f"bench-{named.name.partition(':')[0]}.json")
            return report
        comparisons, measurements = _everything(options, ours, others, ragged, rounds, quick)
    # Runs of their own: watching costs time.
    measurements["timelines"] = {"static batches": as_rows(record_timeline(static, ragged)),
                                 "continuous batching": as_rows(record_timeline(llm, ragged))}
    report = BenchReport.create("m2_continuous_batching", options, tuple(comparisons), measurements)
    report.print()
    report.save(output_dir / "bench.json")
    draw(report, output_dir)
    return report


def _known_to(llm_class: type[BaseLLM], options: dict[str, Any]) -> dict[str, Any]:
    """The options that an earlier engine has too."""
    return {name: value for name, value in options.items() if name in llm_class.config_class.options()}


def _everything(options: dict[str, Any], ours: list[Contender], others: list[Contender], ragged: Workload, rounds: int,
                quick: bool) -> tuple[list[Comparison], dict[str, Any]]:
    m2 = ours[-1]
    assert isinstance(m2, EngineContender) and isinstance(m2.llm, LLM)

    def fit(workload: Workload) -> Workload:
        return workload.fit_vocabulary(m2.llm.spec.vocab_size)

    batching = [c for c in others if c.name != "transformers"]
    comparisons = [compare([*ours, *others], ragged, rounds, baseline="m1")]
    equal = get_workload("equal-32:num_requests=4,output_len=8" if quick else "equal-32")
    comparisons.append(compare([*ours[1:], *batching], fit(equal), rounds))
    few = 4 if quick else 32
    for rate in RATES:
        poisson = get_workload(f"poisson-{few}:rate={rate * 10 if quick else rate}" + ",output_max=20" * quick)
        comparisons.append(compare([*ours, *(c for c in batching if c.name == "transformers-continuous")], fit(poisson),
                                   min(rounds, 2), baseline="m2", slo=SLO_POISSON))
    ahead = EngineContender("m2-async", LLM(**options, async_scheduling=True), "scheduling overlaps execution")
    comparisons.append(compare([m2, ahead], ragged, rounds))
    by_rate = [{c.name: {key: _metric(p, c.name, key) for key in POISSON_METRICS} for c in p.contenders}
               for p in comparisons[2:2 + len(RATES)]]
    return comparisons, {"latency": latency_scenarios.measure(options, min(rounds, 2), quick), "poisson": by_rate,
                         "step_costs": step_costs(m2.llm, options["max_num_seqs"])}


def draw(report: BenchReport, output_dir: Path) -> None:
    """The figures of a whole report."""
    ragged, equal = report.comparisons[:2]
    throughput_bars(ragged, output_dir / "ragged.png", f"{ragged.workload['num_requests']} ragged requests")
    throughput_bars(equal, output_dir / "equal.png", "Equal lengths")
    if timelines := report.measurements.get("timelines"):
        draw_timelines(timelines, report.config["max_num_seqs"], output_dir / "timeline.png")
    poisson = report.comparisons[2:2 + len(RATES)]
    for key, title, ylabel, unit in (
            ("ttft_ms", "Time to first token, 99th percentile", "milliseconds", " ms"),
            ("request_goodput", "Requests within the objectives", "requests per second", " a second")):
        lines = {c.name: Series(RATES, [_metric(p, c.name, key) for p in poisson]) for c in poisson[0].contenders}
        line_plot(lines, output_dir / f"poisson_{key}.png", title=title, xlabel="arrivals per second", ylabel=ylabel,
                  log_y=key == "ttft_ms", unit=unit)


def _metric(comparison: Comparison, name: str, key: str) -> float:
    """The median over the rounds of a rate, or of a latency's 99th percentile."""
    def read(metrics: RunMetrics) -> float | None:
        value = getattr(metrics, key)
        return value.p99 if isinstance(value, Stats) else value

    value = comparison[name].median_of(read)
    assert value is not None
    return value
