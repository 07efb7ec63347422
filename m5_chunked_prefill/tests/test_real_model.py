"""F5.2, F5.6: SmolLM2-135M gives transformers' tokens in chunks, with drafts, and in a memory that does not suffice."""
from __future__ import annotations

from typing import Any

import pytest

from m0_basics.tools.testing.conformance import greedy, ids_of
from m0_basics.tools.testing.parity import assert_same_tokens
from m0_basics.tools.testing.real_model import NUM_TOKENS, RealReference
from m5_chunked_prefill import LLM

pytestmark = pytest.mark.real_model


@pytest.mark.parametrize("options", [
    {"num_blocks": 128, "max_num_batched_tokens": 12},
    {"num_blocks": 24, "block_size": 16, "speculative_method": "suffix", "num_speculative_tokens": 4}],
    ids=["small chunks", "drafts, swapped"])
def test_100_tokens_of_8_prompts(default_model_reference: RealReference, options: dict[str, Any]) -> None:
    llm = LLM(dtype="float32", max_model_len=256, **options)
    outputs = llm.generate(default_model_reference.prompts, greedy(NUM_TOKENS), use_tqdm=False)
    assert len(outputs) == 8
    assert_same_tokens(ids_of(outputs), default_model_reference.token_ids)
    assert llm.manager.usage == 0
