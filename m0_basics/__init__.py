"""Milestone 0: a language model that runs, with nothing clever in it."""
import os
import signal
import sys

if sys.argv[:1] == ["-m"]:                  # the command line, and torch is not imported yet, which takes seconds:
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C ends it without a traceback
if os.environ.get("LLM_LAB_WORKSPACE"):     # before any other module: a learner's files may take their places
    from .tools.exercise_overlay import install_overlay_from_environment
    install_overlay_from_environment()

from .config import CacheConfig, ConfigError, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from .llm import LLM
from .outputs import CompletionOutput, RequestOutput
from .request import Logprob, Request, Sequence, SequenceData, SequenceStatus
from .sampling_params import SamplingParams

__all__ = ["LLM", "CacheConfig", "CompletionOutput", "ConfigError", "EngineConfig", "Logprob", "ModelConfig",
           "ParallelConfig", "Request", "RequestOutput", "SamplingParams", "SchedulerConfig", "Sequence",
           "SequenceData", "SequenceStatus"]
