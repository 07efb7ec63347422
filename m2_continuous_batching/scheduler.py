"""Which tokens run in the next step: the seam, and the scheduler that lets new prompts go first.

    step   1        2        3        4        5        6
    A   [prefill][ decode ][        ][ decode ][ decode ][ done
    B            [ arrives ][prefill][ decode ][ decode ][ decode ]

After every token the batch is made anew: who is finished leaves, who waits may join. A step is either prefill
(whole prompts, as many as the budgets allow) or decode (one token for each running sequence). Prompts go first,
but never twice in a row while others are decoding.
"""
from __future__ import annotations

import bisect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from m0_basics.attention import ScheduledSequence
from m0_basics.config import ConfigError, check_int, reject
from m0_basics.request import Request, Sequence, SequenceStatus

from .kv_cache_manager import KVCacheManager, SlotCopy
from .policies import QueuedSequence, SchedulingParams, SchedulingPolicy

TIME_LIMIT = "time limit"           # the stop_reason of a request that ran out of time


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


class Scheduler(ABC):
    """Owns the queues. The engine asks what to run, runs it, and says what came of it."""

    waiting: list[QueuedSequence]           # in the order in which they will be admitted; plugins may reorder it
    running: list[QueuedSequence]
    kv_cache_manager: KVCacheManager
    max_num_seqs: int
    max_num_batched_tokens: int

    @abstractmethod
    def check_request(self, request: Request, params: SchedulingParams) -> None:
        """Raise ConfigError for a request that could never be run."""

    @abstractmethod
    def add_request(self, request: Request, params: SchedulingParams) -> None:
        """Queue a request that `check_request` accepts."""

    @abstractmethod
    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Add one more output of a running request, which has computed what its parent has."""

    @abstractmethod
    def schedule(self) -> SchedulerOutput:
        """Choose what runs next. An empty step means that nothing can run."""

    @abstractmethod
    def update_from_output(self, output: SchedulerOutput) -> None:
        """The step has run, or is under way and will have run before the next one: its tokens count as computed."""

    @abstractmethod
    def finish(self, sequence: Sequence) -> None:
        """A sequence has reached a final state: forget it and take back what it holds."""

    @abstractmethod
    def abort_request(self, request_id: str) -> Request | None:
        """Abort what is unfinished of a request and take back what it holds; None for an unknown id."""

    @abstractmethod
    def get_request(self, sequence: Sequence) -> Request:
        """The request that a queued sequence belongs to."""

    @abstractmethod
    def has_unfinished_requests(self) -> bool:
        """Whether anything waits or runs."""

    @property
    @abstractmethod
    def token_budget(self) -> int:
        """Tokens that a step aims to stay under; setting it is how a plugin follows the load."""

    @token_budget.setter
    @abstractmethod
    def token_budget(self, value: int) -> None: ...


class PrefillFirstScheduler(Scheduler):
    """Whole prompts first, then one token for each running sequence."""

    def __init__(self, policy: SchedulingPolicy, kv_cache_manager: KVCacheManager, max_num_seqs: int,
                 max_num_batched_tokens: int, max_model_len: int,
                 clock: Callable[[], float] = time.perf_counter) -> None:
        self.policy = policy
        self.kv_cache_manager = kv_cache_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.clock = clock
        self.waiting: list[QueuedSequence] = []
        self.running: list[QueuedSequence] = []
        self._entries: dict[int, QueuedSequence] = {}           # by seq_id: all that wait or run
        self._requests: dict[str, Request] = {}
        self._deadlines: dict[str, float] = {}                  # by request_id, of those that have a time limit
        self._token_budget = max_num_batched_tokens
        self._step = 0
        self._num_queued = 0
        self._prefilled_last = False

    @property
    def token_budget(self) -> int:
        return self._token_budget

    @token_budget.setter
    def token_budget(self, value: int) -> None:
        check_int("token_budget", value, 1)
        self._token_budget = min(value, self.max_num_batched_tokens)

    def check_request(self, request: Request, params: SchedulingParams) -> None:
        self.policy.check(params)
        # The last token is returned and never run. A preempted sequence runs again whole, in one step.
        max_tokens = request.sampling_params.max_tokens or self.max_model_len
        longest = min(len(request.prompt_token_ids) + max_tokens, self.max_model_len) - 1
        if longest > self.max_num_batched_tokens:
            raise ConfigError(f"the request may need {longest} tokens in one step; allowed: at most "
                              f"max_num_batched_tokens={self.max_num_batched_tokens}")
        if not self.kv_cache_manager.can_ever_hold(longest):
            raise ConfigError(f"the request may need {longest} tokens of KV cache, more than the whole cache holds; "
                              "allowed: a shorter prompt, or a smaller max_tokens")

    def add_request(self, request: Request, params: SchedulingParams) -> None:
        if request.request_id in self._requests:
            raise reject("request_id", request.request_id, "an id that no unfinished request has")
        self._requests[request.request_id] = request
        if params.timeout_s is not None:
            self._deadlines[request.request_id] = request.metrics.arrival_time + params.timeout_s
        self._wait(QueuedSequence(request.sequences[0], request, params))

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Where there is no room for the child, it waits like a preempted sequence and will be computed on its own."""
        origin = self._entries[parent.seq_id]
        entry = QueuedSequence(child, origin.request, origin.params, queue_number=origin.queue_number,
                               last_step=self._step)
        room = origin in self.running and self._has_place(entry)
        if room and self.kv_cache_manager.fork(parent, child):
            child.num_computed_tokens = parent.num_computed_tokens
            self._entries[child.seq_id] = entry
            self.running.append(entry)
        else:
            if child.status is SequenceStatus.RUNNING:
                child.set_status(SequenceStatus.WAITING)
            child.num_computed_tokens = 0
            self._wait(entry)

    def schedule(self) -> SchedulerOutput:
        """Abort what is late, then prefill if something may join, else decode."""
        self._step += 1
        scheduled: list[ScheduledSequence] = []
        preempted: list[Sequence] = []
        expired = self._expire()
        if not (self._prefilled_last and self.running):
            self._schedule_prefills(scheduled, preempted)
        self._prefilled_last = bool(scheduled)
        if not scheduled:
            self._schedule_decodes(scheduled, preempted)
        return SchedulerOutput(scheduled, preempted, expired, self.kv_cache_manager.take_copies())

    def update_from_output(self, output: SchedulerOutput) -> None:
        for s in output.scheduled:
            if (entry := self._entries.get(s.sequence.seq_id)) is not None:     # else it failed during the step
                s.sequence.num_computed_tokens = s.end
                entry.tokens_this_turn += 1
                entry.last_step = self._step

    def finish(self, sequence: Sequence) -> None:
        entry = self._entries.pop(sequence.seq_id)
        (self.running if entry in self.running else self.waiting).remove(entry)
        self.kv_cache_manager.free(sequence)
        if entry.request.is_finished:
            self._forget(entry.request.request_id)

    def abort_request(self, request_id: str) -> Request | None:
        request = self._requests.get(request_id)
        if request is not None:
            for sequence in request.sequences:
                if not sequence.is_finished:
                    sequence.set_status(SequenceStatus.FINISHED_ABORTED)
                    if sequence.seq_id in self._entries:        # an output that was not forked off yet is nowhere
                        self.finish(sequence)
            self._forget(request_id)
        return request

    def get_request(self, sequence: Sequence) -> Request:
        return self._entries[sequence.seq_id].request

    def has_unfinished_requests(self) -> bool:
        return bool(self._entries)

    def _expire(self) -> list[Request]:
        """Abort the requests whose time limit has passed."""
        now = self.clock()
        late = [self._requests[request_id] for request_id, deadline in self._deadlines.items() if now > deadline]
        for request in late:
            for sequence in request.sequences:
                if not sequence.is_finished:
                    sequence.stop_reason = TIME_LIMIT
            self.abort_request(request.request_id)
        return late

    def _forget(self, request_id: str) -> None:
        """The request has ended."""
        self._requests.pop(request_id, None)
        self._deadlines.pop(request_id, None)

    def _schedule_prefills(self, scheduled: list[ScheduledSequence], preempted: list[Sequence]) -> None:
        """Admit waiting sequences in their order, until one does not fit: nobody in its lane overtakes it."""
        used: list[tuple[QueuedSequence, int]] = []
        full: set[str] = set()              # lanes
        total = 0
        for entry in list(self.waiting):
            if (lane := self.policy.lane(entry)) in full:
                continue
            sequence = entry.sequence
            num_computed = self.kv_cache_manager.get_num_computed_tokens(sequence)
            num_tokens = sequence.num_tokens - num_computed
            # The first one may go beyond the soft budget, else a small budget would lock out a long prompt.
            limit = self.policy.share(entry, used, self.token_budget) if used else self.max_num_batched_tokens
            fits = total + num_tokens <= limit
            if fits and self._make_room(entry, num_tokens, used, preempted):
                self._run(entry, num_computed)
                scheduled.append(ScheduledSequence(sequence, num_tokens))
                used.append((entry, num_tokens))
                total += num_tokens
            elif fits and self._has_place(entry):
                break                       # it is the cache that is full, and for all lanes
            else:
                full.add(lane)

    def _make_room(self, entry: QueuedSequence, num_tokens: int, used: list[tuple[QueuedSequence, int]],
                   preempted: list[Sequence]) -> bool:
        """Find a place for a waiting sequence, displacing running ones where the policy says so, and where it helps."""
        if self._has_place(entry) and self.kv_cache_manager.allocate_slots(entry.sequence, num_tokens):
            return True
        joined = {e for e, _ in used}                   # a victim must not be in the step already
        victims = [e for e in self.running if e not in joined and self.policy.may_displace(entry, e)]
        victims.sort(key=self.policy.key, reverse=True)

        def helps(count: int) -> bool:
            chosen = victims[:count]
            return (self._has_place(entry, chosen) and
                    self.kv_cache_manager.fits_without(entry.sequence, num_tokens, [e.sequence for e in chosen]))

        # Each victim more leaves more room, so the fewest that help are found by halving.
        fewest = bisect.bisect_left(range(len(victims) + 1), True, key=helps)
        if fewest > len(victims):
            return False                                # not even without all of them: nobody leaves in vain
        for victim in victims[:fewest]:
            self._preempt(victim, preempted)
        return self.kv_cache_manager.allocate_slots(entry.sequence, num_tokens)

    def _has_place(self, entry: QueuedSequence, without: list[QueuedSequence] | None = None) -> bool:
        """Whether one more may run, by the number of places that the policy lets `entry` see."""
        running = [e for e in self.running if e not in without] if without else self.running
        return len(running) < self.policy.share(entry, [(e, 1) for e in running], self.max_num_seqs)

    def _schedule_decodes(self, scheduled: list[ScheduledSequence], preempted: list[Sequence]) -> None:
        """One token for each running sequence, as far as the budget goes; who is left out goes first next time."""
        self.running.sort(key=self.policy.key)
        order = self.running.copy()
        if len(order) > self.token_budget:
            order.sort(key=lambda e: e.last_step)       # stable: the policy decides between equals
        while order and len(scheduled) < self.token_budget:
            entry = order.pop(0)
            while not self.kv_cache_manager.allocate_slots(entry.sequence, 1):
                victim = max((entry, *order), key=self.policy.key)      # of those that are not in the step yet
                self._preempt(victim, preempted)
                if victim is entry:
                    break
                order.remove(victim)
            else:
                scheduled.append(ScheduledSequence(entry.sequence, 1))

    def _run(self, entry: QueuedSequence, num_computed_tokens: int) -> None:
        self.waiting.remove(entry)
        self.running.append(entry)
        entry.tokens_this_turn = 0
        entry.sequence.set_status(SequenceStatus.RUNNING)
        entry.sequence.num_computed_tokens = num_computed_tokens
        if entry.request.metrics.first_scheduled_time is None:
            entry.request.metrics.first_scheduled_time = self.clock()

    def _preempt(self, entry: QueuedSequence, preempted: list[Sequence]) -> None:
        """Send a running sequence back to the queue. It keeps its tokens; if it keeps its cache, the manager says."""
        self.running.remove(entry)
        entry.sequence.set_status(self.kv_cache_manager.preempt(entry.sequence))
        if entry.sequence.status is SequenceStatus.WAITING:
            entry.sequence.num_computed_tokens = 0              # to be recomputed
        preempted.append(entry.sequence)
        self._wait(entry)

    def _wait(self, entry: QueuedSequence) -> None:
        self._entries[entry.sequence.seq_id] = entry
        self._num_queued += 1
        entry.queue_number = self._num_queued
        bisect.insort(self.waiting, entry, key=self.policy.key)
