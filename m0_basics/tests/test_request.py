"""F0.6, F0.7: forks are independent, and only the legal transitions of a sequence's state pass."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from m0_basics.request import (
    IllegalTransitionError,
    Logprob,
    Request,
    Sequence,
    SequenceData,
    SequenceStatus,
    next_seq_id,
)
from m0_basics.sampling_params import SamplingParams

S = SequenceStatus
FINISHED = {S.FINISHED_STOPPED: "stop", S.FINISHED_LENGTH_CAPPED: "length", S.FINISHED_ABORTED: "abort"}
# Written out by hand, arrow by arrow, as the state machine's specification.
ARROWS = {
    (S.WAITING, S.RUNNING),                 # scheduled
    (S.WAITING, S.FINISHED_ABORTED),        # cancelled while it waits
    (S.RUNNING, S.WAITING),                 # preempted, to be recomputed
    (S.RUNNING, S.SWAPPED),                 # preempted, its cache moved to the host
    (S.RUNNING, S.FINISHED_STOPPED), (S.RUNNING, S.FINISHED_LENGTH_CAPPED), (S.RUNNING, S.FINISHED_ABORTED),
    (S.SWAPPED, S.RUNNING),                 # its cache is back
    (S.SWAPPED, S.WAITING),                 # its cache was given up, to be recomputed
    (S.SWAPPED, S.FINISHED_ABORTED),
}


def make_sequence(status: SequenceStatus = S.WAITING) -> Sequence:
    return Sequence(next_seq_id(), SequenceData([1, 2, 3]), SamplingParams(), seed=5, eos_token_ids=(9,), status=status)


@pytest.mark.parametrize("source", S)
@pytest.mark.parametrize("target", S)
def test_every_transition(source, target):
    """F0.7: all 36 pairs."""
    sequence = make_sequence(source)
    if (source, target) in ARROWS:
        sequence.set_status(target)
        assert sequence.status is target
    else:
        with pytest.raises(IllegalTransitionError, match=f"{source.name} -> {target.name}; allowed: "):
            sequence.set_status(target)
        assert sequence.status is source, "a refused move changes nothing"


class Lifecycle(RuleBasedStateMachine):
    """F0.7: any series of moves, legal or not, keeps the sequence where the arrows lead."""

    def __init__(self):
        super().__init__()
        self.sequence = make_sequence()
        self.model = S.WAITING

    @rule(status=st.sampled_from(S))
    def move(self, status):
        legal = (self.model, status) in ARROWS
        try:
            self.sequence.set_status(status)
            assert legal
            self.model = status
        except IllegalTransitionError:
            assert not legal

    @invariant()
    def agrees_with_the_model(self):
        assert self.sequence.status is self.model
        assert self.sequence.is_finished == (self.model in FINISHED)
        assert self.sequence.status.finish_reason == FINISHED.get(self.model)


TestLifecycle = Lifecycle.TestCase


def test_the_message_says_what_is_allowed():
    with pytest.raises(IllegalTransitionError, match="WAITING -> SWAPPED; allowed: FINISHED_ABORTED, RUNNING"):
        make_sequence().set_status(S.SWAPPED)
    with pytest.raises(IllegalTransitionError, match="allowed: none, it is final"):
        make_sequence(S.FINISHED_STOPPED).set_status(S.RUNNING)


tokens = st.lists(st.integers(0, 99), max_size=8)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=8), tokens, tokens, tokens)
def test_changing_a_fork_leaves_its_parent_as_it_was(prompt, before, of_child, of_parent):
    """F0.6"""
    parent = Sequence(next_seq_id(), SequenceData(list(prompt)), SamplingParams(), seed=1, status=S.RUNNING)
    for token in before:
        parent.append_token_id(token)
        parent.logprobs.append({token: Logprob(-1.0)})
    parent.num_computed_tokens, parent.cumulative_logprob, parent.output_text = len(prompt), -2.0, "so far"
    child = parent.fork(next_seq_id(), index=3)
    assert (child.index, child.seed, child.status) == (3, 1, S.RUNNING)
    assert child.data.token_ids == prompt + before
    assert (child.num_computed_tokens, child.cumulative_logprob, child.output_text) == (len(prompt), -2.0, "so far")

    for token in of_child:
        child.append_token_id(token)
        child.logprobs.append({token: Logprob(-3.0)})
    child.cumulative_logprob, child.output_text, child.num_computed_tokens = -9.0, "other", 0
    child.prompt_logprobs.append(None)
    child.set_status(S.FINISHED_STOPPED)
    assert parent.data.token_ids == prompt + before
    assert parent.logprobs == [{token: Logprob(-1.0)} for token in before]
    assert (parent.cumulative_logprob, parent.output_text, parent.num_computed_tokens) == (-2.0, "so far", len(prompt))
    assert (parent.status, parent.prompt_logprobs, parent.index) == (S.RUNNING, [], 0)

    for token in of_parent:
        parent.append_token_id(token)
    assert child.data.token_ids == prompt + before + of_child
    assert parent.seq_id != child.seq_id


def test_a_fork_shares_the_prompt():
    """F0.6: the prompt is never changed, so one list serves all outputs."""
    parent = make_sequence()
    assert parent.fork(next_seq_id(), 1).data.prompt_token_ids is parent.data.prompt_token_ids


@given(st.lists(st.integers(0, 99), min_size=1, max_size=10), tokens, st.data())
def test_token_slice(prompt, output, data):
    """F0.6: a slice of the two lists is a slice of the two joined."""
    sequence_data = SequenceData(prompt, output)
    joined = prompt + output
    start = data.draw(st.integers(0, len(joined)))
    stop = data.draw(st.integers(start, len(joined)))
    assert sequence_data.token_slice(start, stop) == joined[start:stop]
    assert sequence_data.token_ids == joined
    assert len(sequence_data) == len(joined)


def test_counts():
    sequence = make_sequence()
    sequence.append_token_id(7)
    assert (sequence.num_tokens, sequence.num_prompt_tokens, sequence.output_token_ids) == (4, 3, [7])


def test_a_request_begins_with_one_sequence():
    params = SamplingParams(n=2)
    request = Request("a", "text", [1, 2], params, seed=4, eos_token_ids=(9,))
    [sequence] = request.sequences
    assert (sequence.seed, sequence.eos_token_ids, sequence.sampling_params) == (4, (9,), params)
    assert sequence.data.prompt_token_ids is request.prompt_token_ids
    request.sequences.append(sequence.fork(next_seq_id(), 1))
    sequence.set_status(S.RUNNING)
    assert request.get_seqs(S.RUNNING) == [sequence]
    assert request.get_seqs(S.WAITING) == request.sequences[1:]
    assert request.get_seqs() == request.sequences
    sequence.set_status(S.FINISHED_STOPPED)
    assert not request.is_finished
    request.sequences[1].set_status(S.FINISHED_ABORTED)
    assert request.is_finished


def test_first_token_time():
    request = Request("a", None, [1], SamplingParams())
    assert request.metrics.first_token_time is None
    request.metrics.token_times += [3.0, 4.0]
    assert request.metrics.first_token_time == 3.0


def test_seq_ids_are_never_reused():
    ids = [next_seq_id() for _ in range(100)]
    assert len(set(ids)) == 100


def test_a_salt_goes_to_every_sequence():
    request = Request("r", None, [1, 2], SamplingParams(), cache_salt="a")
    [sequence] = request.sequences
    assert sequence.cache_salt == sequence.fork(next_seq_id(), 1).cache_salt == "a"
    assert Request("s", None, [1], SamplingParams()).sequences[0].cache_salt == ""
