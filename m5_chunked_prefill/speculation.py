"""Speculative decoding: guess tokens ahead, check all guesses in one step, keep those that were right.

    newest token   t     guesses   g1  g2  g3        one step runs t g1 g2 g3, as a chunk
    it draws             g1  g2  x                   behind t, behind g1, behind g2, behind g3
    kept                 g1  g2  x                   x is what follows g2 in truth; what lies behind g3 is of no use

A draw is a hash of (seed, index, position) and not of what else runs. So what is kept is what decoding one by one would
have given, token for token, also at temperatures above 0: no rejection sampler is needed (rejection.py has the
textbook's, to compare). How far to guess is a matter of cost: see `plan`.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from weakref import WeakKeyDictionary

from m0_basics.attention import ScheduledSequence
from m0_basics.request import Sequence
from m2_continuous_batching.scheduler import Sampled

from .drafter import Drafter
from .step_cost import KNEES, StepCost, StepShape

_DECAY = 0.9                # of what was seen before of a sequence, with each of its drafts that is checked
_SLOW_DECAY = 0.995         # of what was seen before of all sequences
_PRIOR_WEIGHT = 2.0         # how many checked guesses the average of all sequences counts for
_FIRST_GUESS = 0.5          # that a guess is right, before any was checked
_PROBE_EVERY = 48           # tokens that go by without a draft before one is tried again
_PROBE = 2                  # guesses of such a try
_BLIND = 3                  # guesses while it is not known what a step costs


def keep_agreeing(scheduled: list[ScheduledSequence], sampled: list[Sampled]) -> tuple[list[Sampled], dict[int, int]]:
    """Of the tokens of drafted sequences those up to the first that its guess did not foresee, that one included.

    Each goes to its sequence; rows stand in the order in which they ran. Returns also, by seq_id, how many of a drafted
    sequence's rows are kept: so many of its tokens are computed for good.
    """
    drafted = {s.sequence.seq_id: s for s in scheduled if s.draft_token_ids}
    kept, num_kept, done = list[Sampled](), dict[int, int](), set[int]()
    for sequence, token_id, logprobs in sampled:
        s = drafted.get(sequence.seq_id)
        if s is None:
            kept.append((sequence, token_id, logprobs))
            continue
        if s.sequence.seq_id in done:
            continue
        place = num_kept.get(s.sequence.seq_id, 0)
        kept.append((s.sequence, token_id, logprobs))
        num_kept[s.sequence.seq_id] = place + 1
        if place >= len(s.draft_token_ids) or token_id != s.draft_token_ids[place]:
            done.add(s.sequence.seq_id)
    return kept, num_kept


@dataclass
class Record:
    """How often guesses were right, the newest counting most."""

    checked: float = 0.0
    right: float = 0.0
    num_tokens_at_draft: int = 0        # tokens of the sequence when it was last drafted for

    def add(self, num_checked: int, num_right: int, decay: float = _DECAY) -> None:
        self.checked = self.checked * decay + num_checked
        self.right = self.right * decay + num_right


class Speculation:
    """Drafts for the sequences of a step: as many tokens as pay."""

    def __init__(self, drafter: Drafter, cost: StepCost, num_speculative_tokens: int, max_model_len: int,
                 adaptive: bool = True) -> None:
        """At most `num_speculative_tokens` for each sequence; exactly so many, where there are, if not `adaptive`."""
        self.drafter, self.cost = drafter, cost
        self.num_speculative_tokens = num_speculative_tokens
        self.max_model_len = max_model_len
        self.adaptive = adaptive
        self._all = Record(_PRIOR_WEIGHT, _PRIOR_WEIGHT * _FIRST_GUESS)
        self._records: WeakKeyDictionary[Sequence, Record] = WeakKeyDictionary()

    def propose(self, sequences: list[Sequence], max_num_tokens: int,
                num_prompt_tokens: int = 0) -> dict[int, tuple[int, ...]]:
        """Guesses by seq_id, for sequences that decode in this step; at most `max_num_tokens` in all.

        The step may take `num_prompt_tokens` of prompts as well: a right guess counts as much as one of those.
        """
        start = time.perf_counter()
        limits = [self._limit(sequence) for sequence in sequences]
        if not any(limits) or max_num_tokens <= 0:
            return {}
        if self.drafter.seconds_per_token:                  # a guess has a price: first decide, then ask
            limits = self._plan(sequences, limits, max_num_tokens, num_prompt_tokens)
        drafts = self.drafter.propose(sequences, limits)
        if not self.drafter.seconds_per_token:
            limits = self._plan(sequences, [len(draft) for draft in drafts], max_num_tokens, num_prompt_tokens)
        self.cost.apart = time.perf_counter() - start
        cut = {s: tuple(d[:n]) for s, d, n in zip(sequences, drafts, limits, strict=True) if d[:n]}
        for sequence in cut:
            self._record_of(sequence).num_tokens_at_draft = sequence.num_tokens
        return {sequence.seq_id: draft for sequence, draft in cut.items()}

    def observe(self, sequence: Sequence, num_drafted: int, num_right: int) -> None:
        """Of so many guesses, the first `num_right` were right; behind a wrong one nothing is known."""
        num_checked = min(num_drafted, num_right + 1)
        self._record_of(sequence).add(num_checked, num_right)
        self._all.add(num_checked, num_right, _SLOW_DECAY)

    def _limit(self, sequence: Sequence) -> int:
        """Guesses that could all be kept: the step itself adds one token more."""
        most = self.max_model_len - sequence.num_tokens
        max_tokens = sequence.sampling_params.max_tokens
        if max_tokens is not None:
            most = min(most, max_tokens - len(sequence.output_token_ids))
        return max(0, min(self.num_speculative_tokens, most - 1)) if sequence.output_token_ids else 0

    def _record_of(self, sequence: Sequence) -> Record:
        record = self._records.get(sequence)
        if record is None:
            record = self._records[sequence] = Record(num_tokens_at_draft=sequence.num_tokens)
        return record

    def _probability(self, sequence: Sequence) -> float:
        """That the next guess for a sequence is right."""
        record, average = self._record_of(sequence), self._all.right / self._all.checked
        return (record.right + _PRIOR_WEIGHT * average) / (record.checked + _PRIOR_WEIGHT)

    def _plan(self, sequences: list[Sequence], limits: list[int], max_num_tokens: int,
              num_prompt_tokens: int) -> list[int]:
        """How many tokens to guess for each sequence."""
        if not self.adaptive:
            return _within(limits, max_num_tokens)
        if self.cost.coefficients is None:
            return _within([min(limit, _BLIND) for limit in limits], max_num_tokens)
        shape = StepShape()
        for sequence in sequences:
            shape.add(sequence.num_tokens - 1, 1, 1)
        shape.add(0, num_prompt_tokens, 0)

        def seconds(num_guesses: int, depth: int) -> float:
            step = self.cost.time(shape.with_guesses(len(sequences), num_guesses))
            return step + depth * self.drafter.seconds_per_token

        num_bent = None if self.drafter.seconds_per_token else max(0, KNEES[-1] - shape.num_tokens)
        lengths = plan([self._probability(s) for s in sequences], limits, max_num_tokens, seconds,
                       num_prompt_tokens, num_bent)
        for i, sequence in enumerate(sequences):
            record = self._record_of(sequence)
            if not lengths[i] and limits[i] and sequence.num_tokens - record.num_tokens_at_draft >= _PROBE_EVERY:
                lengths[i] = min(limits[i], _PROBE)
        return _within(lengths, max_num_tokens)


def plan(probabilities: list[float], limits: list[int], max_num_tokens: int,
         seconds: Callable[[int, int], float], num_others: int = 0, num_bent: int | None = None) -> list[int]:
    """Lengths of the drafts that give the most tokens per second; 0 where none pays.

    The j-th guess of a sequence adds p^j tokens, if each is right with probability p once those before it were.
    Guesses are taken in the order of what they add, and the best number of them is kept. `seconds(n, depth)` is how
    long a step with n guesses takes, the longest draft being `depth`; it runs `num_others` tokens in any case.
    Behind the first `num_bent` guesses each costs the same, so the first that does not pay ends the search; None: all
    are tried.
    """
    lengths, heap = [0] * len(limits), list[tuple[float, int]]()
    for i, p in enumerate(probabilities):
        if limits[i]:
            heappush(heap, (-p, i))
    tokens, taken, depth = float(len(limits) + num_others), 0, 0
    best_rate, best = tokens / seconds(0, 0), lengths.copy()
    while heap and taken < max_num_tokens:
        gain, i = heappop(heap)
        lengths[i] += 1
        tokens, taken, depth = tokens - gain, taken + 1, max(depth, lengths[i])
        if lengths[i] < limits[i]:
            heappush(heap, (gain * probabilities[i], i))
        rate = tokens / seconds(taken, depth)
        if rate > best_rate:
            best_rate, best = rate, lengths.copy()
        elif num_bent is not None and taken > num_bent:
            break
    return best


def _within(lengths: list[int], max_num_tokens: int) -> list[int]:
    """The lengths, cut where all of them together are more than `max_num_tokens`."""
    cut = []
    for length in lengths:
        cut.append(min(length, max_num_tokens))
        max_num_tokens -= cut[-1]
    return cut
