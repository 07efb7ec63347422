"""Milestone 7: GPTQ. Weights of four bits, and kernels that multiply by them as they are."""
from m0_basics import CompletionOutput, ConfigError, Logprob, RequestOutput, SamplingParams
from m0_basics.sampling_params import BeamSearchParams, StructuredOutputsParams
from m2_continuous_batching.policies import SchedulingParams

from .config import EngineConfig
from .llm import LLM

__all__ = ["LLM", "BeamSearchParams", "CompletionOutput", "ConfigError", "EngineConfig", "Logprob", "RequestOutput",
           "SamplingParams", "SchedulingParams", "StructuredOutputsParams"]
