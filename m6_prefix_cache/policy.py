"""Who waits for what: the order that brings the most hits, and what the queue would be sorry to lose."""
from __future__ import annotations

from itertools import islice

from m2_continuous_batching.plugins.base import SchedulerPlugin
from m2_continuous_batching.policies import POLICIES as EARLIER
from m2_continuous_batching.policies import Key, QueuedSequence, SchedulingPolicy, with_number
from m2_continuous_batching.scheduler import Scheduler

from .kv_cache_manager import PrefixKVCacheManager

_LOOK_AHEAD = 256           # waiting sequences whose prefixes are looked up before each step
_KEEP_FOR = 64              # of these, the first so many keep what they have found, as long as others can go


class LongestMatchPolicy(SchedulingPolicy):
    """Who has most in the cache, and least left to compute, goes first, aged by work: nobody starves.

    A prefix is used while it is there. Who finds nothing waits as under `shortest-first`: one with n tokens is
    overtaken by at most `patience` * n tokens of others' work, and by `patience` more for each token that others find.
    """

    def __init__(self, patience: float = 8.0) -> None:
        self.patience = patience

    def key(self, entry: QueuedSequence) -> Key:
        left = entry.sequence.num_tokens - entry.sequence.num_computed_tokens
        return (entry.work_before + self.patience * (left - 2 * entry.num_ready), *entry.order)


LONGEST_MATCH = "longest-match"
POLICIES = {LONGEST_MATCH: with_number(LONGEST_MATCH, "PATIENCE", 8.0, LongestMatchPolicy)} | EARLIER


class QueueWatch(SchedulerPlugin):
    """Looks up before each step what those who wait would find: for their order, and for what the pool evicts last."""

    def __init__(self, manager: PrefixKVCacheManager) -> None:
        self.manager = manager

    def before_step(self, scheduler: Scheduler) -> None:
        block_size, wanted = self.manager.index.block_size, set[int]()
        for entry in scheduler.running:
            entry.num_ready = 0                         # it has it
        for i, entry in enumerate(islice(scheduler.waiting, _LOOK_AHEAD)):
            match = self.manager.match(entry.sequence)
            entry.num_ready = match.num_tokens(block_size)
            if i < _KEEP_FOR:
                wanted.update(match.blocks)
                if match.partial is not None:
                    wanted.add(match.partial)
        self.manager.pool.wanted = wanted
