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
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.bench.contender import BenchError
from m0_basics.tools.bench.figures import grouped_bars
from m2_continuous_batching.engine import engine_of

from ..llm import LLM
from ..speculation_stats import SpeculationStats
from .copy_tasks import prompts

BASELINE = "none"
SIZES = {1: 128, 8: 64, 64: 24}                 # requests at once: output tokens of each
LARGE_TASKS = ("quote", "story")                # at the largest batch: the best and the worst case


def measure(contenders: Mapping[str, BaseLLM], tasks: Sequence[str], sizes: Mapping[int, int],
            rounds: int) -> list[Any]:
    """An entry for each task and size: by contender, tokens per second, the ratio to BASELINE, guesses and their share.

    Greedy. Raises BenchError where an answer is not BASELINE's, token for token.
    """
    entries = []
    for size, output_len in sizes.items():
        for task in tasks if size < max(SIZES) else [t for t in tasks if t in LARGE_TASKS]:
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
            for number in range(-1, rounds):                    # round -1 warms up
                texts = prompts(task, size, seed=100 * size + number)
                seen: dict[str, list[list[int]]] = {}
                for name, llm in contenders.items():
                    outputs, numbers = _run(llm, texts, output_len if number >= 0 else 8)
                    seen[name] = outputs
                    if number >= 0:
                        runs[name].append(numbers)
                if any(outputs != seen[BASELINE] for outputs in seen.values()):
                    raise BenchError(f"{task}, {size} at once: answers differ from those without drafts")
            entries.append({"task": task, "num_requests": size, "output_len": output_len,
                            "contenders": {name: _summary(own, runs[BASELINE]) for name, own in runs.items()}})
    return entries


def _run(llm: BaseLLM, texts: Sequence[str], output_len: int) -> tuple[list[list[int]], dict[str, float]]:
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    tokenizer = llm.get_tokenizer()
    chats = [{"prompt_token_ids": tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": text}]),
                                                   add_special_tokens=False)} for text in texts]
    stats = stats_of(llm)
    before = (stats.num_draft_tokens, stats.num_accepted_tokens) if stats else (0, 0)
    start = time.perf_counter()
    outputs = llm.generate(chats, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    return tokens, {"tokens_per_s": sum(map(len, tokens)) / seconds,
                    "drafted": stats.num_draft_tokens - before[0] if stats else 0,
                    "accepted": stats.num_accepted_tokens - before[1] if stats else 0}


def _summary(own: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(own, base, strict=True)]
    drafted = sum(r["drafted"] for r in own)
    return {"tokens_per_s": median(r["tokens_per_s"] for r in own), "ratio": median(ratios), "ratios": ratios,
            "drafted": drafted, "acceptance": sum(r["accepted"] for r in own) / drafted if drafted else None}


def stats_of(llm: BaseLLM) -> SpeculationStats | None:
    """The counters of an engine that drafts."""
    if not isinstance(llm, LLM):
        return None
    return next((p for p in engine_of(llm).plugins if isinstance(p, SpeculationStats)), None)


def draw(entries: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """One request: tokens per second over those without drafts, by task and drafter."""
    single = [e for e in entries if e["num_requests"] == 1]
    groups = {e["task"]: {name: c["ratio"] for name, c in e["contenders"].items() if name != BASELINE} for e in single}
    return grouped_bars(groups, path, title="One request: times the tokens per second without drafts", ylabel="times",
                        line=1.0)
