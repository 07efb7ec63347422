"""Who waits for what: the order that brings the most hits, and what the queue would be sorry to lose."""
from __future__ import annotations

from itertools import islice

from m0_basics.request import SequenceStatus
from m2_continuous_batching.plugins.base import SchedulerPlugin
from m2_continuous_batching.policies import POLICIES as EARLIER
from m2_continuous_batching.policies import Key, QueuedSequence, SchedulingPolicy, with_number
from m2_continuous_batching.scheduler import Scheduler

from .kv_cache_manager import PrefixKVCacheManager

_LOOK_AHEAD = 256           # waiting sequences whose prefixes are looked up before each step
_LOOK_EVERY = 16            # steps, while nobody joins or leaves
_KEEP_FOR = 64              # of these, the first so many keep what they have found, as long as others can go


class LongestMatchPolicy(SchedulingPolicy):
    """Who has most in the cache goes first, then who is short, aged by work: nobody starves.

    A prefix is used while it is there. One that finds nothing of its n tokens is overtaken by at most `patience` * n
    tokens of others' work, and by `patience` more for each token that another finds.
    """

    def __init__(self, patience: float = 8.0) -> None:
        self.patience = patience
        self.num_ready: dict[int, int] = {}             # by seq_id: tokens that it would find, if it waits

    def key(self, entry: QueuedSequence) -> Key:
        sequence = entry.sequence
        left = sequence.num_tokens - sequence.num_computed_tokens
        is_running = sequence.status is SequenceStatus.RUNNING      # then it has it
        ready = 0 if is_running else self.num_ready.get(sequence.seq_id, 0)
        return (entry.work_before + self.patience * (left - 2 * ready), *entry.order)


LONGEST_MATCH = "longest-match"
POLICIES = {LONGEST_MATCH: with_number(LONGEST_MATCH, "PATIENCE", 8.0, LongestMatchPolicy)} | EARLIER


class QueueWatch(SchedulerPlugin):
    """Looks up before a step what those who wait would find: for their order, and for what the pool evicts last.

    While nobody joins or leaves it looks now and then: what they find changes with every block that is filled.
    """

    def __init__(self, manager: PrefixKVCacheManager, policy: SchedulingPolicy) -> None:
        self.manager = manager
        self.policy = policy if isinstance(policy, LongestMatchPolicy) else None
        self._seen, self._num_skipped = (0, 0, 0), 0

    def before_step(self, scheduler: Scheduler) -> None:
        waiting, running = scheduler.waiting, scheduler.running
        seen = len(waiting), len(running), sum(entry.sequence.seq_id for entry in waiting)
        self._num_skipped += 1
        if waiting and (seen != self._seen or self._num_skipped >= _LOOK_EVERY):
            self._look(waiting)
            self._num_skipped = 0
        self._seen = seen
        for entry in waiting[:scheduler.queues.max_num_seqs - len(running)]:
            self.manager.prefetch(entry.sequence)
        if not running:
            self.manager.wait_for_below([entry.sequence for entry in waiting])

    def _look(self, waiting: list[QueuedSequence]) -> None:
        block_size, wanted, num_ready = self.manager.index.block_size, set[int](), dict[int, int]()
        for i, entry in enumerate(islice(waiting, _LOOK_AHEAD)):
            match = self.manager.match(entry.sequence)
            num_ready[entry.sequence.seq_id] = match.num_tokens(block_size)
            if i < _KEEP_FOR:
                wanted.update(match.blocks)
                if match.partial is not None:
                    wanted.add(match.partial)
        self.manager.pool.wanted = wanted
        if self.policy is not None and self.policy.num_ready != num_ready:
            self.policy.num_ready = num_ready
            waiting.sort(key=self.policy.key)
