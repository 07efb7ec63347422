"""How many guesses were checked, and how many were right: in all, and by their place in the draft."""
from __future__ import annotations

from m2_continuous_batching.plugins.base import CounterValue, SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Scheduler


class SpeculationStats(SchedulerPlugin):
    """Totals since the engine was made. A request counts up to its end: guesses behind its last token do not."""

    def __init__(self) -> None:
        self.num_drafts = 0                             # steps of one sequence that checked guesses
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.num_accepted_tokens_per_pos: list[int] = []

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        for s in stats.output.scheduled:
            if not s.draft_token_ids:
                continue
            num_new = s.sequence.num_tokens - s.start - 1           # the newest token ran at `start`
            if num_new < 1:
                continue                                            # it was sent back, or it failed: nothing was kept
            num_drafted = len(s.draft_token_ids)
            if s.sequence.is_finished:
                num_drafted = min(num_drafted, num_new)
            num_accepted = sum(self._agrees(s.sequence.data.token_slice(s.start + 1 + i, s.start + 2 + i), guess)
                               for i, guess in enumerate(s.draft_token_ids[:num_new]))
            self.num_drafts += 1
            self.num_draft_tokens += num_drafted
            self.num_accepted_tokens += num_accepted
            missing = num_accepted - len(self.num_accepted_tokens_per_pos)
            self.num_accepted_tokens_per_pos += [0] * missing
            for i in range(num_accepted):
                self.num_accepted_tokens_per_pos[i] += 1

    def counters(self) -> list[CounterValue]:
        """vLLM's counters of speculative decoding."""
        by_place = [CounterValue("spec_decode_num_accepted_tokens_per_pos", "Right guesses by place in the draft.",
                                 number, {"position": str(place)})
                    for place, number in enumerate(list(self.num_accepted_tokens_per_pos))]
        return [CounterValue("spec_decode_num_drafts", "Steps of a sequence that checked guesses.", self.num_drafts),
                CounterValue("spec_decode_num_draft_tokens", "Guesses that were checked.", self.num_draft_tokens),
                CounterValue("spec_decode_num_accepted_tokens", "Guesses that were right.", self.num_accepted_tokens),
                *by_place]

    @staticmethod
    def _agrees(token: list[int], guess: int) -> bool:
        return token == [guess]

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the checked guesses that were right; None before the first."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else None
