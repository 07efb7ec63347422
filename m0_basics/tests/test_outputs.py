"""F0.8: what a request returns, and why it ended."""
from __future__ import annotations

import pytest

from m0_basics.outputs import CompletionOutput, RequestOutput
from m0_basics.request import Logprob, Request, SequenceStatus, next_seq_id
from m0_basics.sampling_params import SamplingParams

S = SequenceStatus


def make_request(num_sequences: int = 1, **settings) -> Request:
    request = Request("7", "text", [1, 2], SamplingParams(**settings))
    for index in range(1, num_sequences):
        request.sequences.append(request.sequences[0].fork(next_seq_id(), index))
    for sequence in request.sequences:
        sequence.set_status(S.RUNNING)
    return request


@pytest.mark.parametrize(("status", "reason"), [
    (S.FINISHED_STOPPED, "stop"), (S.FINISHED_LENGTH_CAPPED, "length"), (S.FINISHED_ABORTED, "abort")])
def test_finish_reasons(status, reason):
    request = make_request()
    running = RequestOutput.from_request(request)
    assert (running.finished, running.outputs[0].finish_reason) == (False, None)
    request.sequences[0].set_status(status)
    done = RequestOutput.from_request(request)
    assert (done.finished, done.outputs[0].finish_reason) == (True, reason)
    assert (done.request_id, done.prompt, done.prompt_token_ids) == ("7", "text", [1, 2])
    assert done.metrics is request.metrics


def test_an_output_is_a_snapshot():
    request = make_request(logprobs=1, prompt_logprobs=1)
    sequence = request.sequences[0]
    sequence.append_token_id(5)
    sequence.logprobs.append({5: Logprob(-0.5, 1)})
    sequence.prompt_logprobs += [None, {2: Logprob(-1.0, 3)}]
    sequence.cumulative_logprob, sequence.output_text = -0.5, "a"
    before = RequestOutput.from_request(request)
    sequence.append_token_id(6)
    sequence.logprobs.append({6: Logprob(-0.25, 1)})
    sequence.prompt_logprobs.append({3: Logprob(-9.0, 9)})
    sequence.cumulative_logprob, sequence.output_text, sequence.stop_reason = -0.75, "ab", "b"
    assert before.outputs == [CompletionOutput(0, "a", [5], -0.5, [{5: Logprob(-0.5, 1)}])]
    assert before.prompt_logprobs == [None, {2: Logprob(-1.0, 3)}]
    after = RequestOutput.from_request(request).outputs[0]
    assert (after.text, after.token_ids, after.cumulative_logprob, after.stop_reason) == ("ab", [5, 6], -0.75, "b")


def test_log_probabilities_come_only_where_asked_for():
    request = make_request()
    request.sequences[0].logprobs.append({5: Logprob(-0.5)})        # kept by an engine that ranks by them
    request.sequences[0].prompt_logprobs.append(None)
    output = RequestOutput.from_request(request)
    assert output.outputs[0].logprobs is None
    assert output.prompt_logprobs is None


def test_the_best_n_are_returned_once_all_are_finished():
    request = make_request(4, n=2, best_of=4)
    for sequence, total in zip(request.sequences, (-3.0, -1.0, -4.0, -2.0), strict=True):
        sequence.append_token_id(int(-total))
        sequence.cumulative_logprob = total
    assert [o.token_ids for o in RequestOutput.from_request(request).outputs] == [[3], [1], [4], [2]]
    for sequence in request.sequences:
        sequence.set_status(S.FINISHED_LENGTH_CAPPED)
    done = RequestOutput.from_request(request)
    assert [(o.index, o.token_ids, o.cumulative_logprob) for o in done.outputs] == [(0, [1], -1.0), (1, [2], -2.0)]


def test_n_outputs_keep_their_order():
    request = make_request(3, n=3)
    for sequence, total in zip(request.sequences, (-3.0, -1.0, -2.0), strict=True):
        sequence.cumulative_logprob = total
        sequence.set_status(S.FINISHED_STOPPED)
    outputs = RequestOutput.from_request(request).outputs
    assert [(o.index, o.cumulative_logprob) for o in outputs] == [(0, -3.0), (1, -1.0), (2, -2.0)]
