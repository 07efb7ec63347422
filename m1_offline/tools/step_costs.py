"""Where the time of a decode step goes: building metadata, running the model, sampling."""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from m0_basics.attention import ScheduledSequence
from m0_basics.request import Request, Sequence, SequenceStatus, next_seq_id
from m0_basics.sampling_params import SamplingParams

from ..engine import OfflineEngine
from ..llm import LLM

SAMPLING: Mapping[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.8),
    "top-k and top-p": SamplingParams(temperature=0.8, top_k=50, top_p=0.95),
}


@dataclass(frozen=True)
class StepCosts:
    """Medians over decode steps, in seconds. `overhead` is the share of a step that is not the model."""

    sampling: str
    num_sequences: int
    metadata_s: float
    sample_s: float
    step_s: float
    overhead: float


def step_costs(llm: LLM, sampling: str, num_sequences: int, prompt_len: int = 64, steps: int = 12) -> StepCosts:
    """Decode `num_sequences` sequences side by side, greedy or sampling, and time the parts of each step.

    `llm` needs that many rows. The sequences are copies of one prompt: the cost of a step does not depend on
    what the tokens are.
    """
    engine = llm.engine
    assert isinstance(engine, OfflineEngine)
    sequences = _start(llm, engine, SAMPLING[sampling], num_sequences, prompt_len)
    metadata, sample, whole = list[float](), list[float](), list[float]()
    try:
        for _ in range(steps):
            scheduled = [ScheduledSequence.rest(s) for s in sequences]
            build_s, _ = timed(lambda batch=scheduled: engine.runner.backend.build_metadata(batch))  # type: ignore[misc]
            run_s, logits = timed(lambda batch=scheduled: engine.runner.execute_model(batch))  # type: ignore[misc]
            sample_s, sampled = timed(lambda x=logits: engine.sampler(x, sequences))  # type: ignore[misc]
            for sequence, token_id in zip(sequences, sampled.token_ids, strict=True):
                sequence.num_computed_tokens += 1
                sequence.append_token_id(token_id)
            metadata.append(build_s)
            sample.append(sample_s)
            whole.append(run_s + sample_s)          # execute_model has built the metadata once more, inside
    finally:
        for sequence in sequences:
            engine.rows.free(sequence)
    overhead = median((m + s) / w for m, s, w in zip(metadata[2:], sample[2:], whole[2:], strict=True))
    return StepCosts(sampling, num_sequences, median(metadata[2:]), median(sample[2:]), median(whole[2:]), overhead)


def _start(llm: LLM, engine: OfflineEngine, params: SamplingParams, count: int, prompt_len: int) -> list[Sequence]:
    """One prompt run once, copied `count` times, each copy ready to run its first output token."""
    request = Request("step-costs", None, [i % llm.spec.vocab_size for i in range(100, 100 + prompt_len)], params)
    first = request.sequences[0]
    engine.rows.allocate(first)
    first.set_status(SequenceStatus.RUNNING)
    engine.runner.execute_model([ScheduledSequence.rest(first)])
    first.num_computed_tokens = first.num_tokens
    sequences = [first]
    for index in range(1, count):
        sequences.append(first.fork(next_seq_id(), index))
        engine.rows.fork(first, sequences[-1])
    for sequence in sequences:
        sequence.append_token_id(100 + sequence.index)
    return sequences


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, a GPU's work included, and what it returns."""
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()        # a GPU works on after the call has returned
    return time.perf_counter() - start, result


def measure(llm: LLM, num_sequences: int, rounds: int) -> list[dict[str, Any]]:
    """The median round of each kind of sampling, as plain values for JSON; rounds alternate."""
    runs: dict[str, list[StepCosts]] = {name: [] for name in SAMPLING}
    for _ in range(rounds):
        for name in SAMPLING:
            runs[name].append(step_costs(llm, name, num_sequences))
    return [asdict(sorted(costs, key=lambda c: c.overhead)[len(costs) // 2]) for costs in runs.values()]
