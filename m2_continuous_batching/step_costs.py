"""Where the time of a decode step goes: an engine that reads the clock between the parts of its step."""
from __future__ import annotations

import time
from itertools import pairwise
from statistics import median
from typing import Any

from m0_basics.attention import ScheduledSequence
from m0_basics.sampling_params import SamplingParams

from .continuous_llm import ContinuousLLM
from .engine import Batch, LLMEngine, Sampled

_WARM_UP = 4            # steps that are run and not counted
_PARTS = ("schedule", "prepare", "model", "conclude")


class TimedEngine(LLMEngine):
    """`LLMEngine`, and when each part of a step began: the step itself is not written a second time."""

    marks: list[float]

    def timed_step(self) -> dict[str, float]:
        """Run a step; return the seconds that each part took."""
        self.marks = [time.perf_counter()]
        self.step()
        self.marks.append(time.perf_counter())
        return {part: end - start for part, (start, end) in zip(_PARTS, pairwise(self.marks), strict=True)}

    def _prepare(self, scheduled: list[ScheduledSequence]) -> Batch:
        self.marks.append(time.perf_counter())
        return super()._prepare(scheduled)

    def _run(self, batch: Batch) -> list[Sampled]:
        self.marks.append(time.perf_counter())
        sampled = super()._run(batch)
        self.marks.append(time.perf_counter())
        return sampled


def step_costs(llm: ContinuousLLM, num_sequences: int, steps: int = 24, prompt_len: int = 64) -> dict[str, Any]:
    """Medians over decode steps of `num_sequences` greedy sequences, in seconds, and the shares of a step.

    `prepare` is packing the inputs and building the attention's metadata, `model` everything from embedding to
    sampled tokens, `conclude` detokenising, stop conditions and outputs.
    """
    parts = llm.engine
    engine = TimedEngine(parts.scheduler, parts.runner, parts.sampler, parts.output_processor, parts.copy_slots)
    params = SamplingParams(temperature=0, max_tokens=steps + _WARM_UP + 2, ignore_eos=True)
    prompt = [i % llm.spec.vocab_size for i in range(100, 100 + prompt_len)]
    requests = [llm.input_processor.process({"prompt_token_ids": prompt}, params) for _ in range(num_sequences)]
    for request in requests:
        engine.add_request(request)
    while any(not request.sequences[0].output_token_ids for request in requests):
        engine.timed_step()
    costs = [engine.timed_step() for _ in range(_WARM_UP + steps)][_WARM_UP:]
    for request in requests:
        engine.abort_request(request.request_id)
    return {"num_sequences": num_sequences, "step_s": median(sum(c.values()) for c in costs),
            **{f"{part}_s": median(c[part] for c in costs) for part in _PARTS},
            **{f"{part}_share": median(c[part] / sum(c.values()) for c in costs) for part in _PARTS}}
