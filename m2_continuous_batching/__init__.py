"""Milestone 2: continuous batching. The batch is made anew at every step: requests join and leave as they come."""
from m0_basics import CompletionOutput, ConfigError, Logprob, RequestOutput, SamplingParams
from m0_basics.sampling_params import StructuredOutputsParams

from .config import EngineConfig
from .llm import LLM
from .plugins import AttentionPlugin, CachePlugin, SchedulerPlugin
from .plugins.metrics import MetricsCollector
from .policies import SchedulingParams

__all__ = ["LLM", "AttentionPlugin", "CachePlugin", "CompletionOutput", "ConfigError", "EngineConfig", "Logprob",
           "MetricsCollector", "RequestOutput", "SamplingParams", "SchedulerPlugin", "SchedulingParams",
           "StructuredOutputsParams"]
