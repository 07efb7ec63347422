"""Milestone 3: the paged KV cache. Every part of the engine, and where it comes from."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m0_basics.config import DEFAULT_MODEL
from m0_basics.loading.loader import load_model, load_tokenizer
from m0_basics.model_runner import ModelRunner
from m1_offline.output_processor import OutputProcessor
from m1_offline.sampler import FullSampler
from m2_continuous_batching.async_scheduling import AsyncSchedulingEngine
from m2_continuous_batching.engine import LLMEngine
from m2_continuous_batching.plugins import Plugin, split_plugins
from m2_continuous_batching.policies import make_policy
from m2_continuous_batching.queues import Queues
from m2_continuous_batching.scheduler import PrefillFirstScheduler
from m2_continuous_batching.structured_output import StructuredSampler

from .attention import PagedAttention
from .beams import BeamBlocks, PagedLLM
from .config import EngineConfig
from .kv_cache_manager import paged_manager
from .paged_memory import allocate_memory


class LLM(PagedLLM):
    """`LLM(model).generate(prompts, SamplingParams(...))`: memory in blocks, taken as sequences grow."""

    config_class = EngineConfig

    def __init__(self, model: str = DEFAULT_MODEL, plugins: Sequence[Plugin] = (), **options: Any) -> None:
        """Options are the fields of `EngineConfig`'s layers: block_size, num_blocks, swap_space, max_num_seqs, ..."""
        config = EngineConfig.from_options(model=model, **options)
        weights = load_model(config.model_config)
        tokenizer = load_tokenizer(config.model_config)
        config = config.with_max_model_len(weights.spec.max_position_embeddings)
        limits, hooks = config.scheduler_config, split_plugins(plugins)

        memory = allocate_memory(config, weights, hooks.cache)
        manager = paged_manager(memory.num_blocks, config.cache_config.block_size, memory.num_host_blocks)
        backend = PagedAttention(memory.cache, manager.tables, weights.dtype)
        queues = Queues(make_policy(limits.policy), manager, limits.max_num_seqs, limits.longest)
        engine_class = AsyncSchedulingEngine if limits.async_scheduling else LLMEngine
        engine = engine_class(PrefillFirstScheduler(queues, limits.max_num_batched_tokens),
                              ModelRunner(weights, hooks.around(backend)),
                              StructuredSampler(FullSampler(tokenizer), tokenizer, weights.spec),
                              OutputProcessor(tokenizer, limits.longest), memory.host_cache.copy_slots, hooks.scheduler)
        super().__init__(config, engine, weights.spec, tokenizer)
        self.cache, self.manager = memory.cache, manager
        self._beams = BeamBlocks(manager, memory.host_cache.copy_slots)
