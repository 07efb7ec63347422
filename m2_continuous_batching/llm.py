"""Milestone 2: continuous batching. Every part of the engine, and where it comes from."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m0_basics.base_llm import BaseLLM
from m0_basics.config import DEFAULT_MODEL, DTYPES
from m0_basics.loading.loader import load_model, load_tokenizer
from m0_basics.model_runner import ModelRunner
from m1_offline.kv_cache import check_memory
from m1_offline.output_processor import OutputProcessor
from m1_offline.sampler import FullSampler

from .async_scheduling import AsyncSchedulingEngine
from .attention import make_backend
from .config import EngineConfig
from .engine import LLMEngine
from .kv_cache_manager import RowKVCacheManager
from .plugins import Plugin, split_plugins
from .policies import make_policy
from .queues import Queues
from .scheduler import PrefillFirstScheduler
from .slot_cache import SlotCache, slot_cache_bytes
from .structured_output import StructuredSampler


class LLM(BaseLLM):
    """`LLM(model).generate(prompts, SamplingParams(...))`: all requests side by side, the batch made anew each step."""

    config_class = EngineConfig
    engine: LLMEngine

    def __init__(self, model: str = DEFAULT_MODEL, plugins: Sequence[Plugin] = (), **options: Any) -> None:
        """Options are the fields of `EngineConfig`'s layers: max_num_seqs, max_num_batched_tokens, policy, ..."""
        config = EngineConfig.from_options(model=model, **options)
        weights = load_model(config.model_config)
        tokenizer = load_tokenizer(config.model_config)
        config = config.with_max_model_len(weights.spec.max_position_embeddings)
        limits, hooks = config.scheduler_config, split_plugins(plugins)
        num_rows, row_size = limits.max_num_seqs, limits.longest

        dtype = DTYPES.get(config.cache_config.kv_cache_dtype, weights.dtype)
        num_bytes = slot_cache_bytes(weights.spec, num_rows * row_size, dtype, hooks.cache)
        check_memory(num_bytes, config.cache_config, num_rows, row_size, weights.device)
        cache = SlotCache(weights.spec, num_rows * row_size, dtype, weights.device, hooks.cache, row_size)
        manager = RowKVCacheManager(num_rows, row_size)
        backend = make_backend(config.attention_config.attention_backend, cache, manager, weights.dtype)
        queues = Queues(make_policy(limits.policy), manager, num_rows, row_size)
        engine_class = AsyncSchedulingEngine if limits.async_scheduling else LLMEngine
        engine = engine_class(PrefillFirstScheduler(queues, limits.max_num_batched_tokens),
                              ModelRunner(weights, hooks.around(backend)),
                              StructuredSampler(FullSampler(tokenizer), tokenizer, weights.spec),
                              OutputProcessor(tokenizer, row_size), cache.copy_slots, hooks.scheduler)
        super().__init__(config, engine, weights.spec, tokenizer)
        self.cache = cache
