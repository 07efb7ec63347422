"""Contenders whose caches hold nothing when a round begins: rounds repeat the same prompts, and would find them."""
from __future__ import annotations

from m0_basics.tools.bench import EngineContender, Workload
from m0_basics.tools.bench.contender import Served

from ..llm import LLM


class ColdContender(EngineContender):
    """This milestone's engine. What prompts of one round share is found, what an earlier round computed is not."""

    llm: LLM

    def serve(self, workload: Workload) -> Served:
        self.llm.reset_prefix_cache()
        return super().serve(workload)
