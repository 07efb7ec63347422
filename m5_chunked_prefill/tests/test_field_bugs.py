"""F5.2, F5.6: what broke in other engines with chunks and with drafts. Each test names whose fault it was; the inputs
are our own. The right answer is always milestone 4's, which runs prompts whole and guesses nothing."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import m4_flash_attn as m4
from m0_basics.outputs import RequestOutput
from m0_basics.request import Request, Sequence
from m0_basics.sampling_params import SamplingParams, StructuredOutputsParams
from m0_basics.tools.testing.fixtures import TinyModels
from m5_chunked_prefill import LLM
from m5_chunked_prefill.drafter import Drafter, Drafts

BASE: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "block_size": 8}
PROMPT = [20, 21, 22, 23, 24] * 6
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


class Oracle(Drafter):
    """Knows the answers by their prompts, and guesses them; every `wrong`-th token of an answer is spoiled."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]], wrong: int = 10 ** 9) -> None:
        self.answers, self.wrong = answers, wrong

    def propose(self, sequences: list[Sequence], lengths: list[int]) -> Drafts:
        drafts = []
        for sequence, length in zip(sequences, lengths, strict=True):
            known = self.answers.get(tuple(sequence.data.prompt_token_ids), [])
            done = len(sequence.output_token_ids)
            drafts.append([t + 1 if (done + i) % self.wrong == self.wrong - 1 else t
                           for i, t in enumerate(known[done:done + length])])
        return drafts


class Lab:
    """The engine of milestone 4, and this one with drafts that are right, or nearly."""

    def __init__(self, tiny_model: TinyModels) -> None:
        self.model = str(tiny_model("qwen3"))
        self.plain = m4.LLM(self.model, num_blocks=64, **BASE)

    def expected(self, params: SamplingParams, prompt: list[int] = PROMPT) -> RequestOutput:
        return self.run(self.plain, params, prompt)

    def run(self, llm: Any, params: SamplingParams, prompt: list[int] = PROMPT) -> RequestOutput:
        [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return output

    def drafting(self, params: SamplingParams, wrong: int = 10 ** 9, prompts: tuple[list[int], ...] = (PROMPT,),
                 **options: Any) -> LLM:
        """An engine whose drafter knows the answers to `prompts` under `params`."""
        free = replace(params, stop=None, stop_token_ids=None, structured_outputs=None, max_tokens=60, ignore_eos=True)
        answers = {tuple(p): list(self.expected(free, p).outputs[0].token_ids) for p in prompts}
        llm = LLM(self.model, speculative_method="ngram", adaptive_drafts=False,
                  **{"num_blocks": 64, "num_speculative_tokens": 6, **BASE, **options})
        llm.engine.scheduler.speculation.drafter = Oracle(answers, wrong)       # type: ignore[attr-defined]
        return llm


@pytest.fixture(scope="module")
def lab(tiny_model: TinyModels) -> Lab:
    return Lab(tiny_model)


def same(output: RequestOutput, expected: RequestOutput) -> None:
    """Everything that a user may read."""
    assert output.prompt_logprobs == expected.prompt_logprobs
    for ours, theirs in zip(output.outputs, expected.outputs, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
        assert ours.stop_reason == theirs.stop_reason
        assert ours.logprobs == theirs.logprobs
        assert ours.cumulative_logprob == theirs.cumulative_logprob


class TestChunks:
    @pytest.mark.parametrize("budget", [1, 7, 16])
    def test_log_probabilities_of_the_prompt(self, lab: Lab, budget: int) -> None:
        """vLLM #6223, #4139, #14239: a crash, or entries of one chunk only."""
        params = replace(GREEDY, prompt_logprobs=2, logprobs=2, max_tokens=4)
        llm = LLM(lab.model, max_num_batched_tokens=budget, num_blocks=64, **BASE)
        same(lab.run(llm, params), lab.expected(params))

    def test_sent_back_in_the_middle_of_a_prompt(self, lab: Lab) -> None:
        """vLLM #41411: log-probabilities of a prompt whose first chunks were evicted were lost, or doubled."""
        params = replace(GREEDY, prompt_logprobs=1, max_tokens=40)
        prompts = [[20 + i, *PROMPT] for i in range(4)]
        llm = LLM(lab.model, max_num_batched_tokens=6, num_blocks=17, swap_space=0, **BASE)
        sent_back: list[int] = []
        preempt = llm.engine.queues.preempt

        def watch(entry: Any) -> None:
            sent_back.append(entry.sequence.num_computed_tokens)
            preempt(entry)

        llm.engine.queues.preempt = watch           # type: ignore[method-assign]
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        for output, prompt in zip(outputs, prompts, strict=True):
            same(output, lab.expected(params, prompt))
        assert sent_back, "nobody had to leave: the pool is too large for this test"

    def test_no_token_before_the_prompt_is_read(self, lab: Lab) -> None:
        """djl-serving #2299: a dummy token after the first chunk, and a time to first token that was none."""
        llm = LLM(lab.model, max_num_batched_tokens=8, num_blocks=64, **BASE)
        request = llm.input_processor.process({"prompt_token_ids": PROMPT}, GREEDY)
        llm.engine.add_request(request)
        for _ in range(3):                          # 24 of 30 tokens
            llm.engine.step()
            assert (request.metrics.token_times, request.sequences[0].output_token_ids) == ([], [])
        llm.engine.step()
        assert len(request.metrics.token_times) == 1

    def test_a_decode_beside_a_chunk_is_not_late(self, lab: Lab) -> None:
        """SGLang #2158: in a mixed step the decode's token came one step later, with another's log-probability."""
        llm = LLM(lab.model, max_num_batched_tokens=8, num_blocks=64, **BASE)
        params = replace(GREEDY, logprobs=1, max_tokens=8)
        first, second = ([20, 21], [20 + i % 5 for i in range(40)])
        requests: list[Request] = []
        for prompt in (first, second):
            requests.append(llm.input_processor.process({"prompt_token_ids": prompt}, params))
            llm.engine.add_request(requests[-1])
            llm.engine.step()
        for number in range(3, 9):                  # a token in each step since the first, whatever the chunks
            assert len(requests[0].sequences[0].output_token_ids) == number - 1
            llm.engine.step()
        while llm.engine.has_unfinished_requests():
            llm.engine.step()
        for request, prompt in zip(requests, (first, second), strict=True):
            expected = lab.expected(params, prompt).outputs[0]
            assert request.sequences[0].output_token_ids == list(expected.token_ids)
            assert request.sequences[0].logprobs == expected.logprobs


class TestDrafts:
    @pytest.mark.parametrize("settings", [
        {"repetition_penalty": 1.4}, {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"min_p": 0.2, "temperature": 1.0}, {"temperature": 0.9, "top_k": 5, "top_p": 0.8}, {"logit_bias": {30: 4.0}},
        {"bad_words": None, "logprobs": 3}, {"min_tokens": 20, "ignore_eos": False}], ids=lambda s: "-".join(s))
    @pytest.mark.parametrize("wrong", [10 ** 9, 4])
    def test_what_is_asked_holds_for_guesses(self, lab: Lab, settings: dict[str, Any], wrong: int) -> None:
        """vLLM #18902, #33251, #42802, #9834, TensorRT-LLM #17701: penalties, min_p or biases were left out for
        verified tokens, or counted the last one twice."""
        params = replace(GREEDY, seed=3, **settings)
        same(lab.run(lab.drafting(params, wrong), params), lab.expected(params))

    def test_log_probabilities_are_the_targets(self, lab: Lab) -> None:
        """llama.cpp #27972, vLLM #17876, #34497: 0.0 for accepted guesses, or none at all."""
        params = replace(GREEDY, logprobs=2)
        output = lab.run(lab.drafting(params), params)
        same(output, lab.expected(params))
        assert len(output.outputs[0].logprobs or ()) == 24

    def test_a_stop_string_within_accepted_guesses(self, lab: Lab) -> None:
        """vLLM #47616: the text was cut, and ids and log-probabilities behind it stayed."""
        text = lab.expected(GREEDY).outputs[0].text
        for start in range(1, len(text) - 2, max(1, len(text) // 6)):
            params = replace(GREEDY, stop=[text[start:start + 2]], logprobs=1)
            same(lab.run(lab.drafting(params), params), lab.expected(params))

    def test_an_end_within_accepted_guesses(self, lab: Lab) -> None:
        """SGLang #31599, #33758: the length was checked before the stop token, so the reason was wrong."""
        tokens = lab.expected(GREEDY).outputs[0].token_ids
        stop = next(i for i in range(3, 20) if tokens[i] not in tokens[:i])
        for length in (stop + 1, stop + 2):
            params = replace(GREEDY, stop_token_ids=[tokens[stop]], max_tokens=length)
            output = lab.run(lab.drafting(params), params)
            same(output, lab.expected(params))
            assert output.outputs[0].finish_reason == "stop"

    @pytest.mark.parametrize("max_tokens", range(1, 10))
    def test_no_token_more_than_asked_for(self, lab: Lab, max_tokens: int) -> None:
        """vLLM #22935: up to a draft's length too many."""
        params = replace(GREEDY, max_tokens=max_tokens)
        same(lab.run(lab.drafting(params), params), lab.expected(params))

    def test_the_last_place_of_the_context(self, lab: Lab) -> None:
        """vLLM #57941: a draft ran over the longest length."""
        prompt, params = [20 + i % 5 for i in range(105)], replace(GREEDY, max_tokens=60)
        output = lab.run(lab.drafting(params, prompts=(prompt,)), params, prompt)
        same(output, lab.expected(params, prompt))
        assert len(output.outputs[0].token_ids) == 128 - 105

    def test_seeds_of_one_request_do_not_touch_another(self, lab: Lab) -> None:
        """vLLM #6038, TensorRT-LLM #19487: one stream of random numbers for all, so a guess for one changed others."""
        params = [replace(GREEDY, temperature=1.0, seed=seed) for seed in (1, 2)]
        prompts = [PROMPT, [25, *PROMPT]]
        llm = lab.drafting(params[0], prompts=(PROMPT,))
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        for output, prompt, p in zip(outputs, prompts, params, strict=True):
            same(output, lab.expected(p, prompt))

    def test_a_grammar_and_the_token_behind_a_whole_draft(self, lab: Lab) -> None:
        """vLLM #44297, #27969: the row behind an accepted draft had the mask of its beginning; a crash at the end."""
        constraint = StructuredOutputsParams(regex="(ab|cd){8}x")
        params = replace(GREEDY, structured_outputs=constraint, ignore_eos=False, max_tokens=40)
        expected = lab.expected(params)
        llm = lab.drafting(params)
        drafter = llm.engine.scheduler.speculation.drafter             # type: ignore[attr-defined]
        for wrong in (10 ** 9, 3):
            drafter.answers[tuple(PROMPT)], drafter.wrong = list(expected.outputs[0].token_ids), wrong
            same(lab.run(llm, params), expected)

    def test_guesses_of_who_was_sent_back_are_forgotten(self, lab: Lab) -> None:
        """vLLM #28558, #37629, #31955: guesses from before a preemption were checked behind other tokens after it."""
        prompts = tuple([25 + i, *PROMPT] for i in range(4))
        llm = lab.drafting(GREEDY, wrong=5, prompts=prompts, num_blocks=17, swap_space=0, max_num_batched_tokens=20)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], GREEDY, use_tqdm=False)
        for output, prompt in zip(outputs, prompts, strict=True):
            same(output, lab.expected(GREEDY, list(prompt)))
        assert llm.manager.usage == 0

    def test_the_same_run_twice(self, lab: Lab) -> None:
        """vLLM #53436, #41758: greedy answers that differ from run to run, or from those without guesses."""
        llm = lab.drafting(GREEDY, wrong=3)
        first, second = lab.run(llm, GREEDY), lab.run(llm, GREEDY)
        same(first, second)
        same(first, lab.expected(GREEDY))

    def test_several_tokens_of_a_step_come_in_order(self, lab: Lab) -> None:
        """koboldcpp #1276: a stream lost what came together."""
        llm = lab.drafting(GREEDY)
        parts = [o.outputs[0] for o in llm.stream({"prompt_token_ids": PROMPT}, GREEDY)]
        expected = lab.expected(GREEDY).outputs[0]
        assert [t for part in parts for t in part.token_ids] == list(expected.token_ids)
        assert "".join(part.text for part in parts) == expected.text
        assert len(parts) < 10, "six guesses a step"
