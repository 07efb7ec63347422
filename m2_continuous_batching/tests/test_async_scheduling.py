"""F2.14, F2.7: what happens between the moment a step is chosen and the moment it has run."""
from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from m0_basics.request import Request
from m0_basics.tools.testing.conformance import PROMPTS, greedy, ids_of
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import assert_same_tokens
from m2_continuous_batching.async_scheduling import AsyncSchedulingEngine
from m2_continuous_batching.policies import SchedulingParams
from m2_continuous_batching.tests.engine_lab import NUM_TOKENS, Lab


@pytest.fixture
def lab(tiny_model: TinyModels) -> Lab:
    lab = Lab(tiny_model, async_scheduling=True)
    assert isinstance(lab.engine, AsyncSchedulingEngine)
    return lab


def at_call(lab: Lab, k: int, action: Any) -> Counter[str]:
    """Do `action` in the k-th `before_step`: from the second on a step is under way when it is called."""
    calls = Counter[str]()

    def hook(name: str) -> None:
        calls[name] += 1
        if (name, calls[name]) == ("before_step", k):
            action()

    lab.watcher.hook = hook
    return calls


@pytest.mark.parametrize("k", range(2, 9))
def test_who_is_left_of_a_failed_step_is_not_to_blame(lab: Lab, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """The request that makes the step raise has gone when the error arrives; the other one goes on."""
    culprit, other = lab.request(PROMPTS[0]), lab.request(PROMPTS[1])
    execute, failures = lab.engine.runner.execute, []

    def broken(inputs: Any) -> Any:
        if len(inputs.scheduled) == 2 and calls["before_step"] >= k - 1:
            failures.append(k)
            raise ValueError("out of cheese")
        return execute(inputs)

    calls = at_call(lab, k, lambda: lab.engine.abort_request(culprit.request_id))
    monkeypatch.setattr(lab.engine.runner, "execute", broken)
    for request in (culprit, other):
        lab.engine.add_request(request)
    outputs = lab.finish()
    assert failures
    assert_same_tokens(ids_of([outputs[other.request_id]]), lab.reference([PROMPTS[1]]))
    assert outputs[culprit.request_id].outputs[0].finish_reason == "abort"
    lab.check_empty()


@pytest.mark.parametrize("k", range(1, 12))
def test_time_is_up_at_any_moment(lab: Lab, k: int) -> None:
    """Also of a prompt that was chosen ahead, or that runs just then; the others' tokens are unchanged."""
    now, late = lab.scheduler.queues.clock(), []
    lab.scheduler.queues.clock = lambda: now + (100 if late else 0)
    at_call(lab, k, lambda: late.append(True))
    requests = [lab.request(p, greedy(6, n=1)) for p in PROMPTS]
    for i, request in enumerate(requests):
        lab.engine.add_request(request, SchedulingParams(timeout_s=50.0 if i in (1, 2, 4) else None))
    outputs = lab.finish()
    assert set(outputs) == {r.request_id for r in requests}
    for request, expected in zip(requests, lab.reference(PROMPTS, 6), strict=True):
        part = outputs[request.request_id].outputs[0]
        if part.finish_reason == "abort":
            assert part.stop_reason == "time limit"
            assert part.token_ids == expected[:len(part.token_ids)]
        else:
            assert_same_tokens([part.token_ids], [expected])
    lab.check_empty()


@pytest.mark.parametrize("k", range(1, 6))
def test_the_end_of_the_last_requests_is_reported(tiny_model: TinyModels, k: int) -> None:
    """One runs, one waits, both run out of time in the same moment: both are told, and then nothing is left to do."""
    lab = Lab(tiny_model, async_scheduling=True, max_num_seqs=1)
    now, late = lab.scheduler.queues.clock(), []
    lab.scheduler.queues.clock = lambda: now + (100 if late else 0)
    at_call(lab, k, lambda: late.append(True))
    requests: list[Request] = [lab.request(p) for p in PROMPTS[:2]]
    for request in requests:
        lab.engine.add_request(request, SchedulingParams(timeout_s=50.0))
    outputs = lab.finish()
    assert [outputs[r.request_id].outputs[0].stop_reason for r in requests] == ["time limit"] * 2
    lab.check_empty()


@pytest.mark.parametrize("ending", ["length", "stop token"])
def test_no_token_is_run_beyond_the_end(lab: Lab, ending: str) -> None:
    """What a token ends is known as soon as it is recorded; only a stop string, which is text, is found later."""
    lengths = (5, 9)
    params = [greedy(n) for n in lengths]
    if ending == "stop token":
        references = lab.reference(PROMPTS[:2])
        params = [greedy(NUM_TOKENS, ignore_eos=False, stop_token_ids=[ids[n - 1]])
                  for ids, n in zip(references, lengths, strict=True)]
        lengths = tuple(ids.index(ids[n - 1]) + 1 for ids, n in zip(references, lengths, strict=True))
    lab.run(PROMPTS[:2], params)
    scheduled = Counter(s.sequence.seq_id for stats in lab.watcher.stats for s in stats.output.scheduled)
    assert sorted(scheduled.values()) == sorted(lengths)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_a_failed_step_has_computed_nothing(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch, ahead: bool,
                                            k: int) -> None:
    """When its cache is taken back, a sequence stands where its last good step left it."""
    lab, calls, left_at = Lab(tiny_model, async_scheduling=ahead), Counter[str](), []
    execute, free = lab.engine.runner.execute, lab.scheduler.kv_cache_manager.free

    def broken(inputs: Any) -> Any:
        calls["execute"] += 1
        if calls["execute"] >= k:
            raise ValueError("out of cheese")
        return execute(inputs)

    def watched(sequence: Any) -> None:
        left_at.append(sequence.num_computed_tokens)
        free(sequence)

    monkeypatch.setattr(lab.engine.runner, "execute", broken)
    monkeypatch.setattr(lab.scheduler.kv_cache_manager, "free", watched)
    [output] = lab.run(PROMPTS[:1])
    assert output.outputs[0].finish_reason == "abort"
    assert left_at == [0 if k == 1 else len(PROMPTS[0]) + k - 2]
    lab.check_empty()
