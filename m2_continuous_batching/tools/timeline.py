"""Who runs when: one row per step of a real run, for the pictures of utilisation.

Works on any engine that is driven step by step: after each step it counts the sequences that got a token in it.
"""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from m0_basics.base_llm import BaseLLM
from m0_basics.config import require
from m0_basics.request import Request
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.bench import Workload


@dataclass(frozen=True)
class StepSpan:
    """One step: when it ended (seconds after the start), and how many sequences got a token."""

    end_s: float
    num_tokens: int


def record_timeline(llm: BaseLLM, workload: Workload) -> list[StepSpan]:
    """Run all requests of the workload at once, greedy and to their full length."""
    requests: list[Request] = []
    for r in workload.requests:
        params = SamplingParams(temperature=0, max_tokens=r.output_len, ignore_eos=True)
        requests.append(llm.input_processor.process({"prompt_token_ids": list(r.prompt_token_ids)}, params))
        llm.engine.add_request(requests[-1])
    rows: list[StepSpan] = []
    done, start = 0, time.perf_counter()
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
        total = sum(len(r.sequences[0].output_token_ids) for r in requests)
        rows.append(StepSpan(time.perf_counter() - start, total - done))
        done = total
    return rows


def mean_occupancy(rows: Sequence[StepSpan]) -> float:
    """Sequences that got a token per step, on average over time: a long step counts for longer."""
    spans = [row.end_s - before for before, row in zip([0.0, *(r.end_s for r in rows)], rows, strict=False)]
    return sum(span * row.num_tokens for span, row in zip(spans, rows, strict=True)) / rows[-1].end_s


def draw_timelines(timelines: dict[str, Sequence[StepSpan]], max_num_seqs: int, path: Path) -> Path:
    """One panel per engine: sequences at work over time, filled; what is white was idle."""
    figure = require("matplotlib.figure", "a figure").Figure(figsize=(8, 1.9 * len(timelines)), layout="constrained")
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, rows) in zip(panels, timelines.items(), strict=True):
        ends = [0.0, *(row.end_s for row in rows)]
        for (begin, end), row in zip(pairwise(ends), rows, strict=True):
            axes.fill_between([begin, end], 0, row.num_tokens, color="#2f6f9f", linewidth=0)
        axes.axhline(max_num_seqs, color="#9aa5b1", linewidth=0.8, linestyle="--")
        axes.set_ylim(0, max_num_seqs * 1.1)
        axes.set_ylabel("sequences")
        busy = mean_occupancy(rows) / max_num_seqs
        axes.set_title(f"{name}: {rows[-1].end_s:.1f} s, {busy:.0%} of {max_num_seqs} rows at work", loc="left",
                       fontsize=10)
    panels[-1].set_xlabel("seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path
