"""Drafters against tasks and batch sizes: tokens per second over those without drafts, and how many guesses were right.

Contenders take turns on the same prompts; each round has prompts of its own, so that no drafter has seen the answer.
"""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from m0_basics.base_llm import BaseLLM
from m0_basics.request import Request
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.bench.contender import BenchError
from m0_basics.tools.bench.figures import grouped_bars
from m2_continuous_batching.engine import engine_of

from ..speculation_stats import SpeculationStats
from .copy_tasks import Task, tasks

BASELINE = "none"
NAMES = {"draft_model": "draft model"}
_TASKS = {"quote": "repeat notes", "code": "rewrite code", "json": "records as JSON", "story": "a story",
          "hostile": "a story,\nbehind bait"}
SIZES = {1: 256, 8: 96, 64: 48}                 # requests at once: output tokens of each, at most
LARGE_TASKS = ("quote", "story", "hostile")     # at the largest batch: the best case and the worst ones


def measure(contenders: Mapping[str, BaseLLM], kinds: Sequence[str], sizes: Mapping[int, int],
            rounds: int) -> list[Any]:
    """An entry for each task and size: by contender, tokens per second, the ratio to BASELINE, guesses and their share.

    Of the whole run, and (`decode_ratio`) of the time from a request's first token to its last, in which alone drafts
    can help. Greedy, up to the answers' ends. Raises BenchError where an answer is not BASELINE's, token for token.
    """
    entries = []
    for llm in contenders.values():
        _run(llm, tasks(kinds[0], 1, seed=0), 8)
    for size, output_len in sizes.items():
        for kind in kinds if size < max(SIZES) else [k for k in kinds if k in LARGE_TASKS]:
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
            for number in range(rounds):
                asked = tasks(kind, size, seed=100 * size + number)
                seen: dict[str, list[list[int]]] = {}
                for name, llm in contenders.items():
                    outputs, numbers = _run(llm, asked, output_len)
                    seen[name] = outputs
                    runs[name].append(numbers)
                if any(outputs != seen[BASELINE] for outputs in seen.values()):
                    raise BenchError(f"{kind}, {size} at once: answers differ from those without drafts")
            entries.append({"task": kind, "num_requests": size, "output_len": output_len,
                            "contenders": {name: _summary(own, runs[BASELINE]) for name, own in runs.items()}})
    return entries


def _run(llm: BaseLLM, asked: Sequence[Task], output_len: int) -> tuple[list[list[int]], dict[str, float]]:
    params = SamplingParams(temperature=0, max_tokens=output_len)
    tokenizer = llm.get_tokenizer()
    requests = [llm.input_processor.process({"prompt_token_ids": task.token_ids(tokenizer)}, params) for task in asked]
    stats = stats_of(llm)
    before = (stats.num_draft_tokens, stats.num_accepted_tokens) if stats else (0, 0)
    seconds = serve(llm, requests)
    tokens = [list(r.sequences[0].output_token_ids) for r in requests]
    times = [r.metrics.token_times for r in requests]
    return tokens, {"tokens_per_s": sum(map(len, tokens)) / seconds,
                    "token_ms": 1e3 * median((t[-1] - t[0]) / max(1, len(t) - 1) for t in times),
                    "drafted": stats.num_draft_tokens - before[0] if stats else 0,
                    "accepted": stats.num_accepted_tokens - before[1] if stats else 0}


def serve(llm: BaseLLM, requests: Sequence[Request]) -> float:
    """Run the requests, all of them at once, to their ends. Returns the seconds that it took."""
    engine = engine_of(llm)
    start = time.perf_counter()
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished_requests():
        engine.step()
    return time.perf_counter() - start


def _summary(own: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(own, base, strict=True)]
    drafted = sum(r["drafted"] for r in own)
    return {"tokens_per_s": median(r["tokens_per_s"] for r in own), "ratio": median(ratios), "ratios": ratios,
            "token_ms": median(r["token_ms"] for r in own),
            "decode_ratio": median(b["token_ms"] / max(a["token_ms"], 1e-9) for a, b in zip(own, base, strict=True)),
            "drafted": drafted, "acceptance": sum(r["accepted"] for r in own) / drafted if drafted else None}


def stats_of(llm: BaseLLM) -> SpeculationStats | None:
    """The counters of an engine that drafts."""
    return next((p for p in engine_of(llm).plugins if isinstance(p, SpeculationStats)), None)


def draw(entries: Sequence[Mapping[str, Any]], path: Path, names: Mapping[str, str] = NAMES) -> Path:
    """One request: tokens per second once the first is there, over those without drafts, by task and drafter.

    `names` are what drafters are called in the picture.
    """
    single = [e for e in entries if e["num_requests"] == 1]
    groups = {_TASKS[e["task"]]: {names.get(name, name): c["decode_ratio"] for name, c in e["contenders"].items()
                                  if name != BASELINE} for e in single}
    best = max(ratio for group in groups.values() for ratio in group.values())
    return grouped_bars(groups, path, title=f"One request: drafts make decoding up to {best:.2f} times as fast",
                        ylabel="times the tokens per second", line=1.0, line_name="no drafts")
