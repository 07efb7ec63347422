"""Contenders whose caches hold nothing when a round begins: rounds repeat the same prompts, and would find them."""
from __future__ import annotations

from m0_basics.tools.bench import EngineContender, Workload
from m0_basics.tools.bench.contender import Served

from ..kv_cache_manager import PrefixKVCacheManager
from ..llm import LLM


def forget(llm: LLM) -> None:
    """Empty the prefix cache of an engine that has nothing to do."""
    if isinstance(llm.manager, PrefixKVCacheManager):
        llm.manager.pool.clear()


class ColdContender(EngineContender):
    """This milestone's engine. What prompts of one round share is found, what an earlier round computed is not."""

    llm: LLM

    def serve(self, workload: Workload) -> Served:
        forget(self.llm)
        return super().serve(workload)
