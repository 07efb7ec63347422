"""F2.3, F2.6, FX.6: SmolLM2-135M gives transformers' tokens, whatever runs beside it, however often it is cut off."""
from __future__ import annotations

import pytest

from m0_basics.tools.divergence import compare_with_transformers
from m0_basics.tools.testing.conformance import greedy, ids_of
from m0_basics.tools.testing.parity import assert_same_tokens
from m0_basics.tools.testing.real_model import NUM_TOKENS, RealReference
from m2_continuous_batching import LLM

pytestmark = pytest.mark.real_model


@pytest.mark.parametrize("options", [
    {"max_num_seqs": 8},
    {"max_num_seqs": 3, "policy": "round-robin:20"},        # rows for three: the others wait, and displace them
    {"max_num_seqs": 5, "async_scheduling": True},
], ids=["all at once", "preempted", "async"])
def test_100_tokens_of_8_prompts(default_model_reference: RealReference, options: dict[str, object]) -> None:
    """F2.1, F2.3, F2.6, F2.14: through `generate`, from the GGUF file, in float32."""
    assert default_model_reference.smallest_gap > 1e-4, "a tie would be decided by rounding"
    llm = LLM(dtype="float32", max_model_len=256, **options)
    outputs = llm.generate(default_model_reference.prompts, greedy(NUM_TOKENS), use_tqdm=False)
    assert len(outputs) == 8
    assert_same_tokens(ids_of(outputs), default_model_reference.token_ids)
    assert [o.outputs[0].text for o in outputs] == [llm.get_tokenizer().decode(o.outputs[0].token_ids) for o in outputs]
    assert llm.engine.scheduler.kv_cache_manager.usage == 0


def test_divergence_in_bfloat16_is_rounding() -> None:
    """FX.6: where bfloat16 tokens differ from transformers', the two candidates were within its resolution."""
    prompts = ["The capital of France is", "def fibonacci(n):"]
    found = compare_with_transformers(LLM(dtype="bfloat16", max_model_len=256), prompts, max_tokens=40)
    assert len(found) == len(prompts)
    for divergence in found:                # None where the tokens are the same
        assert divergence is None or divergence.within_resolution, divergence.report()
