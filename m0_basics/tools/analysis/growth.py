"""What the next token costs as the sequence grows: time and FLOPs, measured on any milestone's engine."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from m0_basics.base_llm import BaseLLM
from m0_basics.request import Request
from m0_basics.sampling_params import SamplingParams

from ..progress import Progress
from .flop_count import count_flops


def growth(llm: BaseLLM, lengths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """For each length: seconds and FLOPs of the step that computes the token after so many.

    The first step of a request runs the prompt, with a cache or without one; the step measured is the second.
    """
    points = []
    with Progress("the next token's cost", len(lengths)) as progress:
        for length in lengths:
            progress.now(f"after {length} tokens")
            seconds = [_second_step(llm, length, _timed) for _ in range(rounds)]
            flops = _second_step(llm, length, count_flops)
            points.append({"length": length, "seconds": median(seconds), "flops": int(flops), "rounds": seconds})
            progress.step()
    return points


def _second_step(llm: BaseLLM, length: int, measure: Callable[[Callable[[], object]], float]) -> float:
    """Run a prompt of `length - 1` tokens, then measure the step on `length` tokens."""
    token_ids = [i % llm.spec.vocab_size for i in range(length - 1)]
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    request: Request = llm.input_processor.process({"prompt_token_ids": token_ids}, params)
    llm.engine.add_request(request)
    try:
        llm.engine.step()
        return float(measure(llm.engine.step))
    finally:
        llm.engine.abort_request(request.request_id)


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
