"""F3.3, F3.6, F3.8: SmolLM2-135M gives transformers' tokens, with blocks for all, and with blocks for a few."""
from __future__ import annotations

import pytest

from m0_basics.tools.testing.conformance import greedy, ids_of
from m0_basics.tools.testing.parity import assert_same_tokens
from m0_basics.tools.testing.real_model import NUM_TOKENS, RealReference
from m3_paged_kv import LLM

pytestmark = pytest.mark.real_model


@pytest.mark.parametrize("options", [{"num_blocks": 128}, {"num_blocks": 24}, {"num_blocks": 24, "swap_space": 0}],
                         ids=["room for all", "swapped", "recomputed"])
def test_100_tokens_of_8_prompts(default_model_reference: RealReference, options: dict[str, float]) -> None:
    assert default_model_reference.smallest_gap > 1e-4, "a tie would be decided by rounding"
    llm = LLM(dtype="float32", max_model_len=256, **options)
    outputs = llm.generate(default_model_reference.prompts, greedy(NUM_TOKENS), use_tqdm=False)
    assert len(outputs) == 8
    assert_same_tokens(ids_of(outputs), default_model_reference.token_ids)
    assert (llm.manager.usage, llm.manager.swapped.host_pool.num_used) == (0.0, 0)
