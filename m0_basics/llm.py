"""Milestone 0: no cache, one request at a time, greedy. Every part of the engine, and where it comes from."""
from __future__ import annotations

from typing import Any

from .attention import FullAttention
from .base_llm import BaseLLM
from .config import DEFAULT_MODEL, EngineConfig, reject
from .engine import NaiveEngine
from .loading.loader import load_model, load_tokenizer
from .model_runner import ModelRunner
from .sampler import GreedySampler
from .sampling_params import SamplingParams


class LLM(BaseLLM):
    """`LLM(model).generate(prompts)`: the honest baseline that recomputes everything."""

    config_class = EngineConfig
    default_sampling_params = SamplingParams(temperature=0)

    def __init__(self, model: str = DEFAULT_MODEL, **options: Any) -> None:
        """Options are the fields of `EngineConfig`'s layers: dtype, device, max_model_len, seed, ..."""
        config = check(EngineConfig.from_options(model=model, **options))
        weights = load_model(config.model_config)
        tokenizer = load_tokenizer(config.model_config)
        config = config.with_max_model_len(weights.spec.max_position_embeddings)
        runner = ModelRunner(weights, FullAttention())
        engine = NaiveEngine(runner, GreedySampler(), tokenizer, config)
        super().__init__(config, engine, weights.spec, tokenizer)


def check(config: EngineConfig) -> EngineConfig:
    """Refuse settings of a cache and of a batch: this engine has neither."""
    if config.scheduler_config.max_num_seqs != 1:
        raise reject("max_num_seqs", config.scheduler_config.max_num_seqs, "1 (this engine runs one at a time)")
    if config.cache_config != type(config.cache_config)():
        raise reject("cache_config", config.cache_config, "the defaults (this engine keeps no cache)")
    return config
