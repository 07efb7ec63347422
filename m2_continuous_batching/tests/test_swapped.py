"""F2.6: what a manager may do with a sequence that has to give way: throw its cache away, or keep it elsewhere."""
from __future__ import annotations

from m0_basics.request import Sequence, SequenceStatus
from m2_continuous_batching.policies import RoundRobinPolicy, SchedulingParams
from m2_continuous_batching.queues import Queues
from m2_continuous_batching.scheduler import PrefillFirstScheduler
from m2_continuous_batching.tests.fake_loop import SlotPool, make_request


class KeepingPool(SlotPool):
    """A pool that keeps what preempted sequences have computed, somewhere else."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self.kept: dict[int, int] = {}

    def get_num_computed_tokens(self, sequence: Sequence) -> int:
        return self.kept.get(sequence.seq_id, 0)

    def allocate_slots(self, sequence: Sequence, num_computed_tokens: int, num_tokens: int) -> bool:
        assert num_computed_tokens == self.kept.pop(sequence.seq_id, sequence.num_computed_tokens)
        return self._hold(sequence, num_computed_tokens + num_tokens)

    def preempt(self, sequence: Sequence) -> SequenceStatus:
        self.free(sequence)
        self.kept[sequence.seq_id] = sequence.num_computed_tokens
        return SequenceStatus.SWAPPED


def test_what_the_manager_keeps_is_not_recomputed() -> None:
    """F2.6: a SWAPPED sequence comes back where it was: one token runs, not its whole length."""
    scheduler = PrefillFirstScheduler(Queues(RoundRobinPolicy(2), KeepingPool(64), 1, 64))
    first, second = (make_request(num_prompt=5, max_tokens=9) for _ in range(2))
    for request in (first, second):
        scheduler.queues.add(request, SchedulingParams())
    steps = []
    for _ in range(6):
        output = scheduler.schedule()
        scheduler.update_from_output(output)
        for s in output.scheduled:
            s.sequence.append_token_id(0)
        [step] = output.scheduled
        steps.append((step.sequence is first.sequences[0], step.num_tokens, [s.status for s in output.preempted]))
    gone = [SequenceStatus.SWAPPED]
    assert steps == [(True, 5, []), (True, 1, []), (False, 5, gone), (False, 1, []), (True, 1, gone), (True, 1, [])]
    assert first.sequences[0].num_computed_tokens == 8
