"""Milestone 1: a KV cache, so that each token is computed once; the full sampler; streaming."""
from m0_basics import CompletionOutput, ConfigError, Logprob, RequestOutput, SamplingParams
from m0_basics.sampling_params import BeamSearchParams

from .config import EngineConfig
from .llm import LLM

__all__ = ["LLM", "BeamSearchParams", "CompletionOutput", "ConfigError", "EngineConfig", "Logprob", "RequestOutput",
           "SamplingParams"]
