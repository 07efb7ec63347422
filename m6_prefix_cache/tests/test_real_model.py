"""F6.4, F6.6: SmolLM2-135M gives transformers' tokens the first time, behind what is known, and in a small memory."""
from __future__ import annotations

from typing import Any

import pytest

from m0_basics.tools.testing.conformance import greedy, ids_of
from m0_basics.tools.testing.parity import assert_same_tokens
from m0_basics.tools.testing.real_model import NUM_TOKENS, RealReference
from m6_prefix_cache import LLM

pytestmark = pytest.mark.real_model


@pytest.mark.parametrize("options", [
    {"num_blocks": 128, "max_num_batched_tokens": 12},
    {"num_blocks": 64, "block_size": 8, "prefix_index": "hash"}], ids=["tree, small chunks", "hashes, swapped"])
def test_100_tokens_of_8_prompts(default_model_reference: RealReference, options: dict[str, Any]) -> None:
    llm = LLM(dtype="float32", max_model_len=256, **options)
    for _ in range(2):
        outputs = llm.generate(default_model_reference.prompts, greedy(NUM_TOKENS), use_tqdm=False)
        assert_same_tokens(ids_of(outputs), default_model_reference.token_ids)
    assert sum(output.num_cached_tokens for output in outputs) > 0
    assert llm.manager.usage == 0
