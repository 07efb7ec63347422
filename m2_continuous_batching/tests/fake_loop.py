"""The scheduler without a model: a loop that appends made-up tokens, and distrusts every step it is given."""
from __future__ import annotations

import itertools
from collections.abc import Callable

from m0_basics.request import Request, RequestMetrics, Sequence, SequenceStatus, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m2_continuous_batching.kv_cache_manager import KVCacheManager, RowKVCacheManager, SlotCopy
from m2_continuous_batching.policies import Key, SchedulingParams, SchedulingPolicy, make_policy
from m2_continuous_batching.queues import Queues
from m2_continuous_batching.scheduler import PrefillFirstScheduler, SchedulerOutput

MAX_MODEL_LEN = 24
_ids = itertools.count()


def make_request(num_prompt: int, max_tokens: int | None = 4, arrival: float = 0.0, n: int = 1) -> Request:
    """A request for `n` outputs of `max_tokens` tokens each."""
    params = SamplingParams(n=n, max_tokens=max_tokens)
    return Request(f"r{next(_ids)}", None, [1] * num_prompt, params, metrics=RequestMetrics(arrival_time=arrival))


class SlotPool(KVCacheManager):
    """Slots handed out one by one, so that sequences run out of them while they decode."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.held: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return self.num_slots - sum(self.held.values())

    def get_num_computed_tokens(self, sequence: Sequence) -> int:
        return 0

    def allocate_slots(self, sequence: Sequence, num_computed_tokens: int, num_tokens: int) -> bool:
        return self._hold(sequence, num_computed_tokens + num_tokens)

    def fits_without(self, sequence: Sequence, num_computed_tokens: int, num_tokens: int,
                     victims: list[Sequence]) -> bool:
        return num_tokens <= self.num_free + sum(self.held[v.seq_id] for v in victims)

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        return self._hold(child, parent.num_computed_tokens)

    def _hold(self, sequence: Sequence, total: int) -> bool:
        held = self.held.get(sequence.seq_id, 0)
        if total - held > self.num_free:
            return False
        self.held[sequence.seq_id] = max(held, total)
        return True

    def preempt(self, sequence: Sequence) -> SequenceStatus:
        del self.held[sequence.seq_id]
        return SequenceStatus.WAITING

    def free(self, sequence: Sequence) -> None:
        self.held.pop(sequence.seq_id, None)

    def take_copies(self) -> list[SlotCopy]:
        return []

    @property
    def usage(self) -> float:
        return 1 - self.num_free / self.num_slots

    def can_ever_hold(self, num_tokens: int) -> bool:
        return num_tokens <= self.num_slots


class FakeLoop:
    """Schedules, checks, updates. A sequence is finished by max_tokens or by the longest length alone."""

    def __init__(self, policy: SchedulingPolicy, max_num_seqs: int = 2, max_num_batched_tokens: int = MAX_MODEL_LEN,
                 manager: KVCacheManager | None = None) -> None:
        self.now = 0.0
        self.manager = manager or RowKVCacheManager(max_num_seqs, MAX_MODEL_LEN)
        queues = Queues(policy, self.manager, max_num_seqs, MAX_MODEL_LEN, clock=lambda: self.now)
        self.scheduler = PrefillFirstScheduler(queues, max_num_batched_tokens)
        self.admitted: list[str] = []           # request ids in the order of their first run
        self.num_steps = 0
        self._prefilled_last = False

    def add(self, request: Request, params: SchedulingParams | None = None) -> Request:
        self.scheduler.check_request(request, params or SchedulingParams())
        self.scheduler.queues.add(request, params or SchedulingParams())
        return request

    def step(self) -> SchedulerOutput:
        running = {e.sequence for e in self.scheduler.running}
        held = dict(self.manager.held) if isinstance(self.manager, SlotPool) else {}
        computed = {e.sequence: e.sequence.num_computed_tokens for e in self.scheduler.running}
        keys = {e.sequence: self.scheduler.queues.policy.key(e) for e in self.scheduler.running}
        output = self.scheduler.schedule()
        self.num_steps += 1
        self._check(output, running, computed)
        self._check_victims(output, held, keys)
        families = [self._make_outputs(s.sequence) for s in output.scheduled]
        self.scheduler.update_from_output(output)
        for family in families:
            self._append(family)
        self.check_queues()
        return output

    def run(self, limit: int = 1000, until: Callable[[], bool] = lambda: False) -> int:
        """Step until all is done, or `until` says so, at most `limit` times; returns the number of steps."""
        for steps in range(limit + 1):
            if until() or not self.scheduler.queues.has_unfinished_requests():
                return steps
            self.step()
        raise AssertionError(f"not done after {limit} steps")

    def _make_outputs(self, sequence: Sequence) -> list[Sequence]:
        """With the first token of a request its outputs part: as in LLMEngine, before the step's tokens count."""
        request = self.scheduler.queues.get_request(sequence)
        if sequence.index > 0 or sequence.output_token_ids:
            return [sequence]
        self.admitted.append(request.request_id)
        return [sequence, *(sequence.fork(next_seq_id(), i) for i in range(1, sequence.sampling_params.best_of or 1))]

    def _append(self, family: list[Sequence]) -> None:
        request = self.scheduler.queues.get_request(family[0])
        for child in family[1:]:
            self.scheduler.queues.fork(family[0], child)
            request.sequences.append(child)
        for one in family:
            if one.status is not SequenceStatus.RUNNING:
                continue
            one.append_token_id(0)
            if len(one.output_token_ids) == one.sampling_params.max_tokens or one.num_tokens == MAX_MODEL_LEN:
                one.set_status(SequenceStatus.FINISHED_LENGTH_CAPPED)
                self.scheduler.queues.finish(one)

    def _check(self, output: SchedulerOutput, running: set[Sequence], computed: dict[Sequence, int]) -> None:
        """What holds for every step, whatever the policy."""
        scheduler = self.scheduler
        sequences = [s.sequence for s in output.scheduled]
        assert len(set(sequences)) == len(sequences), "a sequence is scheduled twice"
        assert len(sequences) <= scheduler.queues.max_num_seqs
        assert output.total_num_scheduled_tokens <= scheduler.max_num_batched_tokens
        assert not set(output.preempted) & set(sequences), "preempted in the step that runs it"
        assert len(set(output.preempted)) == len(output.preempted)
        assert set(output.preempted) <= running
        expired = {sequence for request in output.expired for sequence in request.sequences}
        assert all(sequence.is_finished for sequence in expired)
        for s in output.scheduled:
            assert s.num_tokens > 0
            assert s.start == s.sequence.num_computed_tokens == computed.get(s.sequence, 0)
            assert s.reaches_newest, "prompts run whole, and decoding sequences are one token behind"
        prefills = [s for s in output.scheduled if s.sequence not in running]
        if prefills:
            assert len(prefills) == len(output.scheduled), "a step is either prefill or decode"
            assert not (self._prefilled_last and running - expired), "two prefill steps while others wait to decode"
        if len(output.scheduled) > 1:
            assert output.total_num_scheduled_tokens <= scheduler.token_budget
        assert output.scheduled or not scheduler.queues.has_unfinished_requests(), "something waits, and nothing runs"
        self._prefilled_last = bool(prefills)

    def _check_victims(self, output: SchedulerOutput, held: dict[int, int], keys: dict[Sequence, Key]) -> None:
        """Nobody is sent away in vain: without the last victim the step would not have fitted.

        And nobody is sent away for one who comes after it: who stays without a token in this step goes before them.
        """
        if not output.preempted:
            return
        decodes = all(s.sequence.num_computed_tokens for s in output.scheduled)
        if decodes:
            stay = {e.sequence for e in self.scheduler.running} - {s.sequence for s in output.scheduled}
            assert all(keys[s] < keys[victim] for s in stay for victim in output.preempted), "a more urgent one leaves"
        if isinstance(self.manager, SlotPool):
            short = self.manager.num_free <= held[output.preempted[-1].seq_id]      # equal: it needed the room itself
            assert short or (not decodes and len(self.scheduler.running) == self.scheduler.queues.max_num_seqs)
        else:
            assert not decodes, "a row is long enough: only a newcomer displaces"

    def check_queues(self) -> None:
        """Queues, states of the sequences, and what the manager has handed out agree."""
        waiting = [e.sequence for e in self.scheduler.waiting]
        running = [e.sequence for e in self.scheduler.running]
        assert len({*waiting, *running}) == len(waiting) + len(running)
        assert len(running) <= self.scheduler.queues.max_num_seqs
        assert all(s.status is SequenceStatus.WAITING and s.num_computed_tokens == 0 for s in waiting)
        assert all(s.status is SequenceStatus.RUNNING and s.num_computed_tokens == s.num_tokens - 1 for s in running)
        holders = self.manager.held if isinstance(self.manager, SlotPool) else self.manager._row_of
        assert set(holders) == {s.seq_id for s in running}
        if isinstance(self.manager, RowKVCacheManager):
            rows = [*self.manager._free, *self.manager._row_of.values()]
            assert sorted(rows) == list(range(self.manager.num_rows)), "a row is lost, or held twice"
        else:
            assert self.manager.num_free >= 0


def loop_of(policy: str = "fcfs", rows: int = 2, tokens: int = MAX_MODEL_LEN, slots: int = 0) -> FakeLoop:
    return FakeLoop(make_policy(policy), rows, tokens, SlotPool(slots) if slots else None)


def who(output: SchedulerOutput, *requests: Request) -> dict[str, int]:
    """Letter of each request (a, b, ...) that runs -> tokens that it runs."""
    names = {s: name for name, r in zip("abcdefgh", requests, strict=False) for s in r.sequences}
    return {names[s.sequence]: s.num_tokens for s in output.scheduled}
