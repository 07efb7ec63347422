"""F7.2: whatever runs beside a request, over packed weights its tokens and log-probabilities are those of it alone."""
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m0_basics.base_llm import BaseLLM
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.engine import engine_of
from m2_continuous_batching.policies import SchedulingParams
from m7_gptq import LLM

from .packed_models import PackedModel, pack_gptq

LONGEST = 72
OPTIONS: dict[str, Any] = {"max_model_len": LONGEST, "block_size": 4}
Job = tuple[list[int], SamplingParams, int | None]


@st.composite
def workloads(draw: st.DrawFn) -> list[Job]:
    """Requests whose prompts begin alike; the last number: abort after so many steps."""
    jobs: list[Job] = []
    for _ in range(draw(st.integers(1, 5))):
        text = [*range(20, 20 + draw(st.integers(0, 20))),
                *draw(st.lists(st.integers(20, 24), min_size=1, max_size=12))]
        n = draw(st.sampled_from([1, 1, 2]))
        jobs.append((text, SamplingParams(
            n=n, temperature=draw(st.sampled_from([0.0, 0.8])) if n == 1 else 0.9, seed=draw(st.integers(0, 5)),
            max_tokens=draw(st.integers(1, 12)), logprobs=draw(st.sampled_from([None, 1])), ignore_eos=True,
            prompt_logprobs=draw(st.sampled_from([None, None, 1]))), draw(st.none() | st.integers(0, 6))))
    return jobs


def run(llm: BaseLLM, jobs: list[Job]) -> list[Any]:
    """What each request returned that was not aborted."""
    engine = engine_of(llm)
    requests = [llm.input_processor.process({"prompt_token_ids": text}, params) for text, params, _ in jobs]
    for i, request in enumerate(requests):
        engine.add_request(request, SchedulingParams(priority=-i))
    results: dict[str, Any] = {}
    for step in range(2000):
        if not engine.has_unfinished_requests():
            break
        for request, (*_, abort_at) in zip(requests, jobs, strict=True):
            if abort_at == step:
                engine.abort_request(request.request_id)
        results |= {o.request_id: (o.prompt_logprobs, [(c.token_ids, c.logprobs, c.finish_reason) for c in o.outputs])
                    for o in engine.step() if o.finished}
    assert not engine.has_unfinished_requests()
    return [results[r.request_id] for r, (*_, abort_at) in zip(requests, jobs, strict=True) if abort_at is None]


@pytest.fixture(scope="module")
def model(tiny_model: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return pack_gptq(tmp_path_factory.mktemp("packed") / "m", tiny_model("qwen3"), desc_act=True)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "activations"), [("float32", "exact"), ("bfloat16", "int8"), ("bfloat16", "exact")])
def test_nothing_beside_a_request_changes_it(model: PackedModel, dtype: str, activations: str) -> None:
    base = OPTIONS | {"dtype": dtype, "activations": activations}
    alone = LLM(str(model.packed), num_blocks=512, enable_prefix_caching=False, **base)

    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(jobs=workloads(), budget=st.none() | st.integers(1, 30), num_blocks=st.integers(LONGEST // 4, 48),
           swap_space=st.sampled_from([0, 0.01]), index=st.sampled_from(["radix", "hash"]),
           method=st.sampled_from(["none", "suffix"]), ahead=st.booleans(),
           policy=st.sampled_from(["longest-match", "priority", "round-robin:3"]), max_num_seqs=st.integers(2, 6))
    def check(jobs: list[Job], budget: int | None, num_blocks: int, swap_space: float, index: str, method: str,
              ahead: bool, policy: str, max_num_seqs: int) -> None:
        llm = LLM(str(model.packed), max_num_batched_tokens=budget, num_blocks=num_blocks, swap_space=swap_space,
                  prefix_index=index, speculative_method=method, adaptive_drafts=method == "none", policy=policy,
                  async_scheduling=ahead and method == "none", max_num_seqs=max_num_seqs, **base)
        expected = [run(alone, [(text, params, None)])[0] for text, params, abort_at in jobs if abort_at is None]
        for _ in range(2):
            assert run(llm, jobs) == expected
            assert llm.manager.usage == 0

    check()
