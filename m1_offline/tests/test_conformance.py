"""FX.1: m1's engine, and the padded baseline beside it, behave as every engine of this repository does."""
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
from m0_basics.tools.testing.sampling_conformance import SamplingConformance, TokenSamplingConformance
from m1_offline import LLM
from m1_offline.static_batching import StaticBatchLLM


class TestOffline(GreedyConformance, StopConformance, StreamingConformance, AbortConformance, SamplingConformance,
                  BadInputConformance):
    """The whole suite (F1.1, F1.3, F1.4, F1.5, F1.6, FX.1). Tiny memory: a row for each output, and no more."""

    llm_class = LLM
    tiny_memory_options: ClassVar = {"max_num_seqs": 3, "max_model_len": 96}


@pytest.mark.slow
class TestStaticBatch(GreedyConformance, StopConformance, StreamingConformance, AbortConformance,
                      TokenSamplingConformance, BadInputConformance):
    """The baseline (F1.8). What it refuses, several outputs per request and log-probabilities of prompts, is left
    out here; that it refuses them is checked with its other tests."""

    llm_class = StaticBatchLLM
    tiny_memory_options: ClassVar = {"max_num_seqs": 2, "max_model_len": 96}
