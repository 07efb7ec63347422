"""Which tokens run in the next step: the seam, and the scheduler that lets new prompts go first.

    step   1        2        3        4        5        6
    A   [prefill][ decode ][        ][ decode ][ decode ][ done
    B            [ arrives ][prefill][ decode ][ decode ][ decode ]

After every token the batch is made anew: who is finished leaves, who waits may join. A step is either prefill
(whole prompts, as many as the budgets allow) or decode (one token for each running sequence). Prompts go first,
but never twice in a row while others are decoding.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from m0_basics.attention import ScheduledSequence
from m0_basics.config import check_int, reject
from m0_basics.request import Logprob, Request, Sequence

from .kv_cache_manager import KVCacheManager, SlotCopy
from .policies import QueuedSequence, SchedulingParams
from .queues import Admission, Queues

DEFAULT_TOKEN_BUDGET = 2048
Sampled = tuple[Sequence, int, dict[int, Logprob] | None]       # a sequence, its next token, the log-probabilities


@dataclass(frozen=True)
class SchedulerOutput:
    """What the engine has to do in this step, and whom the scheduler has sent back or given up on."""

    scheduled: list[ScheduledSequence]
    preempted: list[Sequence] = field(default_factory=list)
    expired: list[Request] = field(default_factory=list)        # aborted: their time is up
    copies: list[SlotCopy] = field(default_factory=list)        # to make in the cache before the step runs

    @property
    def total_num_scheduled_tokens(self) -> int:
        return sum(s.num_tokens for s in self.scheduled)

    @property
    def num_prefill_tokens(self) -> int:
        """Of these, those of prompts and of what is computed once more. Ask before the step's tokens are appended."""
        return sum(s.num_tokens for s in self.scheduled if not s.is_decode)


class Scheduler(ABC):
    """Chooses what runs next, out of its queues. The engine runs it, and says what came of it.

    The engine may call `update_from_output` as soon as a step is under way, and then `schedule` for the step after it,
    before the first one's tokens are there. A running sequence whose tokens are all computed by then has one more
    coming: its next step has max(num_tokens - num_computed_tokens, 1) tokens.
    """

    def __init__(self, queues: Queues, max_num_batched_tokens: int) -> None:
        """`max_num_batched_tokens`: the most that a step may run, and what `token_budget` starts with."""
        self.queues = queues
        self.max_num_batched_tokens = max_num_batched_tokens
        self._token_budget = max_num_batched_tokens
        self._step = 0                          # counted by `schedule`

    @abstractmethod
    def check_request(self, request: Request, params: SchedulingParams) -> None:
        """Raise ConfigError for a request that could never be run."""

    def schedule(self) -> SchedulerOutput:
        """Abort what is late, then choose what runs next. An empty step means that nothing can run."""
        self._step += 1
        output = SchedulerOutput([], expired=self.queues.expire())
        self._choose(output)
        output.copies.extend(self.kv_cache_manager.take_copies())
        return output

    @abstractmethod
    def _choose(self, output: SchedulerOutput) -> None:
        """Add to `output` what runs next, its slots allocated, and whom that has sent back."""

    def update_from_output(self, output: SchedulerOutput) -> None:
        """The step has run, or is under way and will have run before the next one: its tokens count as computed."""
        self.queues.num_tokens_run += output.total_num_scheduled_tokens
        for s in output.scheduled:
            if (entry := self.queues.get_entry(s.sequence)) is not None:        # else it failed during the step
                s.sequence.num_computed_tokens = s.end
                entry.tokens_this_turn += s.reaches_newest
                entry.last_step = self._step

    def accept(self, output: SchedulerOutput, sampled: list[Sampled]) -> list[Sampled]:
        """Which of a step's tokens count, each with the sequence that it belongs to: all of them, without drafts.

        A token that was sampled behind a wrong guess does not, and what was computed for the guess is taken back.
        """
        return sampled

    @property
    def waiting(self) -> list[QueuedSequence]:
        """In the order in which they will be admitted; plugins may reorder it."""
        return self.queues.waiting

    @property
    def running(self) -> list[QueuedSequence]:
        return self.queues.running

    @property
    def kv_cache_manager(self) -> KVCacheManager:
        return self.queues.kv_cache_manager

    @property
    def token_budget(self) -> int:
        """Tokens that a step aims to stay under; setting it is how a plugin follows the load."""
        return self._token_budget

    @token_budget.setter
    def token_budget(self, value: int) -> None:
        check_int("token_budget", value, 1)
        self._token_budget = min(value, self.max_num_batched_tokens)


class PrefillFirstScheduler(Scheduler):
    """Whole prompts first, then one token for each running sequence."""

    def __init__(self, queues: Queues, max_num_batched_tokens: int | None = None) -> None:
        """Raises ConfigError for a step that cannot hold the longest sequence.

        A prompt runs whole, and a preempted sequence runs again whole, with all the tokens that it has.
        `max_num_batched_tokens` None: DEFAULT_TOKEN_BUDGET, or the longest sequence where that is more.
        """
        longest = queues.max_model_len
        if max_num_batched_tokens is not None and max_num_batched_tokens < longest:
            raise reject("max_num_batched_tokens", max_num_batched_tokens,
                         f"at least max_model_len={longest} (prompts run whole); or lower max_model_len")
        super().__init__(queues, max_num_batched_tokens or max(DEFAULT_TOKEN_BUDGET, longest))
        self._prefilled_last = False

    def check_request(self, request: Request, params: SchedulingParams) -> None:
        self.queues.check(request, params)

    def _choose(self, output: SchedulerOutput) -> None:
        """Prefill if something may join, else decode."""
        if not (self._prefilled_last and self.running):
            self._schedule_prefills(output)
        self._prefilled_last = bool(output.scheduled)
        if not output.scheduled:
            self._schedule_decodes(output)

    def _schedule_prefills(self, output: SchedulerOutput) -> None:
        """Admit waiting sequences in their order, until one does not fit: nobody in its lane overtakes it."""
        joined: list[tuple[QueuedSequence, int]] = []           # who, with how many tokens
        full_lanes: set[str] = set()
        for entry in self.waiting.copy():
            lane = self.queues.policy.lane(entry)
            if lane in full_lanes:
                continue
            admission = self._admit(entry, joined, output)
            if admission is Admission.NO_BLOCKS:
                return
            if admission is Admission.NO_PLACE:
                full_lanes.add(lane)

    def _admit(self, entry: QueuedSequence, joined: list[tuple[QueuedSequence, int]],
               output: SchedulerOutput) -> Admission:
        """Let a waiting sequence join the step with all its tokens, if the budgets and the cache allow it."""
        sequence = entry.sequence
        start = self.kv_cache_manager.get_num_computed_tokens(sequence)
        num_tokens = sequence.num_tokens - start
        # The first one may go beyond the soft budget, else a small budget would lock out a long prompt.
        limit = (self.queues.policy.share(entry, joined, self.token_budget) if joined else self.max_num_batched_tokens)
        if sum(n for _, n in joined) + num_tokens > limit:
            return Admission.NO_PLACE
        admission, victims = self.queues.admit(entry, start, num_tokens, in_step=[e for e, _ in joined])
        output.preempted.extend(victim.sequence for victim in victims)
        if admission is Admission.ADMITTED:
            output.scheduled.append(ScheduledSequence(sequence, start, num_tokens))
            joined.append((entry, num_tokens))
        return admission

    def _schedule_decodes(self, output: SchedulerOutput) -> None:
        """One token for each running sequence, as far as the budget goes; who is left out goes first next time."""
        key = self.queues.policy.key
        self.running.sort(key=key)
        order = self.running.copy()
        if len(order) > self.token_budget:
            order.sort(key=lambda e: e.last_step)       # stable: the policy decides between equals
        while order and len(output.scheduled) < self.token_budget:
            entry = order.pop(0)
            start = entry.sequence.num_computed_tokens
            has_room, victims = self.queues.extend(entry, start, 1, order, key)     # of those not in the step yet
            output.preempted.extend(victim.sequence for victim in victims)
            if has_room:
                output.scheduled.append(ScheduledSequence(entry.sequence, start, 1))
