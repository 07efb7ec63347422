"""Milestone 5: chunked prefill. Steps that mix decodes with pieces of prompts, and speculative decoding on top."""
from m0_basics import CompletionOutput, ConfigError, Logprob, RequestOutput, SamplingParams
from m0_basics.sampling_params import BeamSearchParams, StructuredOutputsParams
from m2_continuous_batching.policies import SchedulingParams

from .config import EngineConfig
from .llm import LLM

__all__ = ["LLM", "BeamSearchParams", "CompletionOutput", "ConfigError", "EngineConfig", "Logprob", "RequestOutput",
           "SamplingParams", "SchedulingParams", "StructuredOutputsParams"]
