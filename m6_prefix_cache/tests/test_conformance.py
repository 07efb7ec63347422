"""F6.1, F6.4: m6 behaves as every engine of this repository does, whatever was computed before."""
from __future__ import annotations

from typing import Any, ClassVar

import pytest

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
from m6_prefix_cache import LLM

ROOM: dict[str, Any] = {"max_model_len": 512, "block_size": 8, "num_blocks": 256}
TINY: dict[str, Any] = {"max_model_len": 96, "num_blocks": 13}


class TestRadix(GreedyConformance, StopConformance, StreamingConformance, AbortConformance, SamplingConformance,
                BadInputConformance):
    """The whole suite, with budgets that cut every prompt. Tiny memory: swapped to host memory."""

    llm_class = LLM
    options: ClassVar = {**ROOM, "max_num_batched_tokens": 7}
    tiny_memory_options: ClassVar = TINY

    @pytest.mark.parametrize("settings", [{"swap_space": 0}, {}, {"async_scheduling": True}],
                             ids=["recomputed", "swapped", "prepared ahead"])
    def test_preempted_sequences(self, settings: dict[str, Any]) -> None:
        collector = MetricsCollector()
        llm = self.make(plugins=[collector], **self.tiny_memory_options, **settings)
        for _ in range(2):                                  # the second time much of it is known
            assert_same_tokens(ids_of(self.run(llm, PROMPTS)), self.reference(PROMPTS))
        assert collector.totals.num_preemptions > 0


class TestHash(GreedyConformance, AbortConformance):
    """Whole blocks, found by their hash; steps are chosen ahead."""

    llm_class = LLM
    options: ClassVar = {**ROOM, "prefix_index": "hash", "async_scheduling": True}
    tiny_memory_options: ClassVar = {**TINY, "swap_space": 0}


class TestSpeculative(GreedyConformance, StopConformance):
    """Guesses that were wrong are never found."""

    llm_class = LLM
    several_tokens_a_step = True
    options: ClassVar = {**ROOM, "speculative_method": "suffix", "adaptive_drafts": False}
    tiny_memory_options: ClassVar = TINY
