"""Benchmark of milestone 5: what mixed steps do for those who wait, and what drafts do for one who decodes.

  frontier      streams decode while long prompts arrive: the longest waits against throughput, over budgets
  waits         a short prompt behind a giant one; a giant one among streams
  no_help       everything at once, and one long prompt alone: nothing to win
  cost          how far the cost model is off
  drafts        drafter x task x number of requests; the draft model is trained for it, on other prompts
  thoughts      long chains of thought: m4, m5, with a small memory that swaps, with drafts
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import m4_flash_attn as m4
from m0_basics.base_llm import BaseLLM
from m0_basics.config import DEFAULT_MODEL
from m0_basics.tools.bench import BenchReport, Contender, EngineContender, compare, get_workload, make_peers
from m2_continuous_batching.engine import engine_of

from .llm import LLM
from .tools import draft_table, frontier, long_thoughts, waits
from .tools.bench_views import draw, print_tables
from .tools.copy_tasks import TASKS
from .tools.cost_check import CostCheck
from .tools.train_draft import train_draft

DEFAULT_PEERS = ("transformers-static",)
MAX_NUM_SEQS = 64
GIANT = 6000                            # tokens
SHORTS = (32, 256)
PEER_BUDGETS = (256, 2048)              # vLLM's max_num_batched_tokens


def run(config_options: dict[str, Any], *, workload: str | None = None, rounds: int = 3, quick: bool = False,
        peers: Sequence[str] = (), peer_python: Sequence[Path] = (), output_dir: Path) -> BenchReport:
    """Run everything, or one named `workload` over all contenders; print, save JSON and figures, return the report.

    `quick` shrinks every part until it takes seconds; its numbers mean nothing.
    """
    base = {"max_model_len": 512 if quick else 8192, "max_num_seqs": MAX_NUM_SEQS, **config_options}
    earlier, llm = m4.LLM(**base), LLM(**base)
    ours: list[EngineContender] = [EngineContender("m4", earlier, "whole prompts first"),
                                   EngineContender("m5", llm, "decodes first, then chunks")]
    with ExitStack() as stack:
        start = partial(make_peers, llm=llm, max_model_len=base["max_model_len"], dtype=str(base.get("dtype", "auto")))
        named = get_workload(workload or ("ragged-64:num_requests=6,output_max=20" if quick else "ragged-16"))
        others = [stack.enter_context(p) for p in start(list(peers) or list(DEFAULT_PEERS), [])]
        if workload is not None:
            others += [stack.enter_context(p) for p in start([], peer_python)]
        comparisons = [compare([*ours, *others], named.fit_vocabulary(llm.spec.vocab_size), rounds, baseline="m4")]
        if workload is not None:
            report = BenchReport.create("m5_chunked_prefill", base, tuple(comparisons))
            report.print()
            report.save(output_dir / f"bench-{named.name.partition(':')[0]}.json")
            return report
        tuned: list[Contender] = []
        for budget in PEER_BUDGETS if peer_python else ():
            for peer in start([], peer_python, settings={"max_num_batched_tokens": budget}):
                if peer.name == "vllm":                 # llama.cpp knows no such budget
                    peer.name = f"{peer.name} {budget}"
                    tuned.append(stack.enter_context(peer))
                else:
                    peer.close()
        measurements = {"frontier": _frontier(ours, tuned, rounds, quick)}
    unfinished = output_dir / "unfinished.json"         # an hour's work: something is left of it if it is cut short
    output_dir.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(json.dumps(measurements))
    measurements |= _waits(ours, base, rounds, quick)
    unfinished.write_text(json.dumps(measurements))
    measurements |= _drafts(earlier, llm, base, rounds, quick)
    alone = get_workload("equal-1:prompt_len=40,output_len=4" if quick else "equal-1:prompt_len=3000,output_len=4")
    comparisons.append(compare(ours, alone.fit_vocabulary(llm.spec.vocab_size), rounds, baseline="m4"))
    report = BenchReport.create("m5_chunked_prefill", base, tuple(comparisons), measurements)
    report.print()
    print_tables(report)
    report.save(output_dir / "bench.json")
    unfinished.unlink()
    draw(report, output_dir)
    return report


def _frontier(ours: list[EngineContender], peers: list[Contender], rounds: int, quick: bool) -> dict[str, Any]:
    m5 = ours[-1].llm
    assert isinstance(m5, LLM)
    name = "mixed-2:stream_output=12,num_long=1,long_min=64,long_max=64,first=0.05" if quick else "mixed-8"
    workload = get_workload(name).fit_vocabulary(m5.spec.vocab_size)
    budgets = frontier.budgets(m5)[:2] if quick else frontier.budgets(m5)
    check = CostCheck()
    engine_of(m5).plugins.append(check)
    found = frontier.measure([ours[0], *budgets, *peers], budgets[0], workload, rounds)
    engine_of(m5).plugins.remove(check)
    frontier.Budget().apply(m5)
    return found | {"compared": frontier.compared(found), "cost": check.summary()}


def _waits(ours: list[EngineContender], base: dict[str, Any], rounds: int, quick: bool) -> dict[str, Any]:
    vocab_size = ours[0].llm.spec.vocab_size
    in_order = EngineContender("m5 fcfs", LLM(**base | {"policy": "fcfs"}), "chunks in the order of arrival")
    giant, shorts = (100, SHORTS[:1]) if quick else (GIANT, SHORTS)
    return {"short": waits.short_behind_long([ours[0], in_order, ours[1]], giant, shorts, rounds, vocab_size),
            "giant": waits.giant_among_streams(ours, giant, 2 if quick else 8, rounds, vocab_size,
                                               stream_output=12 if quick else 160)}


def _drafts(earlier: BaseLLM, plain: BaseLLM, base: dict[str, Any], rounds: int, quick: bool) -> dict[str, Any]:
    drafting: dict[str, BaseLLM] = {method: LLM(**base | {"speculative_method": method})
                                    for method in ("ngram", "suffix")}
    with TemporaryDirectory() as folder:                # of a draft model: read whole when its engine is made
        model = str(base.get("model", DEFAULT_MODEL))
        kinds = ["story"] if quick else list(TASKS)
        train_draft(Path(folder), model, num_prompts=1 if quick else 24, output_len=8 if quick else 96, kinds=kinds,
                    max_model_len=512 if quick else 1024)
        drafting["draft_model"] = LLM(**base | {"speculative_method": "draft_model", "speculative_model": folder})
    contenders = {draft_table.BASELINE: plain, **drafting}
    sizes = {1: 8, 2: 4} if quick else draft_table.SIZES
    table = draft_table.measure(contenders, kinds, sizes, rounds)
    output_len = 12 if quick else 2000
    small = {"max_model_len": 512 if quick else 2560}
    # Half of what four answers need in the end: who has no place waits in the host's memory.
    tight = small | {"block_size": 16, "num_blocks": 34 if quick else 260}
    thinking = {"m4": earlier, "m5": LLM(**base | small), "m5, half the cache": LLM(**base | tight),
                "m5, suffix": drafting["suffix"]}
    return {"drafts": table, "thoughts": long_thoughts.measure(thinking, output_len, min(rounds, 2), 2 if quick else 4)}
