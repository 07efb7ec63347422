"""FX.1: m3's engine behaves as every engine of this repository does, with room and without."""
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
from m3_paged_kv import LLM


class TestPaged(GreedyConformance, StopConformance, StreamingConformance, AbortConformance, SamplingConformance,
                BadInputConformance):
    """The whole suite. Tiny memory: blocks for the longest sequence and little more, swapped to host memory."""

    llm_class = LLM
    options: ClassVar = {"max_model_len": 512, "block_size": 8, "num_blocks": 256}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 13}


@pytest.mark.slow
class TestRecompute(GreedyConformance, AbortConformance, SamplingConformance):
    """Without host memory, preempted sequences are recomputed."""

    llm_class = LLM
    options: ClassVar = {"max_model_len": 512, "block_size": 4, "num_blocks": 512, "swap_space": 0}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 25}


@pytest.mark.slow
class TestRoundRobin(GreedyConformance, AbortConformance):
    """Swapped out and in again every few tokens."""

    llm_class = LLM
    options: ClassVar = {"max_model_len": 512, "max_num_seqs": 2, "policy": "round-robin:3", "num_blocks": 64}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 7, "policy": "round-robin:1"}


@pytest.mark.slow
class TestAsync(GreedyConformance, AbortConformance, SamplingConformance):
    """Blocks that are freed while a step runs are not filled before it is done."""

    llm_class = LLM
    options: ClassVar = {"max_model_len": 512, "async_scheduling": True, "num_blocks": 256}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 7}
