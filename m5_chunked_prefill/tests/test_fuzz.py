"""F5.2, F5.4, F5.6: tokens do not depend on chunks, guesses, memory or neighbours: bit for bit, in both types."""
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import m4_flash_attn as m4
from m0_basics.base_llm import BaseLLM
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.policies import POLICIES
from m5_chunked_prefill import LLM

LONGEST = 64
OPTIONS: dict[str, Any] = {"max_model_len": LONGEST, "block_size": 4}


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[int], SamplingParams]:
    """A prompt of few different tokens, so that it repeats itself, and how to go on."""
    prompt = draw(st.lists(st.integers(20, 24), min_size=1, max_size=40))
    n = draw(st.sampled_from([1, 1, 1, 2, 3]))
    params = SamplingParams(
        n=n, temperature=draw(st.sampled_from([0.0, 0.7, 1.3])) if n == 1 else 0.9, seed=draw(st.integers(0, 9)),
        top_k=draw(st.sampled_from([0, 3])), max_tokens=draw(st.integers(1, 20)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.2])), logprobs=draw(st.sampled_from([None, 2])),
        prompt_logprobs=draw(st.sampled_from([None, 1])), ignore_eos=draw(st.booleans()))
    return prompt, params


def everything(llm: BaseLLM, work: list[tuple[list[int], SamplingParams]]) -> list[Any]:
    """All that a request may read of its answer."""
    outputs = llm.generate([prompt for prompt, _ in work], [params for _, params in work], use_tqdm=False)
    return [(o.prompt_logprobs, [(c.token_ids, c.text, c.logprobs, c.cumulative_logprob, c.finish_reason)
                                 for c in o.outputs]) for o in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_changes_a_token(tiny_model: TinyModels, dtype: str) -> None:
    model = str(tiny_model("qwen3"))
    plain = m4.LLM(model, dtype=dtype, num_blocks=512, **OPTIONS)

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(work=st.lists(jobs(), min_size=1, max_size=5), budget=st.none() | st.integers(1, 30),
           num_blocks=st.integers(LONGEST // 4, 40), swap_space=st.sampled_from([0, 0.01]),
           policy=st.sampled_from([name for name in POLICIES if name != "sla"]), max_num_seqs=st.integers(1, 6),
           method=st.sampled_from(["none", "ngram", "suffix", "draft_model"]), adaptive=st.booleans(),
           num_guesses=st.integers(1, 6))
    def check(work: list[tuple[list[int], SamplingParams]], budget: int | None, num_blocks: int, swap_space: float,
              policy: str, max_num_seqs: int, method: str, adaptive: bool, num_guesses: int) -> None:
        llm = LLM(model, dtype=dtype, max_num_batched_tokens=budget, num_blocks=num_blocks, swap_space=swap_space,
                  policy=policy, max_num_seqs=max(max_num_seqs, 3), speculative_method=method,
                  speculative_model=model if method == "draft_model" else None,
                  adaptive_drafts=adaptive or method == "none",
                  num_speculative_tokens=None if method == "none" else num_guesses, **OPTIONS)
        assert everything(llm, work) == everything(plain, work)
        assert llm.manager.usage == 0
        assert not llm.engine.has_unfinished_requests()

    check()
