"""Hits of a trace without a model: the engine's own bookkeeping, one visit after the other, and Belady's optimum.

  lru            in the order of arrival; the least recently used block goes
  informed       the same, but what the next visits in the queue would use goes last
  longest-match  informed, and of the visits in the queue the one that finds most comes first
  belady         in the order of arrival; the block that is used again last goes (Belady 1966): nobody can know it

Of a chain of blocks none is used without those before it, so both LRU and Belady take leaves. Counted are prompts'
tokens in whole blocks.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Items

from m0_basics.request import Request, Sequence, SequenceData, SequenceStatus, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m2_continuous_batching.policies import QueuedSequence, SchedulingParams
from m3_paged_kv.block_pool import BlockPool

from ..block_hash import BlockHasher, HashIndex
from ..block_pool import CachedBlockPool
from ..kv_cache_manager import PrefixKVCacheManager
from ..policy import LongestMatchPolicy
from .traces import Visit

BLOCK_SIZE = 16
WAYS = ("lru", "informed", "longest-match", "belady")


class Replica:
    """An engine's bookkeeping without the engine."""

    def __init__(self, num_blocks: int) -> None:
        hasher = BlockHasher(BLOCK_SIZE, "replay")
        pool = CachedBlockPool(num_blocks, HashIndex(hasher))
        self.manager = PrefixKVCacheManager(pool, hasher, BlockPool(0), watermark=0.0)

    def visit(self, sequence: Sequence, visit: Visit) -> int:
        """Run a visit's sequence from its prompt to its end. Returns the tokens that it found, in whole blocks."""
        manager = self.manager
        start = manager.get_num_computed_tokens(sequence)
        if not manager.allocate_slots(sequence, start, sequence.num_tokens - start):
            return 0
        sequence.set_status(SequenceStatus.RUNNING)
        sequence.num_computed_tokens = sequence.num_tokens
        for token_id in visit.answer:
            sequence.append_token_id(token_id)
        if manager.allocate_slots(sequence, sequence.num_computed_tokens, len(visit.answer)):
            sequence.num_computed_tokens = sequence.num_tokens
        manager.free(sequence)
        manager.take_copies()
        return start // BLOCK_SIZE * BLOCK_SIZE


def hits(trace: Items[Visit], num_blocks: int, way: str, window: int = 64) -> int:
    """Tokens of the trace's prompts that are found. `window`: visits that wait at a time, their questions asked."""
    if way == "belady":
        return _belady(trace, num_blocks)
    replica, policy = Replica(num_blocks), LongestMatchPolicy()
    manager, found, num_run = replica.manager, 0, 0
    waiting, left = list[tuple[QueuedSequence, int]](), deque(range(len(trace)))
    answered = set[int | None]((None,))
    while waiting or left:
        while left and len(waiting) < window and trace[left[0]].after in answered:
            number = left.popleft()
            waiting.append((_entry(trace[number], num_run, number), number))
        if way == "longest-match":
            for entry, _ in waiting:
                policy.num_ready[entry.sequence.seq_id] = manager.match(entry.sequence).num_tokens(BLOCK_SIZE)
            waiting.sort(key=lambda pair: policy.key(pair[0]))
        entry, number = waiting.pop(0)
        if way != "lru":
            manager.pool.wanted = {block for other, _ in waiting for block in manager.match(other.sequence).blocks}
        visit = trace[number]
        found += replica.visit(entry.sequence, visit)
        num_run += len(visit.prompt) + len(visit.answer)
        answered.add(number)
    return found


def _entry(visit: Visit, work_before: int, number: int) -> QueuedSequence:
    request = Request(str(number), None, list(visit.prompt), SamplingParams())
    request.metrics.arrival_time = float(number)
    return QueuedSequence(request.sequences[0], request, SchedulingParams(), work_before)


def _belady(trace: Items[Visit], num_blocks: int) -> int:
    """Blocks by the hash of all up to their end; who is asked for last of all goes first."""
    hasher = BlockHasher(BLOCK_SIZE, "replay")
    paths = list[tuple[list[bytes], int]]()                 # of each visit: its blocks, and how many may be found
    for visit in trace:
        sequence = Sequence(next_seq_id(), SequenceData([*visit.prompt, *visit.answer]), SamplingParams(), seed=0)
        num_whole = sequence.num_tokens // BLOCK_SIZE
        paths.append((hasher.hashes(sequence, num_whole)[:num_whole], (len(visit.prompt) - 1) // BLOCK_SIZE))
    uses: dict[bytes, list[int]] = {}                       # when, the next one last
    for time in reversed(range(len(paths))):
        for block in paths[time][0]:
            uses.setdefault(block, []).append(time)
    cached, found = dict[bytes, int](), 0                   # block -> how deep it stands
    for path, num_prompt in paths:
        num_hits = next((i for i, block in enumerate(path[:num_prompt]) if block not in cached), num_prompt)
        found += num_hits * BLOCK_SIZE
        for depth, block in enumerate(path):
            uses[block].pop()
            cached[block] = depth
        held = set(path)
        while len(cached) > num_blocks:
            del cached[max((b for b in cached if b not in held),
                           key=lambda b: (uses[b][-1] if uses[b] else len(paths), cached[b]),
                           default=path[-1])]
    return found
