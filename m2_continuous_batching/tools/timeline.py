"""Who runs when: one row per step of a real run, for the pictures of utilisation.

Works on any engine that is driven step by step: after each step it counts the sequences that got a token in it.
"""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from m0_basics.base_llm import BaseLLM
from m0_basics.request import Request
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.bench import Workload, style

PROMPTS = "#f0b98a"              # the colour of a step that ran prompts


@dataclass(frozen=True)
class StepSpan:
    """One step: when it ended (seconds after the start), how many sequences got a token, and for how many of them it
    was the first, at the end of their prompt."""

    end_s: float
    num_tokens: int
    num_first: int = 0


def record_timeline(llm: BaseLLM, workload: Workload) -> list[StepSpan]:
    """Run all requests of the workload at once, greedy and to their full length."""
    requests: list[Request] = []
    for r in workload.requests:
        params = SamplingParams(temperature=0, max_tokens=r.output_len, ignore_eos=True)
        requests.append(llm.input_processor.process({"prompt_token_ids": list(r.prompt_token_ids)}, params))
        llm.engine.add_request(requests[-1])
    rows: list[StepSpan] = []
    done, begun, start = 0, 0, time.perf_counter()
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
        lengths = [len(r.sequences[0].output_token_ids) for r in requests]
        total, now = sum(lengths), sum(length > 0 for length in lengths)
        rows.append(StepSpan(time.perf_counter() - start, total - done, now - begun))
        done, begun = total, now
    return rows


def as_rows(spans: Sequence[StepSpan]) -> list[list[float]]:
    """Plain numbers for JSON: [end_s, num_tokens, num_first] of each step."""
    return [[round(s.end_s, 4), s.num_tokens, s.num_first] for s in spans]


def mean_occupancy(rows: Sequence[StepSpan]) -> float:
    """Sequences that got a token per step, on average over time: a long step counts for longer."""
    spans = [row.end_s - before for before, row in zip([0.0, *(r.end_s for r in rows)], rows, strict=False)]
    return sum(span * row.num_tokens for span, row in zip(spans, rows, strict=True)) / rows[-1].end_s


def draw_timelines(timelines: Mapping[str, Sequence[StepSpan] | Sequence[Sequence[float]]], max_num_seqs: int,
                   path: Path) -> Path:
    """One panel per engine: sequences at work over time. Steps that ran prompts have a colour of their own, and are as
    high as the most that the engine ever ran at once; what is white was idle. The dashed line is `max_num_seqs`.

    Takes spans, or the rows that `as_rows` makes of them.
    """
    figure, panels = style.new_figure(width=8, height=1.9 * len(timelines), rows=len(timelines))
    panels = panels if len(timelines) > 1 else [panels]
    for axes, (name, rows) in zip(panels, timelines.items(), strict=True):
        spans = [row if isinstance(row, StepSpan) else StepSpan(row[0], int(row[1]), int(row[2])) for row in rows]
        most = max(span.num_tokens for span in spans)
        for (begin, end), span in zip(pairwise([0.0, *(s.end_s for s in spans)]), spans, strict=True):
            if span.num_first:                                  # all others wait meanwhile, so it takes the full height
                axes.fill_between([begin, end], 0, most, color=PROMPTS, linewidth=0)
            else:
                axes.fill_between([begin, end], 0, span.num_tokens, color=style.HERO, linewidth=0)
        axes.axhline(max_num_seqs, color=style.GREY, linewidth=0.8, linestyle="--")
        axes.set_ylim(0, max_num_seqs * 1.1)
        axes.set_ylabel("sequences")
        axes.annotate(f"limit: {max_num_seqs}", (1, max_num_seqs), xycoords=("axes fraction", "data"), xytext=(6, 0),
                      textcoords="offset points", va="center", fontsize=9, color=style.GREY)
        style.title(axes, f"{name}: at most {most} at once, done after {spans[-1].end_s:.1f} s", size=10, pad=6)
    panels[0].annotate("a token each", (1, 1.06), xycoords="axes fraction", ha="right", color=style.HERO, fontsize=9)
    panels[0].annotate("steps that run prompts", (0.86, 1.06), xycoords="axes fraction", ha="right",
                       color=style.CYCLE[1], fontsize=9)
    panels[-1].set_xlabel("seconds")
    return style.write(figure, path)
