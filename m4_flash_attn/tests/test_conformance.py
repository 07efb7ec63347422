"""FX.1: m4's engine behaves as every engine of this repository does, with room and without."""
from __future__ import annotations

import sys
from typing import Any, ClassVar

import pytest
import torch

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
from m2_continuous_batching.engine import LLMEngine
from m2_continuous_batching.plugins.metrics import MetricsCollector
from m4_flash_attn import LLM
from m4_flash_attn.kernels.cpu.build import library


class TestFlash(GreedyConformance, StopConformance, StreamingConformance, AbortConformance, SamplingConformance,
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
class TestAsync(GreedyConformance, AbortConformance):
    """The next step is prepared while one runs: the kernels' pointers stay valid."""

    llm_class = LLM
    options: ClassVar = {"max_model_len": 512, "async_scheduling": True, "num_blocks": 256}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 7}


@pytest.mark.slow
class TestModelAsItIs(GreedyConformance):
    """The kernels under milestone 0's own layers."""

    llm_class = LLM
    options: ClassVar = {"max_model_len": 512, "fused_layers": False, "num_blocks": 64}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 7, "policy": "round-robin:1"}


@pytest.mark.slow
class TestSdpa(GreedyConformance):
    """Fused layers over m3's attention: what runs where there is no compiler."""

    llm_class = LLM
    options: ClassVar = {"max_model_len": 512, "attention_backend": "sdpa", "num_blocks": 64}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 7}


@pytest.mark.slow
class TestThreads(GreedyConformance):
    """F4.4, F4.7: the kernels on several threads, in both engines; the classes above run them on one."""

    llm_class = LLM
    options: ClassVar = {"max_model_len": 512, "attention_backend": "cpu", "num_blocks": 256}
    tiny_memory_options: ClassVar = {"max_model_len": 96, "num_blocks": 7}

    @pytest.fixture(autouse=True, params=[2, 3])
    def threads(self, request: pytest.FixtureRequest, _one_thread_for_tiny_models: None) -> int:
        """OpenMP's number, which is torch's; the fixture before this one puts back what it found."""
        torch.set_num_threads(request.param)
        return request.param

    @pytest.mark.skipif(sys.platform == "darwin", reason="the kernels name no OpenMP library there to ask")
    def test_the_kernels_are_given_that_many(self, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Asked in every step, in the thread that runs it."""
        seen = []
        run = LLMEngine._run

        def ask(engine: LLMEngine, batch: Any) -> Any:
            result = run(engine, batch)
            seen.append(library().omp_get_max_threads())
            return result

        monkeypatch.setattr(LLMEngine, "_run", ask)
        for settings in ({}, {"async_scheduling": True}):
            self.run(self.make(**settings), PROMPTS)
        assert set(seen) == {threads}
        assert len(seen) >= 2 * 16

    @pytest.mark.parametrize("settings", [{"swap_space": 0}, {}, {"async_scheduling": True}],
                             ids=["recomputed", "swapped", "prepared ahead"])
    def test_preempted_sequences(self, settings: dict[str, Any]) -> None:
        collector = MetricsCollector()
        outputs = self.run(self.make(plugins=[collector], **self.tiny_memory_options, **settings), PROMPTS)
        assert_same_tokens(ids_of(outputs), self.reference(PROMPTS))
        assert collector.totals.num_preemptions > 0
