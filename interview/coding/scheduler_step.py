"""One step of a continuous-batching scheduler with chunked prefill, over a paged cache.

Plain integers only. A request is finished by somebody else; this function decides who runs, how many tokens, and who
gives way when blocks run out.
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Request:
    """A request as the scheduler sees it."""

    id: str
    num_tokens: int                 # known so far: prompt and output
    num_computed: int = 0           # of these, in the cache
    num_blocks: int = 0             # blocks that it holds


@dataclass
class Step:
    """What one call decided: (id, tokens to run) in order, and who lost its blocks, in the order of losing them."""

    scheduled: list[tuple[str, int]]
    preempted: list[str]


def blocks_needed(request: Request, num_tokens: int, block_size: int) -> int:
    """Further blocks that `request` needs to run `num_tokens` more tokens."""
    return max(0, -(-(request.num_computed + num_tokens) // block_size) - request.num_blocks)


def schedule_step(running: list[Request], waiting: list[Request], free_blocks: int, token_budget: int,
                  max_num_seqs: int, block_size: int) -> tuple[Step, int]:
    """Decide one step; return it and the number of blocks that are free afterwards.

    1. Running requests come first, in their order. Each runs its remaining tokens (num_tokens - num_computed), cut to
       what is left of the budget. One with nothing left of the budget is skipped.
    2. If its blocks are not there, preempt the last request of `running`: its blocks are free, its num_computed is 0,
       it moves to the front of `waiting`. Repeat until the blocks are there, or the request itself was the last and
       is preempted. A request that is scheduled in this step is never preempted: victims come from behind.
    3. If nobody was preempted, admit from the front of `waiting`, while there is a place (max_num_seqs requests in
       `running`), budget, and blocks for the request's chunk (its remaining tokens, cut to the budget). Stop at the
       first that does not fit: no overtaking. An admitted request moves to the end of `running`.

    `running`, `waiting` and the requests' num_blocks are changed in place; num_computed is changed for victims only
    (the engine advances it after the step). Requests always have at least one remaining token.
    """
    step, budget, i = Step([], []), token_budget, 0
    while i < len(running):
        request = running[i]
        chunk = min(request.num_tokens - request.num_computed, budget)
        if chunk == 0:
            i += 1
            continue
        need = blocks_needed(request, chunk, block_size)
        while need > free_blocks:
            victim = running.pop()
            free_blocks += victim.num_blocks
            victim.num_blocks = victim.num_computed = 0
            waiting.insert(0, victim)
            step.preempted.append(victim.id)
            if victim is request:
                break
        else:
            free_blocks -= need
            request.num_blocks += need
            budget -= chunk
            step.scheduled.append((request.id, chunk))
            i += 1
    while not step.preempted and waiting and len(running) < max_num_seqs and budget:
        request = waiting[0]
        chunk = min(request.num_tokens - request.num_computed, budget)
        need = blocks_needed(request, chunk, block_size)
        if need > free_blocks:
            break
        running.append(waiting.pop(0))
        free_blocks -= need
        request.num_blocks += need
        budget -= chunk
        step.scheduled.append((request.id, chunk))
    return step, free_blocks
