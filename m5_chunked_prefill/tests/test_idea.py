"""The milestone's idea in 80 lines does what its engine does, and runs by itself."""
from __future__ import annotations

import copy
import random

import pytest
import torch

from m0_basics.attention import ScheduledSequence
from m0_basics.request import Sequence, SequenceData
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.idea import run_idea
from m5_chunked_prefill import idea
from m5_chunked_prefill.speculation import keep_agreeing


def test_it_runs_by_itself() -> None:
    printed = run_idea("m5_chunked_prefill")
    assert "step 2: A runs 1 token, B has 14 of 20" in printed
    assert "3 tokens from one step" in printed


@pytest.mark.parametrize("budget", [1, 3, 8, 64])
def test_any_budget_gives_the_same_tokens(budget: int) -> None:
    texts = [idea.Text([1 + i for i in range(n)]) for n in (1, 5, 9)]
    alone = [idea.Text(text.tokens.copy()) for text in texts]
    for text in alone:
        for _ in range(4):
            idea.step([text], budget=64)
    for _ in range(200):
        idea.step([t for t, a in zip(texts, alone, strict=True) if len(t.tokens) < len(a.tokens)], budget)
    assert [t.tokens for t in texts] == [a.tokens for a in alone]


def test_it_keeps_what_the_engine_keeps() -> None:
    """`verify` against `keep_agreeing`, on guesses of any quality."""
    dice = random.Random(0)
    torch.manual_seed(1)
    for trial in range(60):
        text = idea.Text([dice.randrange(idea.VOCAB) for _ in range(4)])
        idea.step([text], budget=64)
        probe = copy.deepcopy(text)
        for _ in range(4):
            idea.step([probe], budget=64)
        truth = probe.tokens[len(text.tokens):]
        guesses = [t if dice.random() < 0.7 else (t + 1) % idea.VOCAB for t in truth[:trial % 4]]
        following = copy.deepcopy(text).run([text.tokens[-1], *guesses]).tolist()
        sequence = Sequence(0, SequenceData([0], [0]), SamplingParams(), 0)
        scheduled = [ScheduledSequence(sequence, 1, 1 + len(guesses), tuple(guesses))]
        kept, num_kept = keep_agreeing(scheduled, [(sequence, token, None) for token in following])
        mine = idea.verify(text, guesses)
        assert mine == ([token for _, token, _ in kept] if guesses else following)
        assert num_kept == ({0: len(mine)} if guesses else {})
