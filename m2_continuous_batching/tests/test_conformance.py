"""FX.1: m2's engine behaves as every engine of this repository does, with either attention."""
from __future__ import annotations

from typing import ClassVar

import pytest

from m0_basics.tools.testing.bad_input_conformance import BadInputConformance
from m0_basics.tools.testing.conformance import (
    AbortConformance,
    GreedyConformance,
    StopConformance,
    StreamingConformance,
)
from m0_basics.tools.testing.sampling_conformance import SamplingConformance
from m2_continuous_batching import LLM


class TestContinuous(GreedyConformance, StopConformance, StreamingConformance, AbortConformance, SamplingConformance,
                     BadInputConformance):
    """The whole suite. Tiny memory: fewer rows than requests."""

    llm_class = LLM
    options: ClassVar = {"max_model_len": 512}
    tiny_memory_options: ClassVar = {"max_num_seqs": 2, "max_model_len": 96}


@pytest.mark.slow
class TestNaiveAttention(GreedyConformance, AbortConformance):
    """The mask as it is defined gives the same tokens (F2.3)."""

    llm_class = LLM
    options: ClassVar = {"attention_backend": "naive", "max_model_len": 512}
    tiny_memory_options: ClassVar = {"max_num_seqs": 2, "max_model_len": 96}


@pytest.mark.slow
class TestRoundRobin(GreedyConformance, AbortConformance, StreamingConformance):
    """Sequences that give way after every few tokens, and are recomputed, end with the same tokens (F2.6)."""

    llm_class = LLM
    options: ClassVar = {"max_num_seqs": 2, "policy": "round-robin:3", "max_model_len": 512}
    tiny_memory_options: ClassVar = {"max_num_seqs": 1, "policy": "round-robin:1", "max_model_len": 96}


@pytest.mark.slow
class TestAsyncScheduling(GreedyConformance, StopConformance, StreamingConformance, AbortConformance,
                          SamplingConformance, BadInputConformance):
    """Scheduling ahead of the model changes no token (F2.14)."""

    llm_class = LLM
    options: ClassVar = {"async_scheduling": True, "max_model_len": 512}
    tiny_memory_options: ClassVar = {"max_num_seqs": 2, "max_model_len": 96, "policy": "round-robin:2"}
