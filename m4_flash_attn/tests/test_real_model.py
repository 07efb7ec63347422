"""F4.1, FX.6: SmolLM2-135M gives transformers' tokens through the fastest backend that this machine has."""
from __future__ import annotations

import pytest

from m0_basics.tools.divergence import compare_with_transformers
from m0_basics.tools.testing.conformance import greedy, ids_of
from m0_basics.tools.testing.parity import assert_same_tokens
from m0_basics.tools.testing.real_model import NUM_TOKENS, RealReference
from m4_flash_attn import LLM

pytestmark = pytest.mark.real_model


@pytest.mark.parametrize("options", [{"num_blocks": 128}, {"num_blocks": 24, "block_size": 16}],
                         ids=["room for all", "swapped"])
def test_100_tokens_of_8_prompts(default_model_reference: RealReference, options: dict[str, int]) -> None:
    """F4.1: prefill and 99 steps of eight sequences, in float32."""
    assert default_model_reference.smallest_gap > 1e-4, "a tie would be decided by rounding"
    llm = LLM(dtype="float32", max_model_len=256, **options)
    assert llm.attention_backend == "cpu"
    outputs = llm.generate(default_model_reference.prompts, greedy(NUM_TOKENS), use_tqdm=False)
    assert len(outputs) == 8
    assert_same_tokens(ids_of(outputs), default_model_reference.token_ids)
    assert (llm.manager.usage, llm.manager.swapped.host_pool.num_used) == (0.0, 0)


def test_divergence_in_bfloat16_is_rounding() -> None:
    """FX.6: where bfloat16 tokens differ from transformers', the two candidates were within its resolution."""
    llm = LLM(dtype="bfloat16", max_model_len=256)
    assert llm.attention_backend == "cpu"
    prompts = ["The capital of France is", "def fibonacci(n):", "从前有一座山，"]
    found = compare_with_transformers(llm, prompts, max_tokens=40)
    assert len(found) == len(prompts)
    for divergence in found:                # None where the tokens are the same
        assert divergence is None or divergence.within_resolution, divergence.report()
