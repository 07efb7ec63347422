"""Who waits and who runs: what every scheduler needs, whatever it chooses.

    add ----> waiting --- start ---> running --- finish / abort ---> forgotten, the cache given back
                 ^                      |
                 '------ preempt -------'

The waiting queue is kept in the order of the policy. A sequence that is preempted waits again among the others.
"""
from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from enum import Enum, auto

from m0_basics.config import ConfigError, reject
from m0_basics.request import Request, Sequence, SequenceStatus

from .kv_cache_manager import KVCacheManager
from .policies import Key, QueuedSequence, SchedulingParams, SchedulingPolicy

TIME_LIMIT = "time limit"           # the stop_reason of a request that ran out of time


class Admission(Enum):
    """What became of a sequence that wanted to join the step."""

    ADMITTED = auto()
    NO_PLACE = auto()           # tokens or places are used up, as its policy sees them: its lane has to wait
    NO_BLOCKS = auto()          # the cache is full, and for all lanes


class Queues:
    """The waiting and the running sequences, and the requests that they belong to."""

    def __init__(self, policy: SchedulingPolicy, kv_cache_manager: KVCacheManager, max_num_seqs: int,
                 max_model_len: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """At most `max_num_seqs` sequences run; `clock` is the one that time limits are measured on, in seconds."""
        self.policy = policy
        self.kv_cache_manager = kv_cache_manager
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.clock = clock
        self.waiting: list[QueuedSequence] = []                 # in the order in which they will be admitted
        self.running: list[QueuedSequence] = []
        self._entries: dict[int, QueuedSequence] = {}           # by seq_id: all that wait or run
        self._requests: dict[str, Request] = {}
        self._deadlines: dict[str, float] = {}                  # by request_id, of those that have a time limit
        self._num_queued = 0
        self.num_tokens_run = 0                                 # by all that has ever run: the scheduler counts

    def check(self, request: Request, params: SchedulingParams) -> None:
        """Raise ConfigError for a request that the policy does not know how to order, or the cache can never hold."""
        self.policy.check(params)
        # The last token is returned and never run.
        max_tokens = request.sampling_params.max_tokens or self.max_model_len
        longest = min(len(request.prompt_token_ids) + max_tokens, self.max_model_len) - 1
        if not self.kv_cache_manager.can_ever_hold(longest):
            raise ConfigError(f"the request may need {longest} tokens of KV cache, more than the whole cache holds; "
                              "allowed: a shorter prompt, or a smaller max_tokens")

    def add(self, request: Request, params: SchedulingParams) -> None:
        """Queue a request that `check` accepts."""
        if request.request_id in self._requests:
            raise reject("request_id", request.request_id, "an id that no unfinished request has")
        self._requests[request.request_id] = request
        if params.timeout_s is not None:
            self._deadlines[request.request_id] = request.metrics.arrival_time + params.timeout_s
        self._wait(QueuedSequence(request.sequences[0], request, params, work_before=self.num_tokens_run))

    def start(self, entry: QueuedSequence, num_computed_tokens: int) -> None:
        """Let a waiting sequence run; the cache holds its first `num_computed_tokens` tokens."""
        self.waiting.remove(entry)
        self.running.append(entry)
        entry.tokens_this_turn = 0
        entry.sequence.set_status(SequenceStatus.RUNNING)
        entry.sequence.num_computed_tokens = num_computed_tokens
        if entry.request.metrics.first_scheduled_time is None:
            entry.request.metrics.first_scheduled_time = self.clock()

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Add one more output of a running request, which has computed what its parent has.

        Where there is no room for the child, it waits like a preempted sequence and will be computed on its own.
        """
        origin = self._entries[parent.seq_id]
        entry = replace(origin, sequence=child, tokens_this_turn=0)
        if self.has_place(entry) and self.kv_cache_manager.fork(parent, child):
            child.num_computed_tokens = parent.num_computed_tokens
            self._entries[child.seq_id] = entry
            self.running.append(entry)
        else:
            child.set_status(SequenceStatus.WAITING)
            child.num_computed_tokens = 0
            self._wait(entry)

    def admit(self, entry: QueuedSequence, start: int, num_tokens: int, in_step: Collection[QueuedSequence],
              num_more: int = 0) -> tuple[Admission, list[QueuedSequence]]:
        """Let a waiting sequence run tokens [start, start + num_tokens), if there is a place and room in the cache.

        There has to be room for `num_more` tokens behind them as well; it is not taken yet. Where the policy lets it,
        running sequences that are not `in_step` give way, the fewest that help. Returns what became of it, and the
        victims.
        """
        victims = self._victims_for(entry, start, num_tokens, num_more, in_step)
        if isinstance(victims, Admission):
            return victims, []
        for victim in victims:
            self.preempt(victim)
        if victims:
            allocated = self.kv_cache_manager.allocate_slots(entry.sequence, start, num_tokens)
            assert allocated, "fits_without has said so"
        self.start(entry, start)
        return Admission.ADMITTED, victims

    def _victims_for(self, entry: QueuedSequence, start: int, num_tokens: int, num_more: int,
                     in_step: Collection[QueuedSequence]) -> list[QueuedSequence] | Admission:
        """Who has to leave for a newcomer: nobody, and its slots are allocated by now; or why it has to wait."""
        has_place = self.has_place(entry)
        fits_now = not num_more or self._fits_without(entry, start, num_tokens + num_more, [])
        if has_place and fits_now and self.kv_cache_manager.allocate_slots(entry.sequence, start, num_tokens):
            return []
        num_tokens += num_more
        candidates = [e for e in self.running if e not in in_step and self.policy.may_displace(entry, e)]
        candidates.sort(key=self.policy.key, reverse=True)
        if not self._fits_without(entry, start, num_tokens, candidates):
            return Admission.NO_BLOCKS if has_place else Admission.NO_PLACE
        victims: list[QueuedSequence] = []
        while not self._fits_without(entry, start, num_tokens, victims):
            victims.append(candidates[len(victims)])
        return victims

    def _fits_without(self, entry: QueuedSequence, start: int, num_tokens: int, victims: list[QueuedSequence]) -> bool:
        """Whether there would be a place and room for a newcomer, once `victims` are preempted."""
        return self.has_place(entry, without=victims) and self.kv_cache_manager.fits_without(
            entry.sequence, start, num_tokens, [victim.sequence for victim in victims])

    def extend(self, entry: QueuedSequence, start: int, num_tokens: int, others: list[QueuedSequence],
               key: Callable[[QueuedSequence], Key]) -> tuple[bool, list[QueuedSequence]]:
        """Make room for a running sequence's next tokens; the one with the largest key, of it and `others`, gives way.

        Victims are taken out of `others`. Returns whether it may run, and the victims.
        """
        victims: list[QueuedSequence] = []
        while not self.kv_cache_manager.allocate_slots(entry.sequence, start, num_tokens):
            victim = max((entry, *others), key=key)
            self.preempt(victim)
            victims.append(victim)
            if victim is entry:
                return False, victims
            others.remove(victim)
        return True, victims

    def preempt(self, entry: QueuedSequence) -> None:
        """Send a running sequence back to the queue. It keeps its tokens; if it keeps its cache, the manager says."""
        self.running.remove(entry)
        entry.sequence.set_status(self.kv_cache_manager.preempt(entry.sequence))
        if entry.sequence.status is SequenceStatus.WAITING:
            entry.sequence.num_computed_tokens = 0              # to be recomputed
        self._wait(entry)

    def finish(self, sequence: Sequence) -> None:
        """A sequence has reached a final state: forget it and take back what it holds."""
        entry = self._entries.pop(sequence.seq_id)
        (self.running if entry in self.running else self.waiting).remove(entry)
        self.kv_cache_manager.free(sequence)
        if entry.request.is_finished:
            self._forget(entry.request)

    def abort(self, request_id: str) -> Request | None:
        """Abort what is unfinished of a request and take back what it holds; None for an unknown id."""
        request = self._requests.get(request_id)
        if request is not None:
            for sequence in request.sequences:
                if not sequence.is_finished:
                    if sequence.ends_as is not None and isinstance(sequence.stop_reason, int):
                        sequence.stop_reason = None         # its last token was not concluded: the abort came first
                    sequence.ends_as = None
                    sequence.set_status(SequenceStatus.FINISHED_ABORTED)
                    self.finish(sequence)
            self._forget(request)
        return request

    def expire(self) -> list[Request]:
        """Abort the requests whose time limit has passed, and return them."""
        now = self.clock()
        late = [self._requests[request_id] for request_id, deadline in self._deadlines.items() if now > deadline]
        for request in late:
            for sequence in request.sequences:
                if not sequence.is_finished:
                    sequence.stop_reason = TIME_LIMIT
            self.abort(request.request_id)
        return late

    def has_place(self, entry: QueuedSequence, without: Iterable[QueuedSequence] = ()) -> bool:
        """Whether one more may run, by the number of places that the policy lets `entry` see.

        `without`: running sequences that are about to leave.
        """
        running = [e for e in self.running if e not in without] if without else self.running
        return len(running) < self.policy.share(entry, [(e, 1) for e in running], self.max_num_seqs)

    def get_entry(self, sequence: Sequence) -> QueuedSequence | None:
        """The entry of a sequence that waits or runs; None for one that has ended."""
        return self._entries.get(sequence.seq_id)

    def get_request(self, sequence: Sequence) -> Request:
        """The request of a sequence that waits or runs."""
        return self._entries[sequence.seq_id].request

    def has_unfinished_requests(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._entries)

    def sort_anew(self, sequence: Sequence) -> None:
        """What a waiting sequence's place depends on has changed, such as how much of it is computed."""
        entry = self._entries[sequence.seq_id]
        if entry in self.waiting:
            self.waiting.remove(entry)
            bisect.insort(self.waiting, entry, key=self.policy.key)

    def _wait(self, entry: QueuedSequence) -> None:
        self._entries[entry.sequence.seq_id] = entry
        self._num_queued += 1
        entry.queue_number = self._num_queued
        bisect.insort(self.waiting, entry, key=self.policy.key)

    def _forget(self, request: Request) -> None:
        """The request has ended."""
        self._requests.pop(request.request_id, None)
        self._deadlines.pop(request.request_id, None)
