"""The engine under preemption, and its public face: the tokens stay, and nothing is left behind."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import m1_offline
from m0_basics.config import ConfigError
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.conformance import PROMPTS, greedy, ids_of
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import assert_same_tokens, reference_greedy
from m2_continuous_batching import LLM, SchedulingParams
from m2_continuous_batching.scheduler import SchedulerOutput
from m2_continuous_batching.tests.engine_lab import NUM_TOKENS, Lab, preempting


@pytest.fixture
def lab(tiny_model: TinyModels) -> Lab:
    return Lab(tiny_model)


class TestPreemption:
    """F2.6: a preempted sequence is computed again, and ends with the same tokens."""

    @pytest.mark.parametrize("options", [{}, {"max_num_seqs": 1}, {"attention_backend": "naive"},
                                         {"async_scheduling": True}], ids=["two rows", "one row", "naive", "async"])
    @pytest.mark.parametrize("seed", range(3))
    def test_tokens_equal_transformers(self, tiny_model: TinyModels, seed: int, options: dict[str, Any]) -> None:
        lab = preempting(tiny_model, seed, **options)
        assert_same_tokens(ids_of(lab.run(PROMPTS)), lab.reference(PROMPTS))
        assert lab.watcher.preempted >= 8
        lab.check_empty()

    @pytest.mark.slow
    @pytest.mark.parametrize("asynchronous", [False, True])
    @pytest.mark.parametrize("settings", [{"n": 3}, {"n": 2, "best_of": 5}, {"n": 4, "max_tokens": 1},
                                          {"n": 3, "max_tokens": 2}])
    def test_many_outputs(self, tiny_model: TinyModels, settings: dict[str, Any], asynchronous: bool) -> None:
        """More outputs than rows, and random preemption: m1, which has a row for each, says the same."""
        params = SamplingParams(**{"temperature": 1.5, "seed": 4, "max_tokens": 12, "ignore_eos": True, **settings})
        reference = m1_offline.LLM(str(tiny_model("qwen3")), dtype="float32", max_num_seqs=8, max_model_len=96)
        expected = reference.generate(PROMPTS[:3], params, use_tqdm=False)
        for seed in range(3):
            lab = preempting(tiny_model, seed, async_scheduling=asynchronous)
            for got, wanted in zip(lab.run(PROMPTS[:3], params), expected, strict=True):
                assert_same_tokens([o.token_ids for o in got.outputs], [o.token_ids for o in wanted.outputs])
                assert [o.finish_reason for o in got.outputs] == ["length"] * params.n
            assert lab.watcher.preempted > 0 or "max_tokens" in settings, "short outputs end before they are sent back"
            lab.check_empty()

    @pytest.mark.parametrize("seed", range(2))
    def test_logprobs_are_recorded_once(self, tiny_model: TinyModels, seed: int) -> None:
        params = greedy(logprobs=2, prompt_logprobs=2)
        reference = m1_offline.LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=96)
        lab = preempting(tiny_model, seed)
        for got, wanted in zip(lab.run(PROMPTS, params), reference.generate(PROMPTS, params, use_tqdm=False),
                               strict=True):
            output, expected = got.outputs[0], wanted.outputs[0]
            assert output.logprobs is not None
            assert expected.logprobs is not None
            assert got.prompt_logprobs is not None
            assert wanted.prompt_logprobs is not None
            assert len(output.logprobs) == NUM_TOKENS
            assert len(got.prompt_logprobs) == len(wanted.prompt_token_ids)
            both = zip([*got.prompt_logprobs[1:], *output.logprobs],
                       [*wanted.prompt_logprobs[1:], *expected.logprobs], strict=True)
            for mine, theirs in both:
                assert mine is not None
                assert theirs is not None
                assert set(mine) == set(theirs)
                for token, entry in theirs.items():
                    assert mine[token].logprob == pytest.approx(entry.logprob, abs=1e-3)
                    assert (mine[token].rank, mine[token].decoded_token) == (entry.rank, entry.decoded_token)
            assert output.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-2)
        assert lab.watcher.preempted >= 8

    def test_urgent_request_displaces_an_output_that_has_just_parted(self, tiny_model: TinyModels) -> None:
        """With async scheduling the prompt may be sent back while it runs: its outputs part when it runs again."""
        for options in ({}, {"async_scheduling": True}):
            lab = Lab(tiny_model, max_num_seqs=1, policy="priority", **options)
            params = SamplingParams(n=3, temperature=1.5, seed=4, max_tokens=6, ignore_eos=True)
            expected = [o.token_ids for o in lab.run(PROMPTS[1], params)[0].outputs]
            for steps in range(6):
                family, urgent = lab.request(PROMPTS[1], params), lab.request(PROMPTS[2])
                lab.engine.add_request(family, SchedulingParams(priority=1))
                for _ in range(steps):
                    lab.engine.step()
                lab.engine.add_request(urgent, SchedulingParams(priority=0))
                outputs = lab.finish()
                assert_same_tokens([o.token_ids for o in outputs[family.request_id].outputs], expected)
                assert_same_tokens(ids_of([outputs[urgent.request_id]]), lab.reference([PROMPTS[2]]))
                lab.check_empty()

    def test_prompt_sent_back_while_it_runs(self, tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a full cache may have it with async scheduling: the outputs part when the prompt runs again, and once."""
        lab = Lab(tiny_model, async_scheduling=True)
        params = SamplingParams(n=3, temperature=1.5, seed=4, max_tokens=6, ignore_eos=True)
        expected = [o.token_ids for o in lab.run(PROMPTS[1], params)[0].outputs]
        choose, sent_back = lab.engine._schedule, []

        def send_back() -> tuple[SchedulerOutput, int]:
            output, budget = choose()
            if len(sent_back) == 1:             # the first call chooses the prompt, the second while it runs
                entry = lab.scheduler.running[0]
                lab.scheduler.queues.preempt(entry)
                output.preempted.append(entry.sequence)
                output = replace(output, scheduled=[s for s in output.scheduled if s.sequence is not entry.sequence])
            sent_back.append(output)
            return output, budget

        monkeypatch.setattr(lab.engine, "_schedule", send_back)
        outputs = lab.run(PROMPTS[1], params)[0].outputs
        assert_same_tokens([o.token_ids for o in outputs], expected)
        lab.check_empty()

    def test_forks_do_not_run_the_prompt_again(self, tiny_model: TinyModels) -> None:
        """With a row for each, the outputs start with what the prompt has computed."""
        lab = Lab(tiny_model, max_num_seqs=4)
        params = SamplingParams(n=4, temperature=1.5, seed=4, max_tokens=6, ignore_eos=True)
        lab.run(PROMPTS[3], params)
        run = [stats.output.total_num_scheduled_tokens for stats in lab.watcher.stats]
        assert run == [len(PROMPTS[3]), 4, 4, 4, 4, 4]


class TestGenerate:
    """The public face, with what is new in it."""

    def test_scheduling_params(self, tiny_model: TinyModels) -> None:
        """Less urgent ones come first in the list and last out of the engine; one for all is accepted as well."""
        lab = Lab(tiny_model, max_num_seqs=1, policy="priority")
        outputs = lab.run(PROMPTS, scheduling_params=[SchedulingParams(priority=-i) for i in range(6)])
        assert_same_tokens(ids_of(outputs), lab.reference(PROMPTS))
        assert list(lab.watcher.completed) == [o.request_id for o in reversed(outputs)]
        one = lab.run(PROMPTS, scheduling_params=SchedulingParams(priority=1))
        assert_same_tokens(ids_of(one), lab.reference(PROMPTS))

    def test_bad_scheduling_params(self, lab: Lab) -> None:
        with pytest.raises(ConfigError, match="2 scheduling_params for 6 prompts; allowed: one, or one for each"):
            lab.run(PROMPTS, scheduling_params=[SchedulingParams()] * 2)
        with pytest.raises(ConfigError, match=r"sla_class='gold' is not valid; allowed: None, except under the sla"):
            lab.run(PROMPTS, scheduling_params=[SchedulingParams()] * 5 + [SchedulingParams(sla_class="gold")])
        lab.check_empty()
        assert lab.watcher.stats == [], "nothing has run"

    @pytest.mark.parametrize(("bad", "message"), [
        ([SchedulingParams()] * 5 + [3], r"scheduling_params\[5\]=3 is not valid; allowed: SchedulingParams"),
        (["fast"] * 6, r"scheduling_params\[0\]='fast' is not valid"),
        ("urgent", r"scheduling_params='urgent' is not valid; allowed: None, SchedulingParams, or a list"),
        ({"priority": 1}, r"scheduling_params=\{'priority': 1\} is not valid"),
    ])
    def test_scheduling_params_of_a_wrong_type(self, lab: Lab, bad: Any, message: str) -> None:
        messages = [[{"role": "user", "content": "on"}]] * 6
        for run in (lambda: lab.run(PROMPTS, scheduling_params=bad),
                    lambda: lab.llm.chat(messages, use_tqdm=False, scheduling_params=bad)):
            with pytest.raises(ConfigError, match=message):
                run()
        with pytest.raises(ConfigError, match="scheduling_params"):
            lab.llm.stream(PROMPTS[0], scheduling_params=bad)
        lab.check_empty()

    def test_scheduling_params_of_chats_and_streams(self, tiny_model: TinyModels) -> None:
        """They decide the order there as well, and are refused there as well."""
        lab = Lab(tiny_model, max_num_seqs=1, policy="priority")
        chats = [[{"role": "user", "content": text}] for text in ("on", "the", "one")]
        outputs = lab.llm.chat(chats, greedy(), use_tqdm=False,
                               scheduling_params=[SchedulingParams(priority=-i) for i in range(3)])
        assert list(lab.watcher.completed) == [o.request_id for o in reversed(outputs)]
        lab.watcher.completed.clear()
        streams = [lab.llm.stream(PROMPTS[i], greedy(), scheduling_params=SchedulingParams(priority=-i))
                   for i in range(3)]
        ids = [[o.request_id for o in stream][-1] for stream in streams]
        assert list(lab.watcher.completed) == ids[::-1]
        with pytest.raises(ConfigError, match="sla_class='gold'"):
            lab.llm.stream(PROMPTS[0], greedy(), scheduling_params=SchedulingParams(sla_class="gold"))
        with pytest.raises(ConfigError, match="unknown option priority; with a request this engine takes: scheduling"):
            lab.run(PROMPTS, priority=1)
        lab.check_empty()

    def test_step_stats_add_up(self, tiny_model: TinyModels) -> None:
        for options in ({}, {"policy": "round-robin:2"}):
            lab = Lab(tiny_model, **options)
            lab.run(PROMPTS)
            stats, recomputed = lab.watcher.stats, 0
            for s in stats:
                decodes = s.output.total_num_scheduled_tokens - s.num_prompt_tokens
                assert s.num_generation_tokens == len(s.output.scheduled)
                assert decodes in (0, s.num_generation_tokens), "a step is prefill, or one token for each"
                assert s.end_time >= s.start_time
                recomputed += sum(x.num_tokens for x in s.output.scheduled) - decodes if s.index else 0
            assert [s.index for s in stats] == list(range(len(stats)))
            assert sum(s.num_generation_tokens for s in stats) == 6 * NUM_TOKENS
            prompt_tokens = sum(map(len, PROMPTS))
            if options:
                assert sum(s.num_prompt_tokens for s in stats) > prompt_tokens
                assert lab.watcher.preempted > 0
            else:
                assert sum(s.num_prompt_tokens for s in stats) == prompt_tokens
            assert stats[-1].num_running == stats[-1].num_waiting == stats[-1].kv_cache_usage == 0
            assert max(s.kv_cache_usage for s in stats) == 1

    def test_stream_while_generate_runs(self, tiny_model: TinyModels) -> None:
        """The stream's tokens arrive in the mailbox step by step, while `generate` steps the engine."""
        lab = Lab(tiny_model, policy="round-robin:2")
        stream = lab.llm.stream(PROMPTS[0], greedy())
        parts = [next(stream)]
        generated = lab.run(PROMPTS[1:])
        steps = len(lab.watcher.stats)
        parts += list(stream)
        assert len(lab.watcher.stats) == steps, "it was done before"
        assert_same_tokens([[i for p in parts for i in p.outputs[0].token_ids]], lab.reference(PROMPTS[:1]))
        assert_same_tokens(ids_of(generated), lab.reference(PROMPTS[1:]))
        lab.check_empty()

    def test_bfloat16(self, tiny_model: TinyModels) -> None:
        """The first tokens are those of m1 in the same precision, whose arithmetic differs in rounding only."""
        folder = str(tiny_model("qwen3"))
        ours = LLM(folder, dtype="bfloat16", max_model_len=96).generate(PROMPTS, greedy(4), use_tqdm=False)
        theirs = m1_offline.LLM(folder, dtype="bfloat16", max_model_len=96).generate(PROMPTS, greedy(4),
                                                                                     use_tqdm=False)
        assert [len(ids) for ids in ids_of(ours)] == [4] * 6
        assert [ids[0] for ids in ids_of(ours)] == [ids[0] for ids in ids_of(theirs)]
        mixed = LLM(folder, dtype="float32", kv_cache_dtype="bfloat16", max_model_len=96)
        assert mixed.cache.kv_cache.k.dtype == torch.bfloat16
        assert [ids[0] for ids in ids_of(mixed.generate(PROMPTS, greedy(4), use_tqdm=False))] == [
            ids[0] for ids in reference_greedy(tiny_model("qwen3"), PROMPTS, 1)]
