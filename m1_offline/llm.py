"""Milestone 1: a KV cache, the full sampler, streaming. Every part of the engine, and where it comes from."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from m0_basics.base_llm import BaseLLM
from m0_basics.config import DEFAULT_MODEL, DTYPES
from m0_basics.input_processor import Prompt, as_prompt_list
from m0_basics.loading.loader import load_model, load_tokenizer
from m0_basics.model_runner import ModelRunner
from m0_basics.sampling_params import BeamSearchParams, SamplingParams

from .attention import ContiguousAttention
from .beam_search import BeamSearchOutput, beam_search
from .config import EngineConfig
from .engine import OfflineEngine
from .kv_cache import CacheRows, KVCache, check_memory, kv_cache_bytes
from .output_processor import OutputProcessor
from .sampler import FullSampler


class LLM(BaseLLM):
    """`LLM(model).generate(prompts, SamplingParams(...))`: one request at a time, each token computed once."""

    config_class = EngineConfig

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any) -> None:
        """Options are the fields of `EngineConfig`'s layers: dtype, device, max_model_len, max_num_seqs, ..."""
        config = EngineConfig.from_options(model=model, **options)
        weights = load_model(config.model_config)
        tokenizer = load_tokenizer(config.model_config)
        config = config.with_max_model_len(weights.spec.max_position_embeddings)
        num_rows, row_size = config.scheduler_config.max_num_seqs, config.scheduler_config.max_model_len
        assert row_size is not None

        dtype = DTYPES.get(config.cache_config.kv_cache_dtype, weights.dtype)
        check_memory(kv_cache_bytes(weights.spec, num_rows * row_size, dtype), config.cache_config, num_rows, row_size,
                     weights.device)
        kv_cache = KVCache(weights.spec, num_rows * row_size, dtype, weights.device)
        rows = CacheRows(kv_cache, num_rows, row_size)
        runner = ModelRunner(weights, ContiguousAttention(kv_cache, rows))
        engine = OfflineEngine(runner, FullSampler(tokenizer), OutputProcessor(tokenizer, row_size), rows)
        super().__init__(config, engine, weights.spec, tokenizer)
        self._runner, self._rows = runner, rows

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The `beam_width` most probable outputs found for each prompt, best first."""
        prompts = as_prompt_list(prompts)
        requests = self._requests(prompts, SamplingParams(temperature=0, max_tokens=params.max_tokens), True, {})
        return [beam_search(self._runner, self._rows, r, params, self.tokenizer, self._rows.row_size)
                for r, _ in requests]
