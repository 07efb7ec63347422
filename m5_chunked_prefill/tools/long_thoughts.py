"""FX.4: long chains of thought. A short question each, a few thousand tokens of answer, drawn at a temperature.

What a long output changes: most steps only decode, the cache grows until it is full, and what is said repeats itself.
"""
from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from m0_basics.base_llm import BaseLLM
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.bench.contender import BenchError
from m2_continuous_batching.engine import engine_of
from m2_continuous_batching.plugins.base import SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Scheduler

from .draft_table import serve, stats_of

QUESTIONS = ("How many squares are there on a chessboard? Think step by step, at length.",
             "A train leaves at 8:00 and another at 9:30. When do they meet? Discuss every case.",
             "Is 9,973 a prime number? Check it carefully, step by step.",
             "Plan a week of meals for four people and give reasons for each choice.")


class _PreemptionCount(SchedulerPlugin):
    def __init__(self) -> None:
        self.num_preempted = 0

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self.num_preempted += stats.num_preempted


def measure(contenders: Mapping[str, BaseLLM], output_len: int, rounds: int, num_questions: int) -> dict[str, Any]:
    """By contender: tokens per second, the median time of a token in the first and last tenth, who was sent back.

    Raises BenchError where the contenders' answers are not the same, token for token.
    """
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for llm in contenders.values():
        _run(llm, 8, -1, num_questions)                 # warms up
    for number in range(rounds):
        answers = []
        for name, llm in contenders.items():
            numbers, tokens = _run(llm, output_len, number, num_questions)
            runs[name].append(numbers)
            answers.append(tokens)
        if any(tokens != answers[0] for tokens in answers):
            raise BenchError("long thoughts: answers differ")
    return {name: {key: median(r[key] for r in own) for key in own[0]} for name, own in runs.items()}


def _run(llm: BaseLLM, output_len: int, seed: int, num_questions: int) -> tuple[dict[str, float], list[list[int]]]:
    engine, tokenizer, process = engine_of(llm), llm.get_tokenizer(), llm.input_processor.process
    stats = stats_of(llm)
    before = (stats.num_draft_tokens, stats.num_accepted_tokens) if stats else (0, 0)
    requests = []
    for i, question in enumerate(QUESTIONS[:num_questions]):
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}])
        ids = tokenizer.encode(text, add_special_tokens=False)
        params = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=output_len, ignore_eos=True,
                                seed=10 * (seed + 1) + i)
        requests.append(process({"prompt_token_ids": ids}, params))
    counter = _PreemptionCount()
    engine.plugins.append(counter)
    seconds = serve(llm, requests)
    engine.plugins.remove(counter)
    times = [r.metrics.token_times for r in requests]
    tenth = max(2, output_len // 10)
    drafted = stats.num_draft_tokens - before[0] if stats else 0
    return {"tokens_per_s": num_questions * output_len / seconds, "preemptions": counter.num_preempted,
            "first_tenth_ms": median(1e3 * (t[tenth - 1] - t[0]) / (tenth - 1) for t in times),
            "last_tenth_ms": median(1e3 * (t[-1] - t[-tenth]) / (tenth - 1) for t in times),
            "acceptance": (stats.num_accepted_tokens - before[1]) / drafted if stats and drafted else 0.0,
            }, [list(r.sequences[0].output_token_ids) for r in requests]
