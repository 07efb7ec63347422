"""Milestone 7: GPTQ. Every part of the engine, and where it comes from."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m0_basics.config import DEFAULT_MODEL
from m0_basics.model_runner import ModelRunner
from m1_offline.output_processor import OutputProcessor
from m1_offline.sampler import FullSampler
from m2_continuous_batching.async_scheduling import AsyncSchedulingEngine
from m2_continuous_batching.engine import LLMEngine
from m2_continuous_batching.plugins import Plugin, split_plugins
from m2_continuous_batching.policies import make_policy
from m2_continuous_batching.queues import Queues
from m2_continuous_batching.structured_output import StructuredSampler
from m3_paged_kv.beams import BeamBlocks, PagedLLM
from m3_paged_kv.paged_memory import allocate_memory
from m4_flash_attn.backends import choose, situation_of
from m4_flash_attn.cuda_graph import with_graphs
from m4_flash_attn.kernels.cpu.dtype import with_auto_dtype
from m4_flash_attn.kernels.cpu.runner import with_decode_call
from m5_chunked_prefill.config import DEFAULT_NUM_GUESSES, DEFAULT_SLOWDOWN
from m5_chunked_prefill.make_drafter import drafter_for, load_draft
from m5_chunked_prefill.scheduler import ChunkedPrefillScheduler
from m5_chunked_prefill.speculation import Speculation
from m5_chunked_prefill.speculation_stats import SpeculationStats
from m5_chunked_prefill.step_cost import StepBudget, StepCost
from m6_prefix_cache.kv_cache_manager import PrefixKVCacheManager
from m6_prefix_cache.make_manager import make_manager
from m6_prefix_cache.policy import QueueWatch
from m6_prefix_cache.prefix_stats import PrefixCacheStats

from .config import EngineConfig
from .kernels.activations import activations_for
from .kernels.fuse_packed import fuse_packed
from .loading.fill import load_model
from .loading.fingerprint import fingerprint_of
from .loading.source import load_tokenizer
from .self_draft import SelfDrafter, load_twin, with_full_weights


class LLM(PagedLLM):
    """`LLM(model).generate(prompts, SamplingParams(...))`: weights of a few bits, multiplied as they are packed."""

    config_class = EngineConfig

    def __init__(self, model: str = DEFAULT_MODEL, plugins: Sequence[Plugin] = (), **options: Any) -> None:
        """Options are the fields of `EngineConfig`'s layers: quantization, activations, ..."""
        hooks = split_plugins(plugins)
        config = with_auto_dtype(EngineConfig.from_options(model=model, **options), bool(hooks.cache))
        config = with_full_weights(config)
        weights, tokenizer = load_model(config.model_config), load_tokenizer(config.model_config)
        twin = load_twin(config, weights)
        activations = activations_for(config, twin or weights)
        keeps_blocks = config.cache_config.prefix_cache_dir is not None
        fingerprint = fingerprint_of(weights, activations) if keeps_blocks else ""
        config = config.with_max_model_len(weights.spec.max_position_embeddings)
        limits, attention, guessing = config.scheduler_config, config.attention_config, config.speculative_config

        situation = situation_of(config, weights, hooks.cache)
        backend = choose(attention.attention_backend, situation)
        if attention.fused_layers:
            weights = fuse_packed(weights, activations)
            twin = twin and fuse_packed(twin, activations)
        draft = load_draft(config, weights.spec, tokenizer, hooks.cache)
        memory = allocate_memory(config, weights, hooks.cache, draft.block_bytes if draft else 0)
        cost, observers = StepCost(), list(hooks.scheduler)
        manager = make_manager(config, fingerprint, memory, situation, backend.name, hooks.cache, cost)
        runner = ModelRunner(weights, hooks.around(backend.make(situation, memory.cache, manager.tables)))
        may_record = backend.graphs and not attention.enforce_eager and not hooks.attention
        policy = make_policy(limits.policy, limits.policies)
        queues = Queues(policy, manager, limits.max_num_seqs, limits.longest)

        if isinstance(manager, PrefixKVCacheManager):
            observers = [QueueWatch(manager, policy), *observers, PrefixCacheStats(manager)]
        speculation, drafter = None, drafter_for(config, draft, tokenizer, memory.num_blocks)
        if twin is not None:
            drafting = ModelRunner(twin, backend.make(situation, memory.cache, manager.tables))
            drafter = SelfDrafter(with_decode_call(drafting), manager, FullSampler(tokenizer),
                                  memory.host_cache.copy_slots)
        if drafter is not None:
            speculation = Speculation(drafter, cost, guessing.num_speculative_tokens or DEFAULT_NUM_GUESSES,
                                      limits.longest, guessing.adaptive_drafts)
            observers += [drafter, SpeculationStats()]
        budget = StepBudget(cost, limits.max_step_slowdown or DEFAULT_SLOWDOWN,
                            is_fixed=limits.max_num_batched_tokens is not None)
        engine_class = AsyncSchedulingEngine if limits.async_scheduling else LLMEngine
        engine = engine_class(ChunkedPrefillScheduler(queues, budget, limits.max_num_batched_tokens, speculation),
                              with_graphs(runner, config) if may_record else with_decode_call(runner),
                              StructuredSampler(FullSampler(tokenizer), tokenizer, weights.spec),
                              OutputProcessor(tokenizer, limits.longest), memory.host_cache.copy_slots,
                              [*observers, cost])
        super().__init__(config, engine, weights.spec, tokenizer)
        self.cache, self.manager, self.attention_backend = memory.cache, manager, backend.name
        self._beams = BeamBlocks(manager, manager.pool, memory.host_cache.copy_slots)

    def reset_prefix_cache(self) -> bool:
        """Forget what is cached. False: requests are unfinished, and nothing has changed."""
        return isinstance(self.manager, PrefixKVCacheManager) and self.manager.reset()
