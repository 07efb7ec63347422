"""Where the time of a decode step goes: the parts of `LLMEngine.step`, called one by one and timed."""
from __future__ import annotations

import time
from statistics import median
from typing import Any

from m0_basics.sampling_params import SamplingParams

from .engine import LLMEngine
from .llm import LLM

_WARM_UP = 4            # steps that are run and not counted


def step_costs(llm: LLM, num_sequences: int, steps: int = 24, prompt_len: int = 64) -> dict[str, Any]:
    """Medians over decode steps of `num_sequences` greedy sequences, in seconds, and the shares of a step.

    `prepare` is packing the inputs and building the attention's metadata, `model` everything from embedding to
    sampled tokens, `conclude` detokenising, stop conditions and outputs.
    """
    engine = llm.engine
    assert isinstance(engine, LLMEngine)
    params = SamplingParams(temperature=0, max_tokens=steps + _WARM_UP + 2, ignore_eos=True)
    prompt = [i % llm.spec.vocab_size for i in range(100, 100 + prompt_len)]
    requests = [llm.input_processor.process({"prompt_token_ids": prompt}, params) for _ in range(num_sequences)]
    for request in requests:
        engine.add_request(request)
    while any(not request.sequences[0].output_token_ids for request in requests):
        engine.step()
    costs = [_timed_step(engine) for _ in range(_WARM_UP + steps)][_WARM_UP:]
    for request in requests:
        engine.abort_request(request.request_id)
    parts = {name: median(c[name] for c in costs) for name in costs[0]}
    total = median(sum(c.values()) for c in costs)
    shares = {f"{name}_share": median(c[name] / sum(c.values()) for c in costs) for name in costs[0]}
    return {"num_sequences": num_sequences, "step_s": total, **{f"{n}_s": s for n, s in parts.items()}, **shares}


def _timed_step(engine: LLMEngine) -> dict[str, float]:
    """`LLMEngine.step`, taken apart."""
    marks = [time.perf_counter()]
    output = engine.scheduler.schedule()
    marks.append(time.perf_counter())
    engine.copy_slots(output.copies)
    inputs = engine.runner.prepare_inputs(output.scheduled)
    marks.append(time.perf_counter())
    sampled = engine._run(inputs)
    marks.append(time.perf_counter())
    engine.scheduler.update_from_output(output)
    engine._hand_out(engine._conclude(engine._record(sampled, []), []), [])
    marks.append(time.perf_counter())
    names = ("schedule", "prepare", "model", "conclude")
    return {name: end - start for name, start, end in zip(names, marks, marks[1:], strict=False)}
