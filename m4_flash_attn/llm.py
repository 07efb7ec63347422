"""Milestone 4: flash attention. Every part of the engine, and where it comes from."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m0_basics.config import DEFAULT_MODEL, DTYPES
from m0_basics.loading.loader import load_model, load_tokenizer
from m0_basics.model_runner import ModelRunner, Runner
from m1_offline.output_processor import OutputProcessor
from m1_offline.sampler import FullSampler
from m2_continuous_batching.async_scheduling import AsyncSchedulingEngine
from m2_continuous_batching.engine import LLMEngine
from m2_continuous_batching.plugins import Plugin, split_plugins
from m2_continuous_batching.policies import make_policy
from m2_continuous_batching.scheduler import PrefillFirstScheduler
from m2_continuous_batching.slot_cache import SlotCache, slot_cache_bytes
from m2_continuous_batching.structured_output import StructuredSampler
from m3_paged_kv.beam_cache import BeamBlocks
from m3_paged_kv.cache_size import num_blocks_for
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager
from m3_paged_kv.paged_llm import PagedLLM
from m3_paged_kv.swap import make_host_cache

from .backends import Situation, choose
from .config import EngineConfig
from .cuda_graph import GraphRunner
from .kernels.cpu.runner import DecodeRunner, can_decode
from .kernels.layer_kernels import layer_kernels_for
from .layers import fuse


class LLM(PagedLLM):
    """`LLM(model).generate(prompts, SamplingParams(...))`: attention by the fastest kernel that this machine has."""

    config_class = EngineConfig

    def __init__(self, model: str = DEFAULT_MODEL, plugins: Sequence[Plugin] = (), **options: Any) -> None:
        """Options are the fields of `EngineConfig`'s layers: attention_backend, fused_layers, block_size, ..."""
        config = EngineConfig.from_options(model=model, **options)
        weights = load_model(config.model_config)
        tokenizer = load_tokenizer(config.model_config)
        config = config.with_max_model_len(weights.spec.max_position_embeddings)
        limits, memory, attention = config.scheduler_config, config.cache_config, config.attention_config
        assert limits.max_model_len is not None and limits.max_num_batched_tokens is not None

        dtype = DTYPES.get(memory.kv_cache_dtype, weights.dtype)
        hooks = split_plugins(plugins)
        situation = Situation(weights.device, weights.dtype, dtype, weights.spec, memory.block_size, bool(hooks.cache))
        backend = choose(attention.attention_backend, situation)
        if attention.fused_layers:
            weights = fuse(weights, layer_kernels_for(weights.device, weights.dtype))
        block_bytes = slot_cache_bytes(weights.spec, memory.block_size, dtype, hooks.cache)
        num_blocks = num_blocks_for(memory, block_bytes, weights.device, limits.max_model_len, limits.max_num_seqs)
        # What a cache plugin keeps for a slot stays on the device: such sequences are recomputed instead of swapped.
        num_host_blocks = 0 if hooks.cache else int(memory.swap_space * 2**30) // block_bytes
        cache = SlotCache(weights.spec, num_blocks * memory.block_size, dtype, weights.device, hooks.cache,
                          memory.block_size)
        host_cache = make_host_cache(cache, memory.block_size, num_host_blocks)
        manager = PagedKVCacheManager(num_blocks, memory.block_size, num_host_blocks)
        model_runner = ModelRunner(weights, hooks.around(backend.make(situation, cache, manager)))
        runner: Runner = model_runner
        if weights.device.type == "cuda" and backend.graphs and not attention.enforce_eager and not hooks.attention:
            runner = GraphRunner(model_runner, memory.block_size, limits.max_num_seqs, limits.max_model_len)
        elif can_decode(model_runner):
            runner = DecodeRunner(model_runner)
        scheduler = PrefillFirstScheduler(make_policy(limits.policy), manager, limits.max_num_seqs,
                                          limits.max_num_batched_tokens, limits.max_model_len)
        engine_class = AsyncSchedulingEngine if limits.async_scheduling else LLMEngine
        engine = engine_class(scheduler, runner, StructuredSampler(FullSampler(tokenizer), tokenizer, weights.spec),
                              OutputProcessor(tokenizer, limits.max_model_len), host_cache.copy_slots, hooks.scheduler)
        super().__init__(config, engine, weights.spec, tokenizer)
        self.cache, self.manager, self.attention_backend = cache, manager, backend.name
        self._beams = BeamBlocks(manager, host_cache.copy_slots)
