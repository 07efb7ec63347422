"""F2.7: failures, aborts and time limits end one request; the others stay as they are, and nothing is left."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from m0_basics.config import ConfigError
from m0_basics.model_runner import ModelRunner
from m0_basics.request import Request, Sequence
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.conformance import PROMPTS, greedy, ids_of
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import assert_same_tokens
from m1_offline.detokenizer import IncrementalDetokenizer
from m1_offline.output_processor import OutputProcessor
from m1_offline.sampler import FullSampler
from m2_continuous_batching import SchedulingParams
from m2_continuous_batching.tests.engine_lab import NUM_TOKENS, Lab


@pytest.fixture
def lab(tiny_model: TinyModels) -> Lab:
    return Lab(tiny_model)


class TestFailures:
    """F2.7: a failing request fails alone."""

    @pytest.mark.slow
    @pytest.mark.parametrize("place", ["sampler", "record", "conclude", "prepare_inputs", "execute"])
    @pytest.mark.parametrize("when", [0, 1, 7])
    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_fails_alone(self, tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch, place: str, when: int,
                         asynchronous: bool) -> None:
        """An error for the third request, once it has `when` tokens, wherever it comes from."""
        lab = Lab(tiny_model, max_num_seqs=4, async_scheduling=asynchronous)
        requests = [lab.request(p) for p in PROMPTS]
        victim = requests[2]
        self.break_at(lab, monkeypatch, place, lambda s: s in victim.sequences and self.tokens(s, place) >= when)
        for request in requests:
            lab.engine.add_request(request)
        outputs = lab.finish()
        rest = [i for i in range(len(PROMPTS)) if i != 2]
        assert_same_tokens(ids_of([outputs[requests[i].request_id] for i in rest]),
                           [lab.reference(PROMPTS)[i] for i in rest])
        failed = outputs[victim.request_id].outputs[0]
        assert failed.finish_reason == "abort"
        assert failed.stop_reason == "error: ValueError: out of cheese"
        assert when <= len(failed.token_ids) <= when + 1 + asynchronous
        assert lab.watcher.completed == dict.fromkeys(outputs, 1)
        lab.check_empty()
        assert_same_tokens(ids_of(lab.run(PROMPTS[3:])), lab.reference(PROMPTS[3:]))

    @pytest.mark.parametrize("place", ["sampler", "conclude", "execute"])
    @pytest.mark.parametrize("rows", [1, 2, 8])
    def test_one_output_takes_the_others_of_its_request_with_it(self, tiny_model: TinyModels, place: str, rows: int,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
        lab = Lab(tiny_model, max_num_seqs=rows)
        family = lab.request(PROMPTS[1], SamplingParams(n=3, temperature=1.0, seed=1, max_tokens=8, ignore_eos=True))
        other = lab.request(PROMPTS[2])
        self.break_at(lab, monkeypatch, place,
                      lambda s: s in family.sequences and s.index == 1 and self.tokens(s, place) >= 2)
        for request in (family, other):
            lab.engine.add_request(request)
        outputs = lab.finish()
        assert_same_tokens(ids_of([outputs[other.request_id]]), lab.reference([PROMPTS[2]]))
        reasons = [(o.finish_reason, o.stop_reason) for o in outputs[family.request_id].outputs]
        assert reasons[1] == ("abort", "error: ValueError: out of cheese")
        assert set(reasons) <= {reasons[1], ("length", None)}
        lab.check_empty()

    def test_error_that_does_not_come_again(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        """A step that fails once is run sequence by sequence; nobody is to blame, and nobody ends."""
        calls = iter([0, 0, 0, 1, 0, 0, 0, 0])
        self.break_at(lab, monkeypatch, "sampler", lambda s: next(calls, 0) == 1)
        outputs = lab.run(PROMPTS[:2], greedy(logprobs=1, prompt_logprobs=1))
        assert_same_tokens(ids_of(outputs), lab.reference(PROMPTS[:2]))
        assert [len(o.prompt_logprobs or []) for o in outputs] == [len(p) for p in PROMPTS[:2]]

    def test_text_that_cannot_be_written(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        """A tokenizer that fails takes the request along, also where the text is written only as it ends."""
        requests = [lab.request(p) for p in PROMPTS[:3]]
        for request in requests:
            lab.engine.add_request(request)
        for _ in range(3):
            lab.engine.step()
        lost = {requests[1].sequences[0].output_token_ids[1], requests[2].sequences[0].output_token_ids[0]}
        push = IncrementalDetokenizer.push

        def broken(self: IncrementalDetokenizer, token_id: int) -> str:
            if token_id in lost:
                raise ValueError("out of cheese")
            return push(self, token_id)

        monkeypatch.setattr(IncrementalDetokenizer, "push", broken)
        lab.engine.abort_request(requests[2].request_id)
        outputs = lab.finish()
        assert outputs[requests[1].request_id].outputs[0].stop_reason == "error: ValueError: out of cheese"
        assert outputs.keys() == {r.request_id for r in requests[:2]}
        assert requests[2].sequences[0].output_text == ""           # aborted; its text cannot be written either
        assert not lab.engine.output_processor._states
        lab.check_empty()

    def test_generate_returns_the_failed_one_among_the_others(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        self.break_at(lab, monkeypatch, "sampler", lambda s: s.num_prompt_tokens == len(PROMPTS[0]))
        outputs = lab.run(PROMPTS)
        assert_same_tokens(ids_of(outputs)[1:], lab.reference(PROMPTS)[1:])
        assert str(outputs[0].outputs[0].stop_reason).startswith("error: ValueError")
        assert outputs[0].outputs[0].token_ids == []

    @staticmethod
    def tokens(sequence: Sequence, place: str) -> int:
        """Tokens before the step in which an error at `place` happens."""
        return len(sequence.output_token_ids) - (place == "conclude")

    @staticmethod
    def break_at(lab: Lab, monkeypatch: pytest.MonkeyPatch, place: str, blamed: Callable[[Sequence], bool]) -> None:
        """Let one part raise for the sequences that are `blamed`."""
        owner, name = {"sampler": (FullSampler, "__call__"), "record": (OutputProcessor, "record"),
                       "conclude": (OutputProcessor, "conclude")}.get(place, (ModelRunner, place))
        work = getattr(owner, name)

        def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
            sequences = {"sampler": lambda: args[1], "execute": lambda: args[0].sampled,
                         "prepare_inputs": lambda: [s.sequence for s in args[0]]}.get(place, lambda: args[:1])()
            if any(blamed(s) for s in sequences):
                raise ValueError("out of cheese")
            return work(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, broken)


class TestEndings:
    """F2.7: aborts, time limits, and what is refused."""

    @pytest.mark.parametrize("hook", ["before_step", "after_step", "on_request_completion"])
    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_abort_at_every_moment_from_a_hook(self, tiny_model: TinyModels, hook: str, asynchronous: bool) -> None:
        """At its k-th call the hook aborts one request: once completed, once reported, and the others unchanged."""
        lab = Lab(tiny_model, async_scheduling=asynchronous)
        lengths = [4, 9, 16, 2]
        prompts, victim = PROMPTS[:4], 2
        reference = [r[:n] for r, n in zip(lab.reference(prompts), lengths, strict=True)]
        for k in range(1, 30, 3 if hook != "on_request_completion" else 1):
            requests = [lab.request(p, greedy(n)) for p, n in zip(prompts, lengths, strict=True)]
            calls = Counter[str]()

            def at(name: str, k: int = k, calls: Counter[str] = calls, requests: list[Request] = requests) -> None:
                calls[name] += 1
                if name == hook and calls[name] == k:
                    lab.engine.abort_request(requests[victim].request_id)

            lab.watcher.hook = at
            for request in requests:
                lab.engine.add_request(request)
            outputs = lab.finish()
            assert set(outputs) == {r.request_id for r in requests}, "each is reported, the aborted one as well"
            for i, request in enumerate(requests):
                assert lab.watcher.completed[request.request_id] == 1
                got = outputs[request.request_id].outputs[0].token_ids
                if i != victim or outputs[request.request_id].outputs[0].finish_reason == "length":
                    assert_same_tokens([got], [reference[i]])
                else:
                    assert got == reference[i][:len(got)]
            lab.check_empty()
            if calls[hook] < k:
                return
        raise AssertionError("the hook is called more often than there are steps")

    def test_generate_ends_where_a_plugin_aborts(self, tiny_model: TinyModels) -> None:
        lab = Lab(tiny_model)

        def abort_longest(name: str) -> None:
            if name == "before_step" and len(lab.watcher.stats) == 5:
                for entry in lab.scheduler.running.copy():
                    if entry.sequence.num_prompt_tokens == len(PROMPTS[0]):
                        lab.engine.abort_request(entry.request.request_id)

        lab.watcher.hook = abort_longest
        outputs = lab.run(PROMPTS)
        assert outputs[0].outputs[0].finish_reason == "abort"
        assert outputs[0].outputs[0].token_ids == lab.reference(PROMPTS)[0][:len(outputs[0].outputs[0].token_ids)]
        assert_same_tokens(ids_of(outputs)[1:], lab.reference(PROMPTS)[1:])

    def test_abort_while_the_model_runs(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        """From inside the step, before the first token and in mid-decode: as from an attention plugin."""
        execute = lab.engine.runner.execute
        for at in range(1, 8):
            requests = [lab.request(p) for p in PROMPTS]
            calls = Counter[str]()

            def run(inputs: Any, calls: Counter[str] = calls, at: int = at,
                    requests: list[Request] = requests) -> torch.Tensor:
                calls["run"] += 1
                if calls["run"] == at:
                    lab.engine.abort_request(requests[1].request_id)
                return execute(inputs)

            monkeypatch.setattr(lab.engine.runner, "execute", run)
            for request in requests:
                lab.engine.add_request(request)
            outputs = lab.finish()
            rest = [i for i in range(len(PROMPTS)) if i != 1]
            assert_same_tokens(ids_of([outputs[requests[i].request_id] for i in rest]),
                               [lab.reference(PROMPTS)[i] for i in rest])
            assert outputs[requests[1].request_id].outputs[0].finish_reason == "abort"
            lab.check_empty()

    @pytest.mark.parametrize("asynchronous", [False, True])
    def test_time_limit(self, tiny_model: TinyModels, asynchronous: bool) -> None:
        """The clock is the scheduler's: it jumps after the sixth step."""
        lab = Lab(tiny_model, async_scheduling=asynchronous)
        now = lab.scheduler.queues.clock()
        lab.scheduler.queues.clock = lambda: now + (100 if len(lab.watcher.stats) >= 6 else 0)
        limits = [SchedulingParams(timeout_s=50.0 if i in (0, 5) else 1000.0) for i in range(6)]
        outputs = lab.run(PROMPTS, scheduling_params=limits)
        reference = lab.reference(PROMPTS)
        for i, (output, expected) in enumerate(zip(outputs, reference, strict=True)):
            part = output.outputs[0]
            if i in (0, 5):         # one runs when its time is up, the other still waits
                assert (part.finish_reason, part.stop_reason) == ("abort", "time limit")
                assert part.token_ids == expected[:len(part.token_ids)]
            else:
                assert_same_tokens([part.token_ids], [expected])
        assert 0 < len(outputs[0].outputs[0].token_ids) < NUM_TOKENS
        assert outputs[5].outputs[0].token_ids == []
        lab.check_empty()

    def test_duplicate_request_id(self, lab: Lab) -> None:
        first, second = lab.request(PROMPTS[0]), lab.request(PROMPTS[1])
        second.request_id = first.request_id
        lab.engine.add_request(first)
        for _ in range(3):
            with pytest.raises(ConfigError, match=r"request_id=.* is not valid; allowed: an id that no unfinished"):
                lab.engine.add_request(second)
            lab.engine.step()
        assert_same_tokens(ids_of([lab.finish()[first.request_id]]), lab.reference(PROMPTS[:1]))
        lab.engine.add_request(second)          # its turn: the id is free
        assert_same_tokens(ids_of([lab.finish()[second.request_id]]), lab.reference(PROMPTS[1:2]))

    def test_what_can_never_fit_is_refused_and_the_engine_goes_on(self, lab: Lab) -> None:
        running = lab.add(PROMPTS[:2])
        lab.engine.step()
        lab.scheduler.kv_cache_manager.row_size = 60        # as if a row were shorter than the longest sequence
        with pytest.raises(ConfigError, match=r"may need 74 tokens of KV cache, more than the whole cache holds"):
            lab.engine.add_request(lab.request([1] * 59))
        with pytest.raises(ConfigError, match=r"sla_class='gold' is not valid; allowed: None"):
            lab.engine.add_request(lab.request([1]), SchedulingParams(sla_class="gold"))
        lab.scheduler.kv_cache_manager.row_size = 96
        outputs = lab.finish()
        assert_same_tokens(ids_of([outputs[r.request_id] for r in running]), lab.reference(PROMPTS[:2]))
        lab.check_empty()
