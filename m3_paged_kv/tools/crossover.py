"""Swap or recompute: what it costs to bring one preempted sequence back, by both ways, over its length."""
from __future__ import annotations

from collections.abc import Sequence as Items
from statistics import median
from typing import Any

from m0_basics.attention import ScheduledSequence
from m0_basics.request import Sequence, SequenceData, SequenceStatus, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m1_offline.tools.step_costs import timed

from ..llm import LLM


def crossover(llm: LLM, lengths: Items[int], rounds: int) -> list[dict[str, Any]]:
    """Per length: seconds to run the tokens again, and seconds to copy the cache out and back; rounds alternate.

    `llm` needs host memory for the longest. Medians; the first round, which touches fresh pages, is not counted.
    """
    results = []
    for length in lengths:
        pairs = [(_recompute(llm, length), _swap(llm, length)) for _ in range(rounds + 1)][1:]
        results.append({"length": length, "recompute_s": median(r for r, _ in pairs),
                        "swap_s": median(s for _, s in pairs)})
    return results


def _start(llm: LLM, length: int) -> tuple[Sequence, float]:
    """A sequence with its prompt run, and the seconds that this took."""
    ids = [i % llm.spec.vocab_size for i in range(100, 100 + length)]
    sequence = Sequence(next_seq_id(), SequenceData(ids), SamplingParams(temperature=0), 0)
    allocated = llm.manager.allocate_slots(sequence, 0, length)
    assert allocated, "an idle cache holds one sequence"
    sequence.set_status(SequenceStatus.RUNNING)
    seconds, _ = timed(lambda: llm.engine.runner.execute_model([ScheduledSequence.rest(sequence)]))
    sequence.num_computed_tokens = length
    return sequence, seconds


def _recompute(llm: LLM, length: int) -> float:
    sequence, seconds = _start(llm, length)
    llm.manager.free(sequence)
    return seconds


def _swap(llm: LLM, length: int) -> float:
    sequence, _ = _start(llm, length)
    sequence.append_token_id(100)                   # the token that its prompt gave: the one to run next
    seconds, back = timed(lambda: _out_and_in(llm, sequence))
    assert back, "it fitted before"
    llm.manager.free(sequence)
    return seconds


def _out_and_in(llm: LLM, sequence: Sequence) -> bool:
    sequence.set_status(llm.manager.preempt(sequence))
    llm.engine.copy_slots(llm.manager.take_copies())
    assert sequence.status is SequenceStatus.SWAPPED, "swap_space has room for it"
    back = llm.manager.allocate_slots(sequence, sequence.num_computed_tokens, 1)
    llm.engine.copy_slots(llm.manager.take_copies())
    return back
