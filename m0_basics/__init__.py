"""Milestone 0: a language model that runs, with nothing clever in it."""
from .config import CacheConfig, ConfigError, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from .llm import LLM
from .outputs import CompletionOutput, Logprob, RequestOutput
from .request import Request, Sequence, SequenceData, SequenceStatus
from .sampling_params import SamplingParams

__all__ = ["LLM", "CacheConfig", "CompletionOutput", "ConfigError", "EngineConfig", "Logprob", "ModelConfig",
           "ParallelConfig", "Request", "RequestOutput", "SamplingParams", "SchedulerConfig", "Sequence",
           "SequenceData", "SequenceStatus"]
