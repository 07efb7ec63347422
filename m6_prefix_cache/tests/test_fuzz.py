"""F6.1, F6.3, F6.4: tokens are m5's, bit for bit, whatever was computed before: conversations, edits, eviction."""
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import m5_chunked_prefill as m5
from m0_basics.base_llm import BaseLLM
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.engine import engine_of
from m2_continuous_batching.policies import SchedulingParams
from m6_prefix_cache import LLM
from m6_prefix_cache.disk_tier import DiskTier

LONGEST = 72
OPTIONS: dict[str, Any] = {"max_model_len": LONGEST, "block_size": 4}
Job = tuple[list[int], SamplingParams, str, int | None]


@st.composite
def conversations(draw: st.DrawFn) -> list[list[Job]]:
    """Rounds of requests; prompts go on from earlier ones, or from an edited one. The last number: abort after it."""
    texts = [draw(st.lists(st.integers(20, 24), min_size=1, max_size=24))]
    rounds = []
    for _ in range(draw(st.integers(1, 4))):
        jobs: list[Job] = []
        for _ in range(draw(st.integers(1, 4))):
            text = list(draw(st.sampled_from(texts)))
            if draw(st.booleans()):
                text = text[:draw(st.integers(0, len(text)))]
            text += draw(st.lists(st.integers(20, 24), min_size=1, max_size=12))
            text = text[:LONGEST - 12]
            texts.append(text)
            n = draw(st.sampled_from([1, 1, 1, 2]))
            params = SamplingParams(
                n=n, temperature=draw(st.sampled_from([0.0, 0.8])) if n == 1 else 0.9, seed=draw(st.integers(0, 5)),
                max_tokens=draw(st.integers(1, 12)), logprobs=draw(st.sampled_from([None, 1])), ignore_eos=True,
                prompt_logprobs=draw(st.sampled_from([None, None, 1])))
            jobs.append((text, params, draw(st.sampled_from(["", "", "x"])), draw(st.none() | st.integers(0, 6))))
        rounds.append(jobs)
    return rounds


def run(llm: BaseLLM, jobs: list[Job]) -> list[Any]:
    """What each request returned that was not aborted."""
    engine, process = engine_of(llm), llm.input_processor.process
    requests = [process({"prompt_token_ids": text, **({"cache_salt": salt} if salt else {})}, params)
                for text, params, salt, _ in jobs]
    for i, request in enumerate(requests):
        engine.add_request(request, SchedulingParams(priority=-i))      # later ones may displace earlier ones
    results: dict[str, Any] = {}
    step = 0
    while engine.has_unfinished_requests():
        for request, (*_, abort_at) in zip(requests, jobs, strict=True):
            if abort_at == step:
                engine.abort_request(request.request_id)
        for output in engine.step():
            if output.finished:
                results[output.request_id] = (output.prompt_logprobs, [
                    (c.token_ids, c.logprobs, c.cumulative_logprob, c.finish_reason) for c in output.outputs])
        step += 1
        assert step < 2000
    return [results[r.request_id] for r, (*_, abort_at) in zip(requests, jobs, strict=True) if abort_at is None]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_computed_before_changes_no_token(tiny_model: TinyModels, dtype: str,
                                                   tmp_path_factory: pytest.TempPathFactory) -> None:
    model = str(tiny_model("qwen3"))
    plain = m5.LLM(model, dtype=dtype, num_blocks=512, **OPTIONS)

    @settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(rounds=conversations(), budget=st.none() | st.integers(1, 30), num_blocks=st.integers(LONGEST // 4, 48),
           swap_space=st.sampled_from([0, 0.01]), index=st.sampled_from(["radix", "hash"]),
           max_cached=st.none() | st.integers(0, 8), method=st.sampled_from(["none", "suffix"]),
           ahead=st.booleans(), policy=st.sampled_from(["longest-match", "priority", "fcfs", "round-robin:3"]),
           max_num_seqs=st.integers(2, 6), on_disk=st.booleans())
    def check(rounds: list[list[Job]], budget: int | None, num_blocks: int, swap_space: float, index: str,
              max_cached: int | None, method: str, ahead: bool, policy: str, max_num_seqs: int, on_disk: bool) -> None:
        options = {"dtype": dtype, "max_num_batched_tokens": budget, "num_blocks": num_blocks, "swap_space": swap_space,
                   "prefix_index": index, "max_cached_blocks": max_cached, "speculative_method": method,
                   "max_num_seqs": max_num_seqs, "async_scheduling": ahead and method == "none", "policy": policy,
                   "adaptive_drafts": method == "none", **OPTIONS}
        if on_disk and swap_space:
            options["prefix_cache_dir"] = str(tmp_path_factory.mktemp("blocks"))
        llm = LLM(model, **options)
        for jobs in rounds:
            assert run(llm, jobs) == run(plain, jobs)
            assert llm.manager.usage == 0
            assert llm.manager.pool.num_free == num_blocks
            if "prefix_cache_dir" in options:               # it ends, and comes back
                assert isinstance(llm.manager.below, DiskTier)
                llm.manager.below.flush()
                llm = LLM(model, **options)
                assert isinstance(llm.manager.below, DiskTier)
                llm.manager.below.seconds_to_read = -1.0    # always quicker than computing

    check()
