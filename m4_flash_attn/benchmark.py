"""Benchmark of milestone 4: kernels that read the cache where it lies, packed weights, all layers in one call.

  ragged      64 requests of all lengths, at once: this engine, without each of its two ideas, the earlier ones, peers
  single      one request: how near to what the memory's bandwidth allows?
  attention   attention alone over batch and context, and the memory that a prompt's attention needs
  linear      linear layers alone: torch's, oneDNN's packed ones, and this milestone's
  step        where the time of a decode step goes, and how much of it is Python's
  start       seconds to the first token of a new process, the kernels built or not
"""
from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import m2_continuous_batching as m2
import m3_paged_kv as m3
from m0_basics.base_llm import BaseLLM
from m0_basics.model_spec import ModelSpec
from m0_basics.tools.analysis import calculators as calc
from m0_basics.tools.analysis.calculators import Work
from m0_basics.tools.analysis.cpu_roofline import measure_cpu, read_bandwidth
from m0_basics.tools.analysis.microbench import QUICK
from m0_basics.tools.analysis.roofline import Hardware
from m0_basics.tools.bench import (
    BenchReport,
    Comparison,
    Contender,
    ContenderResult,
    EngineContender,
    Workload,
    compare,
    get_workload,
    make_peers,
)
from m0_basics.tools.bench.subprocess_peers import SubprocessPeer

from .llm import LLM
from .tools.attention_bench import attention_times, prefill_memory
from .tools.bench_views import PLOTTED_BATCH, draw, print_tables
from .tools.linear_bench import Timing
from .tools.linear_bench import measure as measure_linear
from .tools.start_up import start_up
from .tools.step_parts import step_parts

logger = logging.getLogger(__name__)
DEFAULT_PEERS = ("transformers-static",)
MAX_NUM_SEQS = 64
SINGLE = "equal-1:prompt_len=80,output_len=64"
LINEAR_ROWS = (1, 4, 16, 64, 256)
STEP_SIZES = (1, 16, 64)


def run(config_options: dict[str, Any], *, workload: str | None = None, rounds: int = 3, quick: bool = False,
        peers: Sequence[str] = (), peer_python: Sequence[Path] = (), output_dir: Path) -> BenchReport:
    """Run everything, or one named `workload` over all contenders; print, save JSON and figures, return the report.

    `quick` shrinks every part until it takes seconds; its numbers mean nothing.
    """
    ragged = get_workload(workload or ("ragged-64:num_requests=6,output_max=20" if quick else "ragged-64"))
    base = {"max_model_len": 1024, "max_num_seqs": MAX_NUM_SEQS, **config_options}
    base["max_model_len"] = max(base["max_model_len"], ragged.longest)
    llm = LLM(**base)
    ours = _ours(llm, base)
    with ExitStack() as stack:
        names = list(peers) or list(DEFAULT_PEERS)
        others = [stack.enter_context(p) for p in make_peers(names, peer_python, llm, base["max_model_len"],
                                                             str(base.get("dtype", "auto")))]
        contenders = [*ours, *others]
        comparisons = [compare(contenders, ragged.fit_vocabulary(llm.spec.vocab_size), rounds, baseline="m3")]
        if workload is not None:
            report = BenchReport.create("m4_flash_attn", base, tuple(comparisons),
                                        {"speedup": {"ragged": speedups(comparisons[0])}})
            report.print()
            report.save(output_dir / f"bench-{ragged.name.partition(':')[0]}.json")
            return report
        single = get_workload("equal-1:prompt_len=8,output_len=4" if quick else SINGLE)
        single = single.fit_vocabulary(llm.spec.vocab_size)
        cpu = measure_cpu(1, 1 << 20, 64) if quick else measure_cpu()
        memory = torch.ones((1 if quick else 256) << 18)            # MiB
        comparisons.append(compare(contenders, single, rounds, baseline="m3",
                                   probe=partial(read_bandwidth, memory, choose=median)))
        started = {p.name: p.startup_s for p in others if isinstance(p, SubprocessPeer)}
    measurements = {"speedup": {name: speedups(c) for name, c in zip(("ragged", "single"), comparisons, strict=True)},
                    "limits": limits(llm, cpu, ragged, single, comparisons[1])}
    if llm.attention_backend == "cpu":
        measurements |= _kernels(llm, rounds, quick)
        measurements["start"] = start_up(config_options, 1 if quick else rounds) | {"peers": started}
    else:
        logger.warning("attention runs by %s here: the C++ kernels are not measured", llm.attention_backend)
    report = BenchReport.create("m4_flash_attn", base, tuple(comparisons), measurements)
    report.print()
    print_tables(report)
    report.save(output_dir / "bench.json")
    draw(report, output_dir)
    return report


def _ours(llm: LLM, base: dict[str, Any]) -> list[Contender]:
    """This engine, without each of its two ideas, and the earlier ones."""
    return [EngineContender("m4", llm, f"attention: {llm.attention_backend}, fused layers"),
            EngineContender("m4-sdpa", LLM(**(base | {"attention_backend": "sdpa"})), "m3's attention, fused layers"),
            EngineContender("m4-unfused", LLM(**(base | {"fused_layers": False})), "its attention, m0's layers"),
            EngineContender("m3", m3.LLM(**_known_to(m3.LLM, base)), "blocks, gathered for SDPA"),
            EngineContender("m2", m2.LLM(**_known_to(m2.LLM, base)), "a row for each request")]


def _known_to(llm_class: type[BaseLLM], options: dict[str, Any]) -> dict[str, Any]:
    """The options that an earlier engine has too."""
    return {name: value for name, value in options.items() if name in llm_class.config_class.options()}


def speedups(comparison: Comparison) -> dict[str, float]:
    """This engine's output throughput over each other's: the median of the rounds' ratios."""
    m4 = comparison["m4"]
    return {c.name: median(a.output_throughput / b.output_throughput for a, b in zip(m4.rounds, c.rounds, strict=True))
            for c in comparison.contenders if c is not m4}


def limits(llm: LLM, cpu: Hardware, ragged: Workload, single: Workload, measured: Comparison) -> dict[str, Any]:
    """What this processor allows, in output tokens per second, and each contender's share of it in decode.

    One request: every token reads all weights, and the keys and values so far. The bandwidth drifts on a machine that
    others use, too, so each run has its own, the median of reads just before and after it. Many: the FLOPs of all steps
    at the measured peak.
    """
    spec, dtype = llm.spec, llm.engine.runner.model.dtype
    [request] = single.requests
    context = len(request.prompt_token_ids) + request.output_len // 2
    num_bytes = calc.decode_bytes(spec, context, dtype=dtype).total
    # A processor that cannot multiply bfloat16 widens the weights, and multiplies float32.
    peak = max(cpu.peak(dtype), cpu.peak(torch.float32))
    bandwidth = median(probe for c in measured.contenders for probe in c.probes)
    return {"bytes_per_second": bandwidth, "flops_per_second": peak,
            "single": {"bytes_per_token": num_bytes, "tokens_per_s": bandwidth / num_bytes,
                       "decode_share": {c.name: median(shares(c, num_bytes)) for c in measured.contenders}},
            "ragged": {"tokens_per_s": ragged.num_output_tokens * peak / _flops(spec, ragged)}}


def shares(contender: ContenderResult, num_bytes: int) -> list[float]:
    """For each round, the share of the bandwidth at which decoding reads `num_bytes` a token."""
    return [num_bytes / (1e-3 * metrics.tpot_ms.median) / bandwidth
            for metrics, bandwidth in zip(contender.rounds, contender.probes, strict=True)
            if metrics.tpot_ms is not None]


def _flops(spec: ModelSpec, workload: Workload) -> int:
    """Of a whole run: every prompt, and every token but the last once more."""
    works = [Work(len(r.prompt_token_ids), len(r.prompt_token_ids)) for r in workload.requests]
    works += [Work(1, len(r.prompt_token_ids) + i) for r in workload.requests for i in range(1, r.output_len)]
    return calc.step_flops(spec, works, causal=True, num_logits=len(works)).total


def _kernels(llm: LLM, rounds: int, quick: bool) -> dict[str, Any]:
    """The parts by themselves."""
    spec, dtype = llm.spec, llm.engine.runner.model.dtype
    if quick:
        attention = attention_times(spec, dtype, (1, PLOTTED_BATCH), (16, 40), QUICK)
    else:
        attention = attention_times(spec, dtype)
    timings = measure_linear(2 * spec.intermediate_size, spec.hidden_size, (1, 4) if quick else LINEAR_ROWS, dtype,
                             1 if quick else 2 * rounds)
    steps = step_parts(llm, (1, 2) if quick else STEP_SIZES, 8 if quick else 64, 2 if quick else 24)
    return {"attention": attention, "linear": by_rows(timings), "steps": steps,
            "prefill_memory": prefill_memory(spec, dtype, (16, 40)) if quick else prefill_memory(spec, dtype)}


def by_rows(timings: list[Timing]) -> list[dict[str, Any]]:
    """An entry per number of rows: seconds, FLOP/s, and bytes of weights per second of each kind."""
    entries: dict[int, dict[str, Any]] = {}
    for t in timings:
        entry = entries.setdefault(t.rows, {"rows": t.rows, "columns": t.columns, "depth": t.depth})
        entry |= {f"{t.kind}_s": t.seconds, f"{t.kind}_gflops": t.gflops, f"{t.kind}_gbytes": t.gbytes}
    return list(entries.values())
