"""The milestone's idea in 80 lines gives what its engine gives, and runs by itself."""
from __future__ import annotations

from typing import Any

import pytest
import torch

from m0_basics.attention import AttentionMetadata, FullAttention
from m0_basics.idea import EPS, THETA, Layer, decoder
from m0_basics.model import CausalLM
from m0_basics.model_spec import ModelSpec
from m0_basics.tools.testing.idea import run_idea


@pytest.mark.slow
def test_it_runs_by_itself() -> None:
    assert "30 had run before" in run_idea("m0_basics")


def test_same_logits_as_the_engines_model() -> None:
    """The same weights in `CausalLM` over `FullAttention`: three layers, two query heads to a key-value head."""
    spec = ModelSpec("LlamaForCausalLM", 60, 32, 48, 3, 4, 2, 8, 64, rms_norm_eps=EPS, rope_theta=THETA,
                     tie_word_embeddings=False)
    model = CausalLM(spec, 64, torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    model.load_state_dict({name: torch.randn(weight.shape) * 2 / weight.shape[-1] ** 0.5
                           for name, weight in model.state_dict().items()}, assign=True)
    ids = torch.randint(60, (23,))
    hidden = model(ids, torch.arange(23), FullAttention(), AttentionMetadata([0, 23]))
    expected = model.compute_logits(hidden)
    assert expected.std() > 0.1, "logits that are all alike would prove nothing"
    logits = decoder(ids, model.embed_tokens.weight, [layer_of(layer) for layer in model.layers], model.norm.weight,
                     model.lm_head.weight, (4, 2))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def layer_of(layer: Any) -> Layer:
    """The weights of one `DecoderLayer`."""
    return Layer(layer.input_layernorm.weight, layer.post_attention_layernorm.weight, layer.self_attn.qkv_proj.weight,
                 layer.self_attn.o_proj.weight, layer.mlp.gate_up_proj.weight, layer.mlp.down_proj.weight)
