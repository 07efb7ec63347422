"""F0.8, F0.11, FX.1: cache-free generation gives transformers' greedy tokens, on tiny models and on a real one."""
from __future__ import annotations

from m0_basics import LLM
from m0_basics.testing.bad_input_conformance import BadInputConformance
from m0_basics.testing.conformance import (
    AbortConformance,
    GreedyConformance,
    StopTokenConformance,
    StreamingConformance,
)


class TestConformance(GreedyConformance, StopTokenConformance, StreamingConformance, AbortConformance,
                      BadInputConformance):
    llm_class = LLM
