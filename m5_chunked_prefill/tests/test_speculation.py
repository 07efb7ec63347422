"""F5.6: how far to guess, which guesses are kept, and what is counted."""
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import m4_flash_attn as m4
from m0_basics.attention import ScheduledSequence
from m0_basics.config import ConfigError
from m0_basics.request import Sequence, SequenceData
from m0_basics.sampling_params import SamplingParams, StructuredOutputsParams
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.tiny_models import save_tiny_model
from m1_offline.sampler import distribution
from m2_continuous_batching.plugins.base import SchedulerPlugin, StepStats
from m2_continuous_batching.scheduler import Sampled, Scheduler
from m5_chunked_prefill import LLM
from m5_chunked_prefill.rejection import invert, kept_by_rejection, kept_by_same_draw, speculative_sample
from m5_chunked_prefill.speculation import keep_agreeing, plan
from m5_chunked_prefill.speculation_stats import SpeculationStats


def sequence_of(prompt: list[int], output: list[int], seq_id: int = 0) -> Sequence:
    return Sequence(seq_id, SequenceData(prompt, output), SamplingParams(temperature=0), 0)


class TestKeepAgreeing:
    """A drafted sequence between two others: which of its rows count."""

    def keep(self, drafts: tuple[int, ...], tokens: list[int]) -> tuple[list[tuple[int, int]], dict[int, int]]:
        before, drafted, after = (sequence_of([1], [2], seq_id) for seq_id in range(3))
        scheduled = [ScheduledSequence(before, 1, 1), ScheduledSequence(drafted, 1, 1 + len(drafts), drafts),
                     ScheduledSequence(after, 1, 1)]
        rows: list[Sampled] = [(before, 7, None)]
        rows += [(drafted.with_drafts(drafts[:i]), token, None) for i, token in enumerate(tokens)]
        kept, num_kept = keep_agreeing(scheduled, [*rows, (after, 8, None)])
        assert all(s in (before, drafted, after) for s, _, _ in kept), "the sequences themselves, no copies"
        return [(s.seq_id, token) for s, token, _ in kept], num_kept

    @pytest.mark.parametrize(("tokens", "kept"), [
        ([9, 5, 5, 5], [9]), ([3, 9, 5, 5], [3, 9]), ([3, 4, 9, 5], [3, 4, 9]), ([3, 4, 5, 9], [3, 4, 5, 9]),
        ([3, 9, 5, 9], [3, 9])], ids=["none is right", "one", "two", "all, and one more", "right again, too late"])
    def test_up_to_the_first_surprise(self, tokens: list[int], kept: list[int]) -> None:
        assert self.keep((3, 4, 5), tokens) == ([(0, 7), *((1, t) for t in kept), (2, 8)], {1: len(kept)})

    def test_a_step_that_ran_without_its_guesses(self) -> None:
        """After an error the guesses are left out: one row, whose token happens to be the guess."""
        assert self.keep((3, 4), [3]) == ([(0, 7), (1, 3), (2, 8)], {1: 1})


class TestPlan:
    @given(st.lists(st.tuples(st.floats(0.01, 0.99), st.integers(0, 6)), min_size=1, max_size=5), st.integers(0, 20),
           st.floats(0, 0.5), st.floats(0, 0.2))
    def test_no_other_order_of_taking_is_better(self, who: list[tuple[float, int]], most: int, row: float,
                                                deep: float) -> None:
        """Against every number of guesses, each taken where it adds most."""
        probabilities, limits = [p for p, _ in who], [limit for _, limit in who]

        def rate(lengths: list[int]) -> float:
            tokens = sum(sum(p ** j for j in range(n + 1)) for p, n in zip(probabilities, lengths, strict=True))
            return tokens / (1 + row * sum(lengths) + deep * max(lengths))

        chosen = plan(probabilities, limits, most, lambda n, depth: 1 + row * n + deep * depth)
        assert sum(chosen) <= most
        assert all(n <= limit for n, limit in zip(chosen, limits, strict=True))
        steps = sorted(((p ** j, -j, -i) for i, p in enumerate(probabilities) for j in range(1, limits[i] + 1)),
                       reverse=True)[:most]
        lengths, best = [0] * len(who), rate([0] * len(who))
        for _, _, i in steps:
            lengths[-i] += 1
            best = max(best, rate(lengths))
        assert rate(chosen) == pytest.approx(best, rel=1e-6)

    def test_who_is_right_more_often_gets_more(self) -> None:
        few, many = plan([0.3, 0.9], [8, 8], 100, lambda n, depth: 1 + 0.1 * n)
        assert few < many

    def test_nothing_where_rows_are_dear(self) -> None:
        assert plan([0.9, 0.9], [8, 8], 100, lambda n, depth: 1 + 2 * n) == [0, 0]

    def test_all_where_rows_are_free(self) -> None:
        assert plan([0.5, 0.1], [8, 3], 100, lambda n, depth: 1.0) == [8, 3]


class TestRejection:
    """The textbook's sampler, and how many guesses each way keeps."""

    def distributions(self, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        logits = 2 * torch.randn(2, 6)
        params = SamplingParams(temperature=temperature)
        return distribution(logits[0], params), distribution(logits[0] + 0.7 * logits[1], params)

    def test_tokens_are_distributed_as_the_targets(self) -> None:
        """Two guesses ahead, chi-square over 20,000 runs: for the first token, and for the one behind a kept guess."""
        p, q = self.distributions()
        torch.manual_seed(1)
        counts, total = torch.zeros(2, 6), 20_000
        numbers = torch.rand(total, 2 + 2 + 3)
        for u in numbers:
            drafts = [invert(q, u[0]), invert(q, u[1])]
            tokens = speculative_sample(torch.stack([p, p, p]), torch.stack([q, q]), drafts, u[2:4], u[4:7])
            counts[0, tokens[0]] += 1
            if len(tokens) > 1:
                counts[1, tokens[1]] += 1
        for row in counts:
            expected = p * row.sum()
            assert float(((row - expected) ** 2 / expected).sum()) < 20.5       # 5 degrees of freedom, 0.1 %

    def test_how_often_a_guess_is_kept(self) -> None:
        """Both closed forms against counting. Rejection keeps as much or more: it overlaps whole masses, not places."""
        p, q = self.distributions()
        torch.manual_seed(2)
        same = sum(invert(p, u) == invert(q, u) for u in torch.rand(20_000)) / 20_000
        assert same == pytest.approx(kept_by_same_draw(p, q), abs=0.015)
        kept = 0
        for u in torch.rand(20_000, 2):
            token = invert(q, u[0])
            kept += bool(u[1] * q[token] < p[token])
        assert kept / 20_000 == pytest.approx(kept_by_rejection(p, q), abs=0.015)
        assert kept_by_same_draw(p, q) <= kept_by_rejection(p, q) + 1e-6
        assert kept_by_same_draw(p, p) == pytest.approx(1)


class Watch(SchedulerPlugin):
    """What every step drafted and kept."""

    def __init__(self) -> None:
        self.num_steps, self.drafted = 0, list[int]()

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self.num_steps += 1
        self.drafted += [len(s.draft_token_ids) for s in stats.output.scheduled]


def stats_of(llm: LLM) -> SpeculationStats:
    return next(plugin for plugin in llm.engine.plugins if isinstance(plugin, SpeculationStats))


BASE: dict[str, Any] = {"dtype": "float32", "max_model_len": 256}
OPTIONS: dict[str, Any] = {**BASE, "num_speculative_tokens": 4, "adaptive_drafts": False}


def test_a_model_that_drafts_for_itself_is_always_right(tiny_model: TinyModels) -> None:
    """16 tokens: the prompt's step gives one, then 5 a step; what is behind the last one is not guessed."""
    model, watch = str(tiny_model("qwen3")), Watch()
    llm = LLM(model, plugins=[watch], speculative_method="draft_model", speculative_model=model, **OPTIONS)
    params = SamplingParams(temperature=0.8, seed=1, max_tokens=16, ignore_eos=True)
    prompt = {"prompt_token_ids": list(range(20, 60))}
    [output] = llm.generate([prompt], params, use_tqdm=False)
    assert watch.drafted == [0, 4, 4, 4]
    assert output.outputs[0].token_ids == m4.LLM(model, **BASE).generate([prompt], params)[0].outputs[0].token_ids
    stats = stats_of(llm)
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (3, 12, 12)
    assert stats.num_accepted_tokens_per_pos == [3, 3, 3, 3]
    assert stats.acceptance_rate == 1


def test_counts_end_with_the_request(tiny_model: TinyModels) -> None:
    """A stop token is the second of five: one guess before it counts, it does, and none behind it."""
    model = str(tiny_model("qwen3"))
    prompt = {"prompt_token_ids": list(range(20, 60))}
    free = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    tokens = m4.LLM(model, **BASE).generate([prompt], free)[0].outputs[0].token_ids
    stop = next(i for i in range(2, 5) if tokens[i] not in tokens[:i])
    llm = LLM(model, speculative_method="draft_model", speculative_model=model, **OPTIONS)
    params = SamplingParams(temperature=0, max_tokens=16, stop_token_ids=[tokens[stop]], ignore_eos=True)
    [output] = llm.generate([prompt], params, use_tqdm=False)
    assert output.outputs[0].token_ids in (tokens[:stop + 1], tokens[:stop])
    assert stats_of(llm).num_draft_tokens == stats_of(llm).num_accepted_tokens == stop


@pytest.mark.parametrize("method", ["suffix", "ngram"])
def test_structured_output(tiny_model: TinyModels, method: str) -> None:
    """Guesses that the grammar forbids, too: the second answer is guessed from the first, which had another grammar."""
    model = str(tiny_model("qwen3"))
    constraints = [StructuredOutputsParams(regex="(ab|cd){6}x"), StructuredOutputsParams(choice=["abababcd", "abba"]),
                   StructuredOutputsParams(json={"type": "object", "properties": {"a": {"type": "boolean"}},
                                                 "required": ["a"], "additionalProperties": False})]
    work = [SamplingParams(temperature=t, seed=3, max_tokens=24, structured_outputs=c)
            for c in constraints for t in (0.0, 0.9)]
    prompts = [{"prompt_token_ids": list(range(20, 40))}] * len(work)
    llm = LLM(model, speculative_method=method, **OPTIONS)
    texts = [[o.outputs[0].text for o in each.generate(prompts, work, use_tqdm=False)]
             for each in (m4.LLM(model, **BASE), llm, llm)]
    assert texts[0] == texts[1] == texts[2]
    assert stats_of(llm).num_draft_tokens > 0


@pytest.mark.parametrize(("options", "message"), [
    ({"speculative_method": "magic"}, "speculative_method='magic' is not valid; allowed: none, ngram, suffix"),
    ({"speculative_method": "draft_model"}, "needs speculative_model"),
    ({"speculative_method": "ngram", "speculative_model": "x"}, "is for speculative_method=draft_model"),
    ({"speculative_method": "ngram", "async_scheduling": True}, "async_scheduling chooses a step before"),
    ({"speculative_method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens=0"),
    ({"max_step_slowdown": 0.5}, "max_step_slowdown=0.5"),
    ({"max_step_slowdown": 2.0, "max_num_batched_tokens": 64}, "max_num_batched_tokens=64 limits"),
    ({"num_speculative_tokens": 4}, "num_speculative_tokens=4 is about guesses"),
    ({"adaptive_drafts": False}, "adaptive_drafts=False is about guesses"),
    ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0")])
def test_what_is_refused(tiny_model: TinyModels, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(str(tiny_model("qwen3")), **BASE, **options)


def test_a_draft_model_of_other_tokens_is_refused(tiny_model: TinyModels, tmp_path: Path) -> None:
    """One with more rows, and one with the same number of tokens, of which two have each other's number."""
    model = Path(tiny_model("qwen3"))
    larger = save_tiny_model(tmp_path / "larger", "qwen3", vocab_size=512)
    shutil.copytree(model, tmp_path / "swapped")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "swapped" / "tokenizer.json").write_text(json.dumps(tokenizer))
    for other in (larger, tmp_path / "swapped"):
        with pytest.raises(ConfigError, match="has another vocabulary"):
            LLM(str(model), speculative_method="draft_model", speculative_model=str(other), **BASE)
