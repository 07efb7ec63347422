"""Benchmark of milestone 6: what is gained where prompts share, and what it costs where they do not.

  ttft          time to the first token by the share of a prompt that is known; on three traces
  shared        64 requests behind one system prompt, against milestone 5 and vLLM with its prefix cache
  no_help       requests that share nothing: the cost of looking, hashing and keeping
  replay        hits against Belady's optimum, by the size of the cache
  lookup        bookkeeping alone: a look-up in a small cache and in a huge one
  disk          a server that comes back: read a known prompt, or compute it again
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import m4_flash_attn as m4
import m5_chunked_prefill as m5
from m0_basics.tools.bench import BenchReport, EngineContender, compare, get_workload, make_peers

from .llm import LLM
from .tools import bookkeeping, lookup, shared_prefix, ttft, warm_restart
from .tools.bench_views import draw, print_tables
from .tools.replay import WAYS, hits
from .tools.traces import TRACES, make_trace

DEFAULT_PEERS = ("transformers-static",)
PROMPT, NUM_VISITS = 1200, 24             # tokens; requests of each trace
REPLAY_VISITS = 600
REPLAY_BLOCKS = (200, 400, 800, 1600)


def run(config_options: dict[str, Any], *, workload: str | None = None, rounds: int = 3, quick: bool = False,
        peers: Sequence[str] = (), peer_python: Sequence[Path] = (), output_dir: Path) -> BenchReport:
    """Run everything, or one named `workload` over all contenders; print, save JSON and figures, return the report.

    `quick` shrinks every part until it takes seconds; its numbers mean nothing.
    """
    base = {"max_model_len": 512 if quick else 2048, "max_num_seqs": 64, **config_options}
    llm = LLM(**base)
    before = EngineContender("m5", m5.LLM(**base), "every prompt whole")
    # Rounds repeat the same prompts: what an earlier round computed is not to be found.
    ours = EngineContender("m6", llm, "what is shared once", before_run=llm.reset_prefix_cache)
    with ExitStack() as stack:
        start = partial(make_peers, llm=llm, max_model_len=base["max_model_len"], dtype=str(base.get("dtype", "auto")))
        named = get_workload(workload or ("ragged-64:num_requests=6,output_max=20" if quick else "ragged-64"))
        others = [stack.enter_context(p) for p in start(list(peers) or list(DEFAULT_PEERS), [])]
        vllm = [stack.enter_context(p) for p in start([], peer_python, settings={"enable_prefix_caching": True})]
        fitted = named.fit_vocabulary(llm.spec.vocab_size)
        if workload is not None:
            earlier = EngineContender("m4", m4.LLM(**base), "whole prompts first")
            report = BenchReport.create("m6_prefix_cache", base, (
                compare([earlier, before, ours, *others, *vllm], fitted, rounds, baseline="m5"),))
            report.print()
            report.save(output_dir / f"bench-{named.name.partition(':')[0]}.json")
            return report
        shared = shared_prefix.workload(llm.spec.vocab_size, quick)
        comparisons = [compare([before, ours], fitted, rounds, baseline="m5"),
                       compare([before, ours, *others, *vllm], shared, rounds, baseline="m5")]
    vocab_size, warm = llm.spec.vocab_size, EngineContender("m6", llm)
    measurements = {
        "ttft": ttft.by_share([before, warm], 80 if quick else PROMPT, rounds, vocab_size),
        "traces": ttft.on_traces([before, warm], 2 if quick else NUM_VISITS, rounds, vocab_size, base["max_model_len"]),
        "bookkeeping": bookkeeping.measure([before, ours], fitted, rounds),
        "replay": _replay(quick),
        "lookup": lookup.measure((1000,) if quick else lookup.SIZES),
        "disk": warm_restart.measure(base, rounds, (17, 65) if quick else warm_restart.LENGTHS)}
    report = BenchReport.create("m6_prefix_cache", base, tuple(comparisons), measurements)
    report.print()
    print_tables(report)
    report.save(output_dir / "bench.json")
    draw(report, output_dir)
    return report


def _replay(quick: bool) -> list[dict[str, Any]]:
    """Hits by trace and size of the cache: the share of the prompts' tokens, and of Belady's."""
    entries = []
    for name in TRACES:
        trace = make_trace(name, 30 if quick else REPLAY_VISITS)
        num_tokens = sum(len(visit.prompt) for visit in trace)
        for num_blocks in REPLAY_BLOCKS[-1:] if quick else REPLAY_BLOCKS:
            found = {way: hits(trace, num_blocks, way) for way in WAYS}
            entries.append({"trace": name, "blocks": num_blocks,
                            "ways": {way: {"share": n / num_tokens, "of_belady": n / max(1, found["belady"])}
                                     for way, n in found.items()}})
    return entries
