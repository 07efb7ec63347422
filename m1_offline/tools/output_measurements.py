"""What the ways of decoding give on the default model: beams, best-of-n, and greedy against another engine.

`python -m m1_offline facts --measure search` runs one group and stores it. Seeds are fixed, so that only another
machine's rounding changes what is counted.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from m0_basics.outputs import CompletionOutput
from m0_basics.sampling_params import BeamSearchParams, SamplingParams
from m0_basics.tools.divergence import compare_with_transformers
from m0_basics.tools.documents.factbook import Fact

from ..llm import LLM
from .measurements import PROMPTS

_QUESTIONS = ("What is the capital of France?", "Why is the sky blue?", "Name a fruit.", "Who wrote Hamlet?",
              "What is a prime number?", "How do birds fly?", "What is the largest ocean?", "Give me a short proverb.")


def search(tokens: int = 128, width: int = 4, rounds: int = 1) -> dict[str, Fact]:
    """Beam search against greedy and sampled continuations: probability, repetition, time."""
    llm = LLM(max_model_len=1024)
    prompts = [p for p in PROMPTS if p.isascii()]
    greedily = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    randomly = SamplingParams(top_p=0.95, seed=0, max_tokens=tokens, ignore_eos=True, logprobs=0)
    widely = BeamSearchParams(width, tokens, ignore_eos=True)
    slower = []
    for _ in range(rounds):
        greedy, beams = [], []
        for prompt in prompts:          # in turns, so that a disturbance hits both
            start = time.perf_counter()
            greedy += llm.generate(prompt, greedily, use_tqdm=False)
            middle = time.perf_counter()
            beams.append(llm.beam_search([prompt], widely)[0].sequences[0])
            slower.append((time.perf_counter() - middle) / (middle - start))
    texts = {
        "greedy": [o.outputs[0].token_ids for o in greedy],
        "beam": [b.tokens[len(o.prompt_token_ids):] for b, o in zip(beams, greedy, strict=True)],
        "sampled": [o.outputs[0].token_ids for o in llm.generate(prompts, randomly, use_tqdm=False)],
    }
    gains = [b.cum_logprob - (o.outputs[0].cumulative_logprob or 0.0) for b, o in zip(beams, greedy, strict=True)]
    facts = {f"search.distinct4.{name}": Fact(statistics.mean(map(distinct, ids)), "ratio")
             for name, ids in texts.items()}
    return facts | {
        "search.prompts": Fact(len(prompts)),
        "search.tokens": Fact(tokens),
        "search.beam_width": Fact(width),
        "search.beam_better": Fact(sum(gain > 1e-3 for gain in gains)),
        "search.beam_worse": Fact(sum(gain < -1e-3 for gain in gains)),
        "search.beam_gain": Fact(statistics.mean(gains), "nats"),
        "search.beam_seconds_over_greedy": Fact(statistics.median(slower), "ratio"),
    }


def distinct(token_ids: list[int], n: int = 4) -> float:
    """Share of the n-grams that are different from each other: 1 without repetition, near 0 in a loop."""
    grams = [tuple(token_ids[i:i + n]) for i in range(len(token_ids) - n + 1)]
    return len(set(grams)) / len(grams)


def best_of() -> dict[str, Fact]:
    """Which of eight answers the total log-probability prefers, and which one its mean per token prefers."""
    llm = LLM(max_model_len=1024)
    params = SamplingParams(n=8, seed=0, max_tokens=192, logprobs=0)
    answers = [llm.chat([{"role": "user", "content": q}], params, use_tqdm=False)[0].outputs for q in _QUESTIONS]

    def winner(key: Callable[[CompletionOutput], float]) -> float:
        return statistics.mean(len(max(outputs, key=key).token_ids) for outputs in answers)

    return {
        "best_of.questions": Fact(len(answers)),
        "best_of.outputs": Fact(8),
        "best_of.tokens.mean": Fact(statistics.mean(len(o.token_ids) for outputs in answers for o in outputs)),
        "best_of.tokens.by_sum": Fact(winner(lambda o: o.cumulative_logprob or 0.0)),
        "best_of.tokens.by_mean": Fact(winner(lambda o: (o.cumulative_logprob or 0.0) / len(o.token_ids))),
    }


def divergence(tokens: int = 100) -> dict[str, Fact]:
    """Greedy outputs of this engine and of transformers, in both precisions: how many part, and how close it was.

    How many part in 16 bits depends on the order of sums, so on the processor, on the number of threads and on torch.
    """
    facts: dict[str, Fact] = {"divergence.prompts": Fact(len(PROMPTS)), "divergence.tokens": Fact(tokens)}
    for dtype in ("bfloat16", "float32"):
        llm = LLM(dtype=dtype, max_model_len=1024)
        found = [d for d in compare_with_transformers(llm, PROMPTS, tokens) if d]
        facts |= {f"divergence.{dtype}.differing": Fact(len(found)),
                  f"divergence.{dtype}.within_resolution": Fact(sum(d.within_resolution for d in found))}
        if found:
            first = min(found, key=lambda d: d.step)
            facts |= {f"divergence.{dtype}.first_step": Fact(first.step),
                      f"divergence.{dtype}.largest_gap_ulp": Fact(
                          max(max(abs(d.gap_a), abs(d.gap_b)) / d.ulp for d in found))}
    return facts


GROUPS: dict[str, Callable[[], Mapping[str, Fact]]] = {
    "search": search, "best_of": best_of, "divergence": divergence,
}
