"""Mixed steps: every decode first, then pieces of prompts as far as the step's budget goes.

    step   1               2               3               4
    A   [ decode ]      [ decode ]      [ decode ]      [ decode ]      nobody waits for a whole prompt
    B   [0 .. 256)      [256 .. 512)    [512 .. 600)*   [ decode ]      * its last piece: the first token is sampled
    C                                   [0 .. 40)*      [ decode ]      several requests' pieces in one step

A step is as long as the longest wait between two tokens of those who decode. So its length is what is limited, and
prompts get what is left of it. Drafted tokens (speculation.py) ride along as a chunk behind a decode.
"""
from __future__ import annotations

from functools import partial
from heapq import merge

from m0_basics.attention import ScheduledSequence
from m0_basics.request import Request, SequenceStatus
from m2_continuous_batching.policies import Key, QueuedSequence, SchedulingParams
from m2_continuous_batching.queues import Admission, Queues
from m2_continuous_batching.scheduler import DEFAULT_TOKEN_BUDGET, Sampled, Scheduler, SchedulerOutput

from .speculation import Speculation, keep_agreeing
from .step_cost import StepBudget, StepShape


class ChunkedPrefillScheduler(Scheduler):
    """Decodes first, then chunks of prompts, the running ones and newcomers in one order."""

    def __init__(self, queues: Queues, budget: StepBudget, max_num_batched_tokens: int | None = None,
                 speculation: Speculation | None = None) -> None:
        """`max_num_batched_tokens` None: DEFAULT_TOKEN_BUDGET, of which `budget` says how much a step takes."""
        super().__init__(queues, max_num_batched_tokens or DEFAULT_TOKEN_BUDGET)
        self.budget = budget
        self.speculation = speculation

    def check_request(self, request: Request, params: SchedulingParams) -> None:
        self.queues.check(request, params)

    def _choose(self, output: SchedulerOutput) -> None:
        self._schedule_decodes(output)
        if self.speculation is not None:
            self._add_drafts(output)
        self._schedule_chunks(output)

    # ---- decodes

    def _schedule_decodes(self, output: SchedulerOutput) -> None:
        """One token each. For its block, who is amid its prompt gives way first, then the last of those who decode."""
        self.running.sort(key=self.queues.policy.key)
        order = [e for e in self.running if not _is_prefilling(e)]
        others = [e for e in self.running if _is_prefilling(e)]
        if len(order) > self.token_budget:
            order.sort(key=lambda e: e.last_step)       # who is left out goes first next time
        while order and len(output.scheduled) < self.token_budget:
            entry = order.pop(0)
            start = entry.sequence.num_computed_tokens
            may_leave = [*order, *others]
            has_room, victims = self.queues.extend(entry, start, 1, may_leave, partial(self._leaves_first, entry))
            output.preempted.extend(victim.sequence for victim in victims)
            order = [e for e in order if e not in victims]
            others = [e for e in others if e not in victims]
            if has_room:
                output.scheduled.append(ScheduledSequence(entry.sequence, start, 1))

    def _leaves_first(self, decoding: QueuedSequence, entry: QueuedSequence) -> Key:
        """Half-read prompts, but for those that the policy lets displace the one that decodes."""
        policy = self.queues.policy
        return (_is_prefilling(entry) and not policy.may_displace(entry, decoding), *policy.key(entry))

    def _add_drafts(self, output: SchedulerOutput) -> None:
        """Let them run guesses behind their newest token, where blocks and budget are left; nobody leaves for them.

        Who guesses comes behind who does not: kernels take what stands in front with one token as plain decodes.
        """
        assert self.speculation is not None
        left, num_prompt_tokens = self.token_budget - len(output.scheduled), 0
        if len(self.running) == 1 and any(e.sequence.status is SequenceStatus.SWAPPED for e in self.waiting):
            return                                      # for its blocks, others would lose what they hold elsewhere
        if any(map(_is_prefilling, self.running)) or self._may_admit_next():
            left //= 2                                  # prompts get on as well
            decodes = StepShape.of(output.scheduled)
            num_prompt_tokens = self.budget.chunk(decodes, decodes, 0, left)
        drafts = self.speculation.propose([s.sequence for s in output.scheduled], left, num_prompt_tokens)
        for i, s in enumerate(output.scheduled):
            guesses = drafts.get(s.sequence.seq_id, ())
            if guesses and self.kv_cache_manager.allocate_slots(s.sequence, s.start, 1 + len(guesses)):
                output.scheduled[i] = ScheduledSequence(s.sequence, s.start, 1 + len(guesses), guesses)
        output.scheduled.sort(key=lambda s: bool(s.draft_token_ids))

    def _may_admit_next(self) -> bool:
        """Whether the first of those who wait has a place and room: else no prompt runs beside the decodes."""
        if not self.waiting or not self.queues.has_place(self.waiting[0]):
            return False
        sequence = self.waiting[0].sequence
        start = self.kv_cache_manager.get_num_computed_tokens(sequence)
        return self.kv_cache_manager.fits_without(sequence, start, sequence.num_tokens - start, [])

    def accept(self, output: SchedulerOutput, sampled: list[Sampled]) -> list[Sampled]:
        """Of each drafted sequence the tokens up to the first that its guess did not foresee, that one included."""
        if self.speculation is None:
            return sampled
        accepted, num_kept = keep_agreeing(output.scheduled, sampled)
        for s in output.scheduled:
            kept = num_kept.get(s.sequence.seq_id, 0)
            if kept and self.queues.get_entry(s.sequence) is not None:
                # What was computed for wrong guesses is overwritten; the blocks stay, they are needed soon.
                s.sequence.num_computed_tokens = s.start + kept
                self.speculation.observe(s.sequence, len(s.draft_token_ids), kept - 1)
        return accepted

    # ---- chunks

    def _schedule_chunks(self, output: SchedulerOutput) -> None:
        """Pieces of prompts, and of what is computed once more: those that have begun in the order of the policy.

        Newcomers come in the order of the queue, which plugins may have changed, each where the policy sees it.
        """
        decodes, step = StepShape.of(output.scheduled), StepShape.of(output.scheduled)
        used = [(self._entry(s), s.num_tokens) for s in output.scheduled]
        key = self.queues.policy.key
        prefilling = sorted((e for e in self.running if _is_prefilling(e)), key=key)
        full_lanes: set[str] = set()
        is_full, num_to_go_on = False, len(prefilling)
        for entry in merge(prefilling, self.waiting.copy(), key=key):
            is_running = entry in prefilling
            num_to_go_on -= is_running
            # After a preemption newcomers would take what others have just given up.
            is_full = is_full or bool(output.preempted)
            if is_full and not is_running:
                if num_to_go_on:
                    continue
                break
            if is_running and entry not in self.running:
                continue                                # it has given way to one before it
            if not is_running and self.queues.policy.lane(entry) in full_lanes:
                continue
            start, num_tokens = self._next_chunk(entry, used, decodes, step)
            if num_tokens <= 0:
                full_lanes.add(self.queues.policy.lane(entry))
                continue
            if is_running:
                admission = self._go_on(entry, start, num_tokens, used, output)
            else:
                admission = self._admit(entry, start, num_tokens, used, output)
            if admission is Admission.ADMITTED:
                output.scheduled.append(ScheduledSequence(entry.sequence, start, num_tokens))
                used.append((entry, num_tokens))
                step.add(start, num_tokens, start + num_tokens == entry.sequence.num_tokens)
            elif admission is Admission.NO_BLOCKS:
                is_full = True
            else:
                full_lanes.add(self.queues.policy.lane(entry))

    def _next_chunk(self, entry: QueuedSequence, used: list[tuple[QueuedSequence, int]], decodes: StepShape,
                    step: StepShape) -> tuple[int, int]:
        """From which token on, and how many, a sequence may run in this step."""
        sequence = entry.sequence
        start = (sequence.num_computed_tokens if entry in self.running
                 else self.kv_cache_manager.get_num_computed_tokens(sequence))
        left = self.queues.policy.share(entry, used, self.token_budget) - sum(n for _, n in used)
        num_tokens = min(left, sequence.num_tokens - start)
        return start, self.budget.chunk(decodes, step, start, num_tokens) if num_tokens > 0 else 0

    def _go_on(self, entry: QueuedSequence, start: int, num_tokens: int, used: list[tuple[QueuedSequence, int]],
               output: SchedulerOutput) -> Admission:
        """The next piece of a prompt that has begun; prompts behind it give way, it does not: it keeps what it has."""
        in_step = {id(e) for e, _ in used}
        behind = [e for e in self.running if _is_prefilling(e) and e is not entry and id(e) not in in_step]
        key = self.queues.policy.key
        behind.sort(key=key)
        while not self.kv_cache_manager.allocate_slots(entry.sequence, start, num_tokens):
            if not behind or key(behind[-1]) < key(entry):
                return Admission.NO_BLOCKS
            victim = behind.pop()
            self.queues.preempt(victim)
            output.preempted.append(victim.sequence)
        return Admission.ADMITTED

    def _admit(self, entry: QueuedSequence, start: int, num_tokens: int, used: list[tuple[QueuedSequence, int]],
               output: SchedulerOutput) -> Admission:
        """The first piece of a newcomer's tokens, once there is room for all: else it would soon be a victim."""
        num_more = entry.sequence.num_tokens - start - num_tokens
        admission, left = self.queues.admit(entry, start, num_tokens, [e for e, _ in used], num_more)
        output.preempted.extend(victim.sequence for victim in left)
        return admission

    def _entry(self, s: ScheduledSequence) -> QueuedSequence:
        entry = self.queues.get_entry(s.sequence)
        assert entry is not None
        return entry


def _is_prefilling(entry: QueuedSequence) -> bool:
    """Whether more than the newest token is left to compute. None is left where the newest is still being sampled."""
    return entry.sequence.num_tokens - entry.sequence.num_computed_tokens > 1
