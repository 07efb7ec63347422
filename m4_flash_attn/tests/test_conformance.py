"""FX.1: m4's engine behaves as every engine of this repository does, with room and without."""
from __future__ import annotations

from typing import ClassVar

from m0_basics.testing.bad_input_conformance import BadInputConformance
from m0_basics.testing.conformance import AbortConformance, GreedyConformance, StopConformance, StreamingConformance
from m0_basics.testing.sampling_conformance import SamplingConformance
from m4_flash_attn import LLM


class TestFlash(GreedyConformance, StopConformance, StreamingConformance, AbortConformance, SamplingConformance,
                BadInputConformance):
    """The whole suite. Tiny memory: blocks for the longest sequence and little more, swapped to host memory."""

    llm_class = LLM
    options: ClassVar = {"max_model_len": 512, "block_size": 8, "num_blocks": 256}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 13}


class TestRecompute(GreedyConformance, AbortConformance, SamplingConformance):
    """Without host memory, preempted sequences are recomputed."""

    llm_class = LLM
    options: ClassVar = {"max_model_len": 512, "block_size": 4, "num_blocks": 512, "swap_space": 0}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 25}


class TestAsync(GreedyConformance, AbortConformance):
    """The next step is prepared while one runs: the kernels' pointers stay valid."""

    llm_class = LLM
    options: ClassVar = {"max_model_len": 512, "async_scheduling": True, "num_blocks": 256}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 7}


class TestModelAsItIs(GreedyConformance):
    """The kernels under milestone 0's own layers."""

    llm_class = LLM
    options: ClassVar = {"max_model_len": 512, "fused_layers": False, "num_blocks": 64}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 7, "policy": "round-robin:1"}


class TestSdpa(GreedyConformance):
    """Fused layers over m3's attention: what runs where there is no compiler."""

    llm_class = LLM
    options: ClassVar = {"max_model_len": 512, "attention_backend": "sdpa", "num_blocks": 64}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 7}
