"""F7.3: exchanging readable layers for packed ones changes speed and memory, and nothing else."""
from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from m0_basics.attention import FullAttention
from m0_basics.model import CausalLM
from m0_basics.model_runner import ModelRunner
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import all_logits
from m4_flash_attn.kernels.cpu.build import BuildError
from m4_flash_attn.kernels.cpu.linear import PackedGatedLinear, PackedLinear
from m4_flash_attn.tests.cpu_variants import own_products  # noqa: F401
from m7_gptq.kernels import fuse_packed as module
from m7_gptq.kernels.cpu.decoder import weights_of
from m7_gptq.kernels.cpu.linear import (
    Activations,
    CpuQuantizedEmbedding,
    CpuQuantizedGatedLinear,
    CpuQuantizedLinear,
)
from m7_gptq.kernels.fuse_packed import fuse_packed, has_packed_layers
from m7_gptq.linear import QuantizedEmbedding, QuantizedLinear
from m7_gptq.tests.cpu_models import logits_of, nearest, over_cpu_attention, quantised_model
from m7_gptq.tests.test_cpu_decoder import mixed

PROMPTS = [[7, 8, 9, 10, 11, 12, 13, 14], [100], list(range(20, 43))]
CPU = torch.device("cpu")


def readable_logits(model: CausalLM) -> torch.Tensor:
    return torch.cat(all_logits(ModelRunner(model, FullAttention()), PROMPTS))


@pytest.mark.parametrize("name", ["qwen3", "qwen2", "llama"])
def test_exact_layers_are_the_readable_ones(tiny_model: TinyModels, name: str) -> None:
    expected = readable_logits(quantised_model(tiny_model(name), "float32", mixed))
    fused = over_cpu_attention(fuse_packed(quantised_model(tiny_model(name), "float32", mixed), "exact"))
    torch.testing.assert_close(torch.cat(logits_of(fused, PROMPTS)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_activations_stay_close(tiny_model: TinyModels, dtype: str) -> None:
    expected = readable_logits(quantised_model(tiny_model("qwen3"), "float32", mixed))
    fused = over_cpu_attention(fuse_packed(quantised_model(tiny_model("qwen3"), dtype, mixed), "int8"))
    difference = (torch.cat(logits_of(fused, PROMPTS)) - expected).norm() / expected.norm()
    assert 0 < difference < 0.1


@pytest.mark.usefixtures("own_products")
def test_what_becomes_of_each_layer(tiny_model: TinyModels) -> None:
    model = fuse_packed(quantised_model(tiny_model("qwen3"), "bfloat16", mixed), "int8")
    layers = list(model.layers[0].layers)
    assert type(layers[0].qkv_proj) is CpuQuantizedLinear and type(layers[0].o_proj) is PackedLinear
    assert type(layers[0].gated) is CpuQuantizedGatedLinear and type(layers[1].gated) is PackedGatedLinear
    assert type(model.lm_head) is CpuQuantizedLinear and model.lm_head.out_dtype is torch.float32
    assert model.lm_head.packed.bits == 8 and layers[0].qkv_proj.packed.bits == 4
    assert not any(isinstance(part, nn.Linear | QuantizedLinear | QuantizedEmbedding) for part in model.modules())
    plain = weights_of(layers[0].o_proj)
    assert plain is not None and plain.bits == 0 and plain.packed == layers[0].o_proj.weights.packed
    assert weights_of(nn.Linear(4, 4)) is None


def test_a_tied_matrix_is_stored_once(tiny_model: TinyModels) -> None:
    readable = quantised_model(tiny_model("qwen3_tied"), "float32")
    ids = torch.tensor([0, 5, 99])
    expected = readable.embed_tokens(ids)
    model = fuse_packed(readable, "int8")
    assert isinstance(model.embed_tokens, CpuQuantizedEmbedding) and isinstance(model.lm_head, CpuQuantizedLinear)
    assert model.embed_tokens.packed is model.lm_head.packed
    assert torch.equal(model.embed_tokens(ids), expected)


def test_an_embedding_with_a_matrix_of_its_own_keeps_it(tiny_model: TinyModels) -> None:
    readable = quantised_model(tiny_model("qwen3"), "float32", lambda name: None if name == "lm_head" else nearest())
    assert isinstance(readable.lm_head, nn.Linear)
    matrix = quantised_model(tiny_model("qwen3"), "float32").lm_head.matrix
    readable.embed_tokens = QuantizedEmbedding(matrix, torch.float32)
    ids = torch.tensor([1, 2])
    expected = readable.embed_tokens(ids)
    model = fuse_packed(readable, "exact")
    assert isinstance(model.embed_tokens, CpuQuantizedEmbedding) and isinstance(model.lm_head, PackedLinear)
    assert torch.equal(model.embed_tokens(ids), expected)


def test_readable_matrices_are_dropped(tiny_model: TinyModels) -> None:
    model = quantised_model(tiny_model("qwen3"), "float32")
    codes = [weakref.ref(part.matrix.codes) for part in model.modules() if isinstance(part, QuantizedLinear)]
    fuse_packed(model, "exact")
    gc.collect()
    assert len(codes) == 13 and all(ref() is None for ref in codes)


@pytest.mark.parametrize("activations", ["exact", "int8"])
def test_without_a_compiler_the_readable_layers_stay(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch,
                                                     activations: Activations) -> None:
    def no_library(*args: object) -> None:
        raise BuildError("no C++ compiler was found")

    monkeypatch.setattr(module, "library", no_library)
    assert not has_packed_layers(CPU, torch.float32)
    model = fuse_packed(quantised_model(tiny_model("qwen3_tied"), "float32"), activations)
    assert isinstance(model.lm_head, QuantizedLinear) and isinstance(model.embed_tokens, QuantizedEmbedding)
    expected = readable_logits(quantised_model(tiny_model("qwen3_tied"), "float32"))
    torch.testing.assert_close(readable_logits(model), expected, rtol=1e-4, atol=1e-4)


def test_where_packed_layers_run() -> None:
    assert has_packed_layers(CPU, torch.float32) and has_packed_layers(CPU, torch.bfloat16)
    assert not has_packed_layers(CPU, torch.float16) and not has_packed_layers(torch.device("meta"), torch.float32)
