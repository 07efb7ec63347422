"""A workload whose requests share a system prompt: so much of each prompt is the same."""
from __future__ import annotations

import random

from m0_basics.tools.bench import BenchRequest, Workload


def workload(vocab_size: int, quick: bool = False, num_requests: int = 64, shared: int = 1000, own: int = 50,
             output_len: int = 32) -> Workload:
    """`num_requests` prompts of `shared` tokens, the same for all, and `own` tokens of their own; all at once."""
    if quick:
        num_requests, shared, own, output_len = 4, 64, 8, 8
    rng = random.Random("shared prefix")

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(rng.randrange(min(100, vocab_size - 1), vocab_size) for _ in range(number))

    system = tokens(shared)
    return Workload("shared-prefix", tuple(BenchRequest(system + tokens(own), output_len) for _ in range(num_requests)),
                    f"{num_requests} prompts that share their first {shared:,} tokens of {shared + own:,}")
