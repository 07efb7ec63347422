"""How much of what was asked for was there: in all, counted once for each request."""
from __future__ import annotations

from m0_basics.request import Request
from m2_continuous_batching.plugins.base import CounterValue, SchedulerPlugin

from .kv_cache_manager import PrefixKVCacheManager


class PrefixCacheStats(SchedulerPlugin):
    """Tokens of prompts, and of those the tokens that were in the cache when their request began.

    A request that was sent back and finds its own tokens again finds nothing new: it does not count. One that asks for
    the log-probabilities of its prompt is not looked up.
    """

    def __init__(self, manager: PrefixKVCacheManager) -> None:
        self.manager = manager
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    def on_request_completion(self, request: Request) -> None:
        if request.metrics.first_scheduled_time is not None and request.sampling_params.prompt_logprobs is None:
            self.num_queried_tokens += len(request.prompt_token_ids)
            self.num_hit_tokens += request.num_cached_tokens

    def counters(self) -> list[CounterValue]:
        """vLLM's counters of its prefix cache, and the blocks that gave way."""
        return [CounterValue("prefix_cache_queries", "Tokens of prompts that were looked up.", self.num_queried_tokens),
                CounterValue("prefix_cache_hits", "Of these, tokens found in the cache.", self.num_hit_tokens),
                CounterValue("prefix_cache_evicted_blocks", "Cached blocks that had to go.",
                             self.manager.pool.num_evicted),
                *(self.manager.below.counters() if self.manager.below is not None else ())]

    @property
    def hit_rate(self) -> float | None:
        """Share of the prompts' tokens that were in the cache; None before the first request."""
        return self.num_hit_tokens / self.num_queried_tokens if self.num_queried_tokens else None
