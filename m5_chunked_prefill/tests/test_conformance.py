"""F5.2, F5.4, F5.6: m5 behaves as every engine of this repository does, whatever the chunks and the guesses."""
from __future__ import annotations

from typing import Any, ClassVar

import pytest

from m0_basics.base_llm import BaseLLM
from m0_basics.tools.testing.bad_input_conformance import BadInputConformance
from m0_basics.tools.testing.conformance import (
    PROMPTS,
    AbortConformance,
    GreedyConformance,
    StopConformance,
    StreamingConformance,
    ids_of,
)
from m0_basics.tools.testing.parity import assert_same_tokens
from m0_basics.tools.testing.sampling_conformance import SamplingConformance
from m2_continuous_batching.plugins.metrics import MetricsCollector
from m5_chunked_prefill import LLM

ROOM: dict[str, Any] = {"max_model_len": 512, "block_size": 8, "num_blocks": 256}


class TestChunked(GreedyConformance, StopConformance, StreamingConformance, AbortConformance, SamplingConformance,
                  BadInputConformance):
    """The whole suite, with a budget that cuts every prompt. Tiny memory: swapped to host memory."""

    llm_class = LLM
    options: ClassVar = {**ROOM, "max_num_batched_tokens": 7}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 13}

    @pytest.mark.parametrize("settings", [{"swap_space": 0}, {}, {"async_scheduling": True}],
                             ids=["recomputed", "swapped", "prepared ahead"])
    def test_preempted_sequences(self, settings: dict[str, Any]) -> None:
        collector = MetricsCollector()
        outputs = self.run(self.make(plugins=[collector], **self.tiny_memory_options, **settings), PROMPTS)
        assert_same_tokens(ids_of(outputs), self.reference(PROMPTS))
        assert collector.totals.num_preemptions > 0


class TestByCost(GreedyConformance):
    """The budget from what steps cost."""

    llm_class = LLM
    options: ClassVar = ROOM
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 13, "swap_space": 0}


class TestAsync(GreedyConformance, AbortConformance):
    """The next step is chosen while a chunk runs."""

    llm_class = LLM
    options: ClassVar = {**ROOM, "async_scheduling": True, "max_num_batched_tokens": 16}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 13}


class TestSpeculative(GreedyConformance, StopConformance, StreamingConformance, AbortConformance, SamplingConformance):
    """The whole suite with guesses, right ones and wrong ones, always as many as there are."""

    llm_class = LLM
    several_tokens_a_step = True
    options: ClassVar = {**ROOM, "max_num_batched_tokens": 24, "speculative_method": "suffix", "adaptive_drafts": False}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 13}


class TestNGram(GreedyConformance):
    """Lengths by what pays."""

    llm_class = LLM
    options: ClassVar = {**ROOM, "speculative_method": "ngram"}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 13, "swap_space": 0}


class TestDraftModel(GreedyConformance, SamplingConformance):
    """The model drafts for itself: the guesses are right, as far as there is room for them."""

    llm_class = LLM
    options: ClassVar = {**ROOM, "speculative_method": "draft_model", "adaptive_drafts": False,
                         "num_speculative_tokens": 3}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 13}

    def make(self, variant: str = "qwen3", **options: Any) -> BaseLLM:
        return super().make(variant, **{"speculative_model": str(self.tiny_model(variant)), **options})
