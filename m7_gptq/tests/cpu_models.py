"""Tiny models on quantised weights over m4's CPU attention, and what they compute in steps of any size."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m0_basics.attention import ScheduledSequence
from m0_basics.config import ModelConfig
from m0_basics.loading.loader import load_model
from m0_basics.model import CausalLM, DecoderLayer
from m0_basics.model_runner import ModelRunner
from m0_basics.tools.testing.parity import schedule
from m2_continuous_batching.slot_cache import SlotCache
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager, paged_manager
from m4_flash_attn.kernels.cpu.attention import CpuAttention
from m4_flash_attn.kernels.cpu.bindings import PagedKernels
from m7_gptq.linear import QuantizedEmbedding, QuantizedLinear
from m7_gptq.rtn import QuantizeOptions, round_to_nearest

_BLOCKS, _BLOCK_SIZE = 128, 8
Choose = Callable[[str], QuantizeOptions | None]      # by a layer's name; None: it stays plain


def nearest(bits: int = 4, group_size: int = 16) -> QuantizeOptions:
    return QuantizeOptions(bits=bits, group_size=group_size, method="rtn", search=False, desc_act=False)


def quantised_model(folder: Path, dtype: str, choose: Choose = lambda name: nearest()) -> CausalLM:
    """The model of a folder with each linear layer rounded as `choose` says; a tied embedding shares the matrix."""
    model = load_model(ModelConfig(model=str(folder), dtype=dtype, device="cpu", max_model_len=256))
    is_tied = model.spec.tie_word_embeddings

    def quantised(linear: nn.Module, name: str) -> Any:
        assert isinstance(linear, nn.Linear)
        options = choose(name)
        if options is None:
            return linear
        return QuantizedLinear(round_to_nearest(linear.weight.detach().float(), options), linear.bias, model.dtype)

    for i, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        for module, name in ((layer.self_attn, "qkv_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "gate_up_proj"),
                             (layer.mlp, "down_proj")):
            setattr(module, name, quantised(getattr(module, name), f"{i}.{name}"))
    model.lm_head = quantised(model.lm_head, "lm_head")
    if is_tied and isinstance(model.lm_head, QuantizedLinear):
        model.embed_tokens = QuantizedEmbedding(model.lm_head.matrix, model.dtype)
    return model


@dataclass(frozen=True)
class Runnable:
    """A model with a cache of its own."""

    runner: ModelRunner
    manager: PagedKVCacheManager


def over_cpu_attention(model: CausalLM) -> Runnable:
    spec = model.spec
    manager = paged_manager(_BLOCKS, _BLOCK_SIZE, 0)
    cache = SlotCache(spec, _BLOCKS * _BLOCK_SIZE, model.dtype, model.device)
    kernels = PagedKernels(spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim, _BLOCK_SIZE, model.dtype,
                           spec.head_dim ** -0.5)
    return Runnable(ModelRunner(model, CpuAttention(cache, manager.tables, kernels)), manager)


@torch.inference_mode()
def logits_of(runnable: Runnable, prompts: list[list[int]], chunk: int = 1000) -> list[Tensor]:
    """Logits [tokens, vocab] of each prompt, `chunk` tokens at a time, side by side."""
    runner, manager = runnable.runner, runnable.manager
    sequences = [s.sequence for s in schedule(prompts)]
    rows: list[list[Tensor]] = [[] for _ in prompts]
    while running := [s for s in sequences if s.num_computed_tokens < s.num_tokens]:
        step = [ScheduledSequence(s, s.num_computed_tokens, min(chunk, s.num_tokens - s.num_computed_tokens))
                for s in running]
        assert all(manager.allocate_slots(*s[:3]) for s in step)
        inputs = runner.prepare_inputs(step)
        hidden = runner.model(inputs.input_ids, inputs.positions, runner.backend, inputs.metadata)
        for s, part in zip(step, hidden.split([s.num_tokens for s in step]), strict=True):
            rows[sequences.index(s.sequence)].append(runner.model.compute_logits(part))
            s.sequence.num_computed_tokens = s.end
    for sequence in sequences:
        manager.free(sequence)
    return [torch.cat(parts) for parts in rows]
