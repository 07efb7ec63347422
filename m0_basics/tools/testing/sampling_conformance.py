"""Behaviour of sampling: seeds, several outputs, truncation, penalties, log-probabilities (F1.3, F1.4).

Which token a seed draws is the engine's own affair. What is checked is that it draws the same one whatever
runs beside it, that it stays inside the set the parameters allow, and that every number reported is the
reference's. The exact distribution is the business of the sampler's own tests.
"""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from m0_basics.outputs import CompletionOutput
from m0_basics.sampling_params import SamplingParams

from .conformance import NUM_TOKENS, PROMPTS, Conformance, greedy, ids_of
from .parity import assert_same_tokens, reference_logits

# Close enough for logits computed in another order; far from any real error.
TOLERANCE = 1e-3


def sampled(**settings: Any) -> SamplingParams:
    """Temperature 1, no stop at an end-of-sequence token."""
    return SamplingParams(**{"temperature": 1.0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **settings})


class ReferenceRows(Conformance):
    """What the mixins need of the reference."""

    def rows(self, prompt: list[int], ids: list[int], variant: str = "qwen3") -> Tensor:
        """The reference's logits that predict each token of `ids` -> [len(ids), vocab]."""
        return reference_logits(self.tiny_model(variant), [*prompt, *ids])[len(prompt) - 1:-1]

    def logprobs_of(self, prompt: list[int], ids: list[int]) -> list[float]:
        logprobs = self.rows(prompt, ids).log_softmax(-1)
        return logprobs.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1).tolist()

    def check_logprobs(self, prompt: list[int], output: CompletionOutput, k: int) -> None:
        assert output.logprobs is not None
        assert len(output.logprobs) == len(output.token_ids)
        for row, entry, token in zip(self.rows(prompt, output.token_ids).log_softmax(-1), output.logprobs,
                                     output.token_ids, strict=True):
            check_entry(row, entry, token, k)
        total = sum(entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True))
        assert output.cumulative_logprob == pytest.approx(total, abs=1e-6)


class TokenSamplingConformance(ReferenceRows):
    """Drawing one token after the other, for engines with a full sampler."""

    def test_a_seed_reproduces(self) -> None:
        llm = self.make()
        first, again, fresh = (ids_of(self.run(engine, PROMPTS, sampled(seed=7, temperature=2.0)))
                               for engine in (llm, llm, self.make()))
        assert_same_tokens(again, first)
        assert_same_tokens(fresh, first)
        other = ids_of(self.run(llm, PROMPTS, sampled(seed=8, temperature=2.0)))
        assert all(a != b for a, b in zip(first, other, strict=True))

    def test_without_a_seed_the_engine_seed_decides(self) -> None:
        first = self.make(seed=3)
        a, b = (ids_of(self.run(first, PROMPTS, sampled(temperature=2.0))) for _ in range(2))
        assert all(x != y for x, y in zip(a, b, strict=True)), "each request draws a seed of its own"
        assert_same_tokens(ids_of(self.run(self.make(seed=3), PROMPTS, sampled(temperature=2.0))), a)
        assert ids_of(self.run(self.make(seed=4), PROMPTS, sampled(temperature=2.0))) != a

    def test_a_mixed_batch_gives_what_single_runs_give(self) -> None:
        params = [sampled(seed=1), greedy(), sampled(seed=2, top_k=5, temperature=2.0), sampled(seed=-3, top_p=0.7),
                  sampled(seed=4, min_p=0.1, repetition_penalty=1.2), sampled(seed=5, presence_penalty=1.0)]
        llm = self.make(**self.tiny_memory_options)
        alone = [ids_of(self.run(llm, prompt, p))[0] for prompt, p in zip(PROMPTS, params, strict=True)]
        assert_same_tokens(ids_of(self.run(llm, PROMPTS, params)), alone)
        assert_same_tokens(alone[1:2], self.reference(PROMPTS[1:2]))

    @pytest.mark.parametrize("settings", [{"temperature": 1e-6}, {"temperature": 1e-4}, {"top_k": 1},
                                          {"top_p": 1e-6}, {"min_p": 1.0}])
    def test_the_narrowest_sampling_is_greedy(self, settings: dict[str, Any]) -> None:
        outputs = self.run(self.make(), PROMPTS, sampled(seed=1, **settings))
        assert_same_tokens(ids_of(outputs), self.reference(PROMPTS))

    @pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2},
                                          {"top_k": 4, "top_p": 0.8, "temperature": 3.0}])
    def test_tokens_stay_in_the_allowed_set(self, settings: dict[str, Any]) -> None:
        llm, chosen_other_than_greedy = self.make(), 0
        for seed, prompt in enumerate(PROMPTS):
            ids = ids_of(self.run(llm, prompt, sampled(seed=seed, **settings)))[0]
            for logits, token in zip(self.rows(prompt, ids), ids, strict=True):
                assert token in allowed_set(logits, **settings)
                chosen_other_than_greedy += token != int(logits.argmax())
        assert chosen_other_than_greedy >= 5

    def test_repetition_penalty_equals_transformers(self) -> None:
        """transformers' processor counts prompt and output too, so greedy tokens have to be the same."""
        outputs = self.run(self.make(), PROMPTS, greedy(repetition_penalty=1.5))
        expected = self.reference(PROMPTS, repetition_penalty=1.5)
        assert_same_tokens(ids_of(outputs), expected)
        assert expected != self.reference(PROMPTS)

    @pytest.mark.parametrize(("presence", "frequency"), [(2.0, 0.0), (0.0, 1.5), (-2.0, -1.0)])
    def test_presence_and_frequency_penalty(self, presence: float, frequency: float) -> None:
        """Each token is the best one once the output so far is paid for, by the reference's logits."""
        prompts = PROMPTS[1:4]
        outputs = self.run(self.make("qwen3_bias"), prompts,
                           greedy(presence_penalty=presence, frequency_penalty=frequency))
        for prompt, ids in zip(prompts, ids_of(outputs), strict=True):
            for step, logits in enumerate(self.rows(prompt, ids, "qwen3_bias")):
                counts = torch.bincount(torch.tensor(ids[:step], dtype=torch.long), minlength=len(logits))
                assert ids[step] == int((logits - presence * (counts > 0) - frequency * counts).argmax())

    def test_logit_bias_and_allowed_tokens(self) -> None:
        llm = self.make()
        allowed = [3, 70, 141, 250]
        forced, limited = self.run(llm, [PROMPTS[0], PROMPTS[0]], [greedy(logit_bias={17: 100.0}),
                                                                  greedy(allowed_token_ids=allowed)])
        assert forced.outputs[0].token_ids == [17] * NUM_TOKENS
        ids = limited.outputs[0].token_ids
        assert ids == [allowed[int(row[allowed].argmax())] for row in self.rows(PROMPTS[0], ids)]

    def test_bad_words(self) -> None:
        llm = self.make("parrot")
        free, banned = self.run(llm, ["<|im_start|>"] * 2, [greedy(), greedy(bad_words=["é", "z?"])])
        assert "é" in free.outputs[0].text
        assert "z?" in free.outputs[0].text
        assert "é" not in banned.outputs[0].text
        assert "z?" not in banned.outputs[0].text

    def test_logprobs_equal_the_reference(self) -> None:
        llm = self.make()
        for params in (greedy(logprobs=5), sampled(seed=2, temperature=1.5, top_k=20, logprobs=5)):
            for prompt, output in zip(PROMPTS, self.run(llm, PROMPTS, params), strict=True):
                self.check_logprobs(prompt, output.outputs[0], 5)

    def test_logprobs_of_the_chosen_token_only(self) -> None:
        output = self.run(self.make(), PROMPTS[0], sampled(seed=2, logprobs=0))[0].outputs[0]
        assert output.logprobs is not None
        assert [list(entry) for entry in output.logprobs] == [[i] for i in output.token_ids]
        self.check_logprobs(PROMPTS[0], output, 0)

    def test_logprobs_are_off_by_default(self) -> None:
        output = self.run(self.make(), PROMPTS[0])[0]
        assert (output.outputs[0].logprobs, output.prompt_logprobs) == (None, None)


class ManyOutputsConformance(ReferenceRows):
    """n and best_of, for engines that run several outputs of one request."""

    def test_n_outputs(self) -> None:
        llm = self.make()
        outputs, again = (self.run(llm, PROMPTS[:2], sampled(n=3, seed=5, temperature=2.0)) for _ in range(2))
        for output, other in zip(outputs, again, strict=True):
            assert [part.index for part in output.outputs] == [0, 1, 2]
            assert len({tuple(part.token_ids) for part in output.outputs}) == 3
            assert_same_tokens([p.token_ids for p in other.outputs], [p.token_ids for p in output.outputs])
        one = self.run(llm, PROMPTS[0], sampled(seed=5, temperature=2.0))[0].outputs[0]
        assert outputs[0].outputs[0].token_ids == one.token_ids, "the first of n is the only one of 1"

    def test_n_outputs_in_tiny_memory(self) -> None:
        params = sampled(n=3, seed=5, temperature=2.0)
        roomy, tight = (self.run(llm, PROMPTS, params) for llm in (self.make(), self.make(**self.tiny_memory_options)))
        for a, b in zip(tight, roomy, strict=True):
            assert_same_tokens([p.token_ids for p in a.outputs], [p.token_ids for p in b.outputs])

    def test_best_of_returns_the_most_probable(self) -> None:
        llm = self.make()
        every = self.run(llm, PROMPTS[0], sampled(n=5, seed=9, temperature=2.0, logprobs=0))[0].outputs
        best = self.run(llm, PROMPTS[0], sampled(n=2, best_of=5, seed=9, temperature=2.0))[0].outputs
        totals = {tuple(p.token_ids): sum(self.logprobs_of(PROMPTS[0], p.token_ids)) for p in every}
        ranked = sorted(totals, key=lambda ids: -totals[ids])
        assert_same_tokens([p.token_ids for p in best], ranked[:2])
        assert [p.index for p in best] == [0, 1]

    def test_n_outputs_as_a_stream(self) -> None:
        llm, params = self.make(), sampled(n=3, seed=5, temperature=2.0)
        whole = self.run(llm, PROMPTS[0], params)[0].outputs
        tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
        texts = {0: "", 1: "", 2: ""}
        for part in llm.stream(PROMPTS[0], params):
            for output in part.outputs:
                tokens[output.index] += output.token_ids
                texts[output.index] += output.text
        assert_same_tokens([tokens[i] for i in range(3)], [p.token_ids for p in whole])
        assert [texts[i] for i in range(3)] == [p.text for p in whole]

    def test_best_of_as_a_stream_comes_at_the_end(self) -> None:
        """Which outputs are the best is not known before."""
        llm, params = self.make(), sampled(n=2, best_of=4, seed=9, temperature=2.0)
        whole = self.run(llm, PROMPTS[0], params)[0].outputs
        parts = [part for part in llm.stream(PROMPTS[0], params) if part.outputs]
        assert len(parts) == 1
        assert [(p.index, p.token_ids, p.text) for p in parts[0].outputs] == [
            (p.index, p.token_ids, p.text) for p in whole]


class PromptLogprobsConformance(ReferenceRows):
    """For engines that look at the logits of the prompt as well."""

    def test_prompt_logprobs_equal_the_reference(self) -> None:
        prompts = [*PROMPTS, [5] * 300]         # the last one is longer than any engine's chunk of prompt rows
        outputs = self.run(self.make(**self.tiny_memory_options), prompts[:-1], greedy(prompt_logprobs=3))
        outputs += self.run(self.make(), prompts[-1:], greedy(prompt_logprobs=3))
        for prompt, output in zip(prompts, outputs, strict=True):
            entries = output.prompt_logprobs
            assert entries is not None
            assert len(entries) == len(prompt)
            assert entries[0] is None
            logprobs = reference_logits(self.tiny_model("qwen3"), prompt).log_softmax(-1)
            for row, entry, token in zip(logprobs, entries[1:], prompt[1:], strict=False):
                assert entry is not None
                check_entry(row, entry, token, 3)
        assert_same_tokens(ids_of(outputs), self.reference(prompts))


class SamplingConformance(TokenSamplingConformance, ManyOutputsConformance, PromptLogprobsConformance):
    """All of it."""


def check_entry(row: Tensor, entry: dict[int, Any], token: int, k: int) -> None:
    """row [vocab] of reference log-probabilities: the k best and the chosen token, with value and rank."""
    best = set(row.topk(k).indices.tolist())
    assert set(entry) == best | {token}
    for token_id, logprob in entry.items():
        assert logprob.logprob == pytest.approx(row[token_id].item(), abs=TOLERANCE)
        assert logprob.rank == int((row > row[token_id]).sum()) + 1


def allowed_set(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                min_p: float = 0.0) -> set[int]:
    """Token ids that may be drawn: top-k first, then the smallest set with mass top_p, as vLLM defines them."""
    order = logits.argsort(descending=True).tolist()
    if top_k:
        order = order[:top_k]
    probabilities = (logits[order].double() / temperature).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    keep = (before < top_p + 1e-6) & (probabilities >= min_p * probabilities[0] - 1e-6)
    return {token for token, kept in zip(order, keep.tolist(), strict=True) if kept}
