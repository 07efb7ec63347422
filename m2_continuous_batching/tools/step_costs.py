"""Where the time of a decode step goes: an engine that reads the clock between the parts of its step."""
from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

from torch import Tensor

from m0_basics.attention import AttentionBackend, AttentionMetadata, ScheduledSequence
from m0_basics.base_llm import BaseLLM
from m0_basics.model_runner import ModelRunner
from m0_basics.sampling_params import SamplingParams

from ..engine import Batch, LLMEngine, engine_of
from ..scheduler import Sampled

_WARM_UP = 4            # steps that are run and not counted
_PARTS = ("schedule", "prepare", "model", "conclude")


class TimedMetadata(AttentionBackend):
    """A backend, and how long it took to build the metadata of the last step."""

    def __init__(self, backend: AttentionBackend) -> None:
        self.backend = backend
        self.seconds = 0.0

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> AttentionMetadata:
        start = time.perf_counter()
        metadata = self.backend.build_metadata(scheduled)
        self.seconds = time.perf_counter() - start
        return metadata

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        return self.backend.forward(layer_idx, q, k, v, metadata)


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


def step_costs(llm: BaseLLM, num_sequences: int, steps: int = 24, prompt_len: int = 64) -> dict[str, Any]:
    """Medians over decode steps of `num_sequences` greedy sequences, in seconds, and the shares of a step.

    `prepare` is packing the inputs and building the attention's metadata, `model` everything from embedding to
    sampled tokens, `conclude` detokenising, stop conditions and outputs. `metadata` is a part of `prepare`.
    """
    parts = engine_of(llm)
    backend = TimedMetadata(parts.runner.backend)
    runner = ModelRunner(parts.runner.model, backend)
    engine = TimedEngine(parts.scheduler, runner, parts.sampler, parts.output_processor, parts.copy_slots)
    costs = decode_steps(llm, engine, lambda: engine.timed_step() | {"metadata": backend.seconds}, num_sequences, steps,
                         prompt_len)
    totals = [sum(cost[part] for part in _PARTS) for cost in costs]
    return {"num_sequences": num_sequences, "prompt_len": prompt_len, "step_s": median(totals),
            **{f"{part}_s": median(cost[part] for cost in costs) for part in costs[0]},
            **{f"{part}_share": median(cost[part] / total for cost, total in zip(costs, totals, strict=True))
               for part in costs[0]}}


def decode_steps(llm: BaseLLM, engine: LLMEngine, timed_step: Callable[[], dict[str, float]], num_sequences: int,
                 steps: int, prompt_len: int) -> list[dict[str, float]]:
    """What `timed_step`, which runs a step of `engine`, returns for decode steps of greedy sequences side by side."""
    params = SamplingParams(temperature=0, max_tokens=steps + _WARM_UP + 2, ignore_eos=True)
    prompt = [i % llm.spec.vocab_size for i in range(100, 100 + prompt_len)]
    requests = [llm.input_processor.process({"prompt_token_ids": prompt}, params) for _ in range(num_sequences)]
    for request in requests:
        engine.add_request(request)
    while any(not request.sequences[0].output_token_ids for request in requests):
        timed_step()
    costs = [timed_step() for _ in range(_WARM_UP + steps)][_WARM_UP:]
    for request in requests:
        engine.abort_request(request.request_id)
    return costs
