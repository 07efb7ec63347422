"""F7.2, F7.6: SmolLM2-135M in the blocks of its own file gives transformers' tokens, alone and checked by itself."""
from __future__ import annotations

from typing import Any

import pytest

from m0_basics.tools.testing.conformance import greedy, ids_of
from m0_basics.tools.testing.parity import assert_same_tokens
from m0_basics.tools.testing.real_model import NUM_TOKENS, RealReference
from m2_continuous_batching.engine import engine_of
from m7_gptq import LLM
from m7_gptq.kernels.cpu.linear import CpuQuantizedEmbedding, CpuQuantizedLinear

pytestmark = pytest.mark.real_model


@pytest.mark.parametrize("options", [
    {"num_blocks": 128, "max_num_batched_tokens": 12},
    {"num_blocks": 64, "block_size": 8, "prefix_index": "hash"},
    {"speculative_method": "self", "adaptive_drafts": False, "num_speculative_tokens": 4}],
    ids=["packed, small chunks", "packed, swapped", "drafted by the file's blocks"])
def test_100_tokens_of_8_prompts(default_model_reference: RealReference, options: dict[str, Any]) -> None:
    llm = LLM(dtype="float32", max_model_len=256, **options)
    outputs = llm.generate(default_model_reference.prompts, greedy(NUM_TOKENS), use_tqdm=False)
    assert_same_tokens(ids_of(outputs), default_model_reference.token_ids)
    assert llm.manager.usage == 0


def test_the_file_is_not_dequantised() -> None:
    """Four bits in the layers, eight in the output matrix, whose rows the embedding looks up."""
    weights = engine_of(LLM(max_model_len=64)).runner.model
    layers = weights.layers[0].layers
    assert {layer.qkv_proj.packed.bits for layer in layers} == {4}
    assert isinstance(weights.lm_head, CpuQuantizedLinear)
    assert isinstance(weights.embed_tokens, CpuQuantizedEmbedding)
    assert weights.lm_head.packed is weights.embed_tokens.packed
    assert weights.lm_head.packed.bits == 8
