"""Schedulers of other kinds over the same engine: prompts in chunks beside decodes, and drafted tokens."""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from m0_basics.attention import ScheduledSequence
from m0_basics.config import ConfigError
from m0_basics.request import Request, Sequence
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.conformance import PROMPTS, greedy, ids_of
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import assert_same_tokens
from m2_continuous_batching.policies import SchedulingParams
from m2_continuous_batching.scheduler import Sampled, Scheduler, SchedulerOutput
from m2_continuous_batching.tests.engine_lab import NUM_TOKENS, Lab

Propose = Callable[[Sequence, int], tuple[int, ...]]


class MixedScheduler(Scheduler):
    """First come, first served; prompts in pieces of what decodes leave of the budget. Drafts what `propose` says."""

    def __init__(self, scheduler: Scheduler, token_budget: int, propose: Propose = lambda sequence, most: ()) -> None:
        """In the place of another scheduler, over its queues."""
        super().__init__(scheduler.queues, scheduler.max_num_batched_tokens)
        self.token_budget, self.propose = token_budget, propose
        self.num_drafted = self.num_accepted = self.num_steps = 0

    def check_request(self, request: Request, params: SchedulingParams) -> None:
        self.queues.check(request, params)

    def _choose(self, output: SchedulerOutput) -> None:
        self.num_steps += 1
        left = self.token_budget
        for entry in self.running.copy():
            sequence = entry.sequence
            start = sequence.num_computed_tokens
            rest = max(sequence.num_tokens - start, 1)      # one is coming, where the step under way has the others
            if left:
                drafts = self.propose(sequence, left - rest) if rest <= left else ()
                left -= self._add(output, sequence, start, min(rest, left) + len(drafts), drafts)
        for entry in self.waiting.copy():
            if left and self.queues.has_place(entry):
                self.queues.start(entry, 0)
                left -= self._add(output, entry.sequence, 0, min(entry.sequence.num_tokens, left), ())

    def _add(self, output: SchedulerOutput, sequence: Sequence, start: int, num_tokens: int,
             drafts: tuple[int, ...]) -> int:
        assert self.kv_cache_manager.allocate_slots(sequence, start, num_tokens)
        output.scheduled.append(ScheduledSequence(sequence, start, num_tokens, drafts))
        return num_tokens

    def accept(self, output: SchedulerOutput, sampled: list[Sampled]) -> list[Sampled]:
        rows, kept = iter(sampled), list[Sampled]()
        by_id = {s.sequence.seq_id: s for s in output.scheduled}
        for first in rows:
            s = by_id.get(first[0].seq_id)
            verified = [first, *(next(rows) for _ in (s.draft_token_ids if s else ()))]
            kept += [(first[0], token_id, logprobs) for _, token_id, logprobs in verified[:self._count(s, verified)]]
        return kept

    def _count(self, s: ScheduledSequence | None, verified: list[Sampled]) -> int:
        """How many of the tokens count: those of right guesses, and the one behind them. Takes back the others."""
        right = 0
        while right < len(verified) - 1 and verified[right][1] == s.draft_token_ids[right]:
            right += 1
        wrong = len(verified) - 1 - right
        if wrong:
            s.sequence.num_computed_tokens -= wrong
        self.num_drafted += len(verified) - 1
        self.num_accepted += right
        return right + 1


def with_scheduler(lab: Lab, scheduler: MixedScheduler) -> MixedScheduler:
    lab.scheduler = lab.engine.scheduler = scheduler
    return scheduler


@pytest.mark.parametrize("budget", [5, 16])
def test_chunks_beside_decodes(tiny_model: TinyModels, budget: int) -> None:
    """The same tokens; under async scheduling as many steps, give or take the last one."""
    num_steps = []
    for ahead in (False, True):
        lab = Lab(tiny_model, max_num_seqs=4, async_scheduling=ahead)
        scheduler = with_scheduler(lab, MixedScheduler(lab.engine.scheduler, budget))
        assert_same_tokens(ids_of(lab.run(PROMPTS)), lab.reference(PROMPTS))
        lab.check_empty()
        num_steps.append(scheduler.num_steps)
        prompt_tokens = sum(stats.num_prompt_tokens for stats in lab.watcher.stats)
        assert prompt_tokens == sum(map(len, PROMPTS)), "a chunk of one token is no decode"
    assert abs(num_steps[0] - num_steps[1]) <= 1 + budget // 5


@pytest.mark.parametrize("ahead", [False, True])
def test_several_outputs_beside_chunks(tiny_model: TinyModels, ahead: bool) -> None:
    """They part with the piece that ends their prompt; what does not find a place runs on its own."""
    params = SamplingParams(n=3, temperature=1.3, seed=3, max_tokens=9, ignore_eos=True)
    expected = Lab(tiny_model, max_num_seqs=8).run(PROMPTS, params)
    lab = Lab(tiny_model, max_num_seqs=4, async_scheduling=ahead)
    with_scheduler(lab, MixedScheduler(lab.engine.scheduler, 7))
    for ours, theirs in zip(lab.run(PROMPTS, params), expected, strict=True):
        assert [o.token_ids for o in ours.outputs] == [o.token_ids for o in theirs.outputs]
    lab.check_empty()


def oracle(truth: dict[tuple[int, ...], list[int]], quality: float) -> Propose:
    """Guesses the right tokens, each with a probability of `quality`."""
    dice = random.Random(1)

    def propose(sequence: Sequence, most: int) -> tuple[int, ...]:
        answer, done = truth[tuple(sequence.data.prompt_token_ids)], len(sequence.output_token_ids)
        if sequence.num_tokens - sequence.num_computed_tokens > 1 or not done:
            return ()
        return tuple(guesses(answer[done:done + max(0, min(most, 4))]))

    def guesses(right: list[int]) -> Iterator[int]:
        for token_id in right:
            yield token_id if dice.random() < quality else dice.randrange(5, 250)

    return propose


@pytest.mark.parametrize("quality", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("params", [greedy(), greedy(11, logprobs=2), SamplingParams(temperature=1.2, seed=7, n=1,
                                                                                     max_tokens=NUM_TOKENS)],
                         ids=["greedy", "logprobs", "sampled"])
def test_drafts_change_no_token(tiny_model: TinyModels, params: SamplingParams, quality: float) -> None:
    """A draw depends on seed and position alone, so a guess is right exactly where the draw would be the same."""
    lab = Lab(tiny_model, max_num_seqs=4)
    plain = lab.run(PROMPTS, params)
    num_plain_steps = len(lab.watcher.stats)
    truth = {tuple(o.prompt_token_ids): o.outputs[0].token_ids for o in plain}
    scheduler = with_scheduler(lab, MixedScheduler(lab.engine.scheduler, 96, oracle(truth, quality)))
    drafted = lab.run(PROMPTS, params)
    assert_same_tokens(ids_of(drafted), ids_of(plain))
    for ours, theirs in zip(drafted, plain, strict=True):
        assert ours.outputs[0].finish_reason == theirs.outputs[0].finish_reason
        assert len(ours.metrics.token_times) == len(theirs.metrics.token_times) == len(theirs.outputs[0].token_ids)
        # torch's float32 product sums in another order where it has other rows; eleven log-probabilities are added up.
        mine, other = (o.outputs[0].cumulative_logprob or 0 for o in (ours, theirs))
        assert mine == pytest.approx(other, 1e-5)
    lab.check_empty()
    assert scheduler.num_drafted > 0
    if quality == 1.0:
        assert scheduler.num_accepted == scheduler.num_drafted
        assert scheduler.num_steps < num_plain_steps / 2
    elif quality == 0.0:
        assert scheduler.num_accepted <= 2


def test_drafts_stop_where_the_sequence_does(tiny_model: TinyModels) -> None:
    """Of a step's tokens those behind a stop token, or behind a stop string, are not the sequence's."""
    lab = Lab(tiny_model, max_num_seqs=4)
    whole = lab.run(PROMPTS, greedy())
    truth = {tuple(o.prompt_token_ids): o.outputs[0].token_ids for o in whole}
    stops = [o.outputs[0].token_ids[4 + i % 3] for i, o in enumerate(whole)]
    texts = [lab.llm.get_tokenizer().decode([stop])[:1] or "?" for stop in stops]
    params = [greedy(stop_token_ids=[stop]) if i % 2 else greedy(stop=[text])
              for i, (stop, text) in enumerate(zip(stops, texts, strict=True))]
    plain = lab.run(PROMPTS, params)
    with_scheduler(lab, MixedScheduler(lab.engine.scheduler, 96, oracle(truth, 1.0)))
    drafted = lab.run(PROMPTS, params)
    assert [(o.outputs[0].token_ids, o.outputs[0].text, o.outputs[0].stop_reason) for o in drafted] == [
        (o.outputs[0].token_ids, o.outputs[0].text, o.outputs[0].stop_reason) for o in plain]
    assert any(len(o.outputs[0].token_ids) < NUM_TOKENS for o in plain)
    lab.check_empty()


def test_a_scheduler_may_have_limits_of_its_own(tiny_model: TinyModels) -> None:
    """That a step holds a whole prompt is a limit of who runs prompts whole."""
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens=8 is not valid; allowed: at least max_model_len=96"):
        Lab(tiny_model, max_num_batched_tokens=8)
