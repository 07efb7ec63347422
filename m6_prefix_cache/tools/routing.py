"""Several replicas, each with a prefix cache of its own: which one should a request go to?

  round-robin     the next one: even load, and every replica has to know every prefix
  sticky          by the hash of the prompt's beginning: a prefix lives in one place, however popular it is
  prefix-aware    where most of it is cached, unless that one has `tolerance` times the work of the least busy

Counted with the engine's own pool and index, one visit after the other; work is the tokens that are computed.
"""
from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from hashlib import sha256

from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams

from .replay import BLOCK_SIZE, Replica
from .traces import Visit

WAYS = ("round-robin", "sticky", "prefix-aware")
_BEGINNING = 64             # tokens that a sticky router looks at


@dataclass(frozen=True)
class Routed:
    """What a way of routing has come to."""

    hit_share: float        # of the prompts' tokens
    imbalance: float        # the work of the busiest replica over the mean


def route(trace: Items[Visit], way: str, num_replicas: int = 4, num_blocks: int = 400,
          tolerance: float = 1.25) -> Routed:
    """Send a trace's visits to replicas of `num_blocks` blocks each."""
    replicas = [Replica(num_blocks) for _ in range(num_replicas)]
    work, found = [0] * num_replicas, 0
    for number, visit in enumerate(trace):
        sequence = Sequence(next_seq_id(), SequenceData(list(visit.prompt)), SamplingParams(), seed=0)
        if way == "round-robin":
            chosen = number % num_replicas
        elif way == "sticky":
            chosen = int(sha256(repr(visit.prompt[:_BEGINNING]).encode()).hexdigest(), 16) % num_replicas
        else:
            allowed = [i for i in range(num_replicas)
                       if work[i] <= tolerance * min(work) + len(visit.prompt)]
            chosen = max(allowed, key=lambda i: (replicas[i].manager.match(sequence).num_tokens(BLOCK_SIZE), -work[i]))
        hit = replicas[chosen].visit(sequence, visit)
        found += hit
        work[chosen] += len(visit.prompt) - hit + len(visit.answer)
    return Routed(found / sum(len(v.prompt) for v in trace), max(work) * num_replicas / sum(work))
