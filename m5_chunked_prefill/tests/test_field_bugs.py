"""F5.2, F5.6: what broke in other engines with chunks and with drafts. Each test names whose fault it was; the inputs
are our own. The right answer is always milestone 4's, which runs prompts whole and guesses nothing. Faults of counters
are in test_metrics.py; those of drafts beside a prefix cache are milestone 6's."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest

import m4_flash_attn as m4
from m0_basics.outputs import RequestOutput
from m0_basics.request import Request, Sequence
from m0_basics.sampling_params import SamplingParams, StructuredOutputsParams
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.plugins.metrics import MetricsCollector
from m5_chunked_prefill import LLM
from m5_chunked_prefill.drafter import Drafter, Drafts
from m5_chunked_prefill.speculation_stats import SpeculationStats

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


def num_accepted(llm: LLM) -> int:
    """Guesses that were right: a test of drafts without any would say nothing."""
    return next(p for p in llm.engine.plugins if isinstance(p, SpeculationStats)).num_accepted_tokens


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
        {"allowed_token_ids": list(range(20, 60)), "logprobs": 3}, {"min_tokens": 20, "ignore_eos": False}],
        ids=lambda s: "-".join(s))
    @pytest.mark.parametrize("wrong", [10 ** 9, 4])
    def test_what_is_asked_holds_for_guesses(self, lab: Lab, settings: dict[str, Any], wrong: int) -> None:
        """vLLM #18902, #33251, #42802, #9834, #40149, TensorRT-LLM #17701: penalties, min_p or biases were left out
        for verified tokens, or counted the last one twice."""
        params = replace(GREEDY, seed=3, **settings)
        llm = lab.drafting(params, wrong)
        same(lab.run(llm, params), lab.expected(params))
        assert num_accepted(llm) > 5

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
        """SGLang #31599, #33758, vLLM #39826, transformers #47912: the length was checked before the stop token, so the
        reason was wrong; or what lay behind the end was kept."""
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
        """vLLM #6038, #9441, #13196, TensorRT-LLM #19487: one stream of random numbers for all, so a guess for one
        changed others; or a seed had no effect on verified tokens."""
        params = [replace(GREEDY, temperature=1.0, seed=seed) for seed in (1, 2)]
        prompts = [PROMPT, [25, *PROMPT]]
        llm = lab.drafting(params[0], prompts=(PROMPT,))
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        for output, prompt, p in zip(outputs, prompts, params, strict=True):
            same(output, lab.expected(p, prompt))

    def test_a_grammar_and_the_token_behind_a_whole_draft(self, lab: Lab) -> None:
        """vLLM #44297, #27969, #14702: the row behind an accepted draft had the mask of its beginning; a crash at the
        end; guesses that the grammar forbids."""
        constraint = StructuredOutputsParams(regex="(ab|cd){8}x")
        params = replace(GREEDY, structured_outputs=constraint, ignore_eos=False, max_tokens=40)
        expected = lab.expected(params)
        llm = lab.drafting(params)
        drafter = llm.engine.scheduler.speculation.drafter             # type: ignore[attr-defined]
        for wrong in (10 ** 9, 3):
            drafter.answers[tuple(PROMPT)], drafter.wrong = list(expected.outputs[0].token_ids), wrong
            same(lab.run(llm, params), expected)

    def test_guesses_of_who_was_sent_back_are_forgotten(self, lab: Lab) -> None:
        """vLLM #28558, #37629, #31955, #30916, #31944, #46899, #49620: guesses from before a preemption were checked
        behind other tokens after it; a constraint's state was that of before; outputs came late, or never."""
        prompts = tuple([25 + i, *PROMPT] for i in range(4))
        constraint = StructuredOutputsParams(regex="[a-z ]*")
        long = replace(GREEDY, max_tokens=60)
        for params in (long, replace(long, structured_outputs=constraint)):
            collector = MetricsCollector()
            llm = lab.drafting(params, wrong=5, prompts=prompts, num_blocks=17, swap_space=0,
                               max_num_batched_tokens=20, plugins=[collector])
            outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            for output, prompt in zip(outputs, prompts, strict=True):
                same(output, lab.expected(params, list(prompt)))
            assert llm.manager.usage == 0
            assert collector.totals.num_preemptions > 0
            assert num_accepted(llm) > 0 or params is not long

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


class TestLongTexts:
    """Contexts of more than the 256 keys that attention takes at a time, prompts and decodes in the same steps."""

    OPTIONS: ClassVar[dict[str, Any]] = {"max_model_len": 512, "block_size": 16, "num_blocks": 160}
    PROMPTS: ClassVar[list[list[int]]] = [[20 + i % 7 for i in range(n)] for n in (3, 290, 460)]

    def compare(self, model: str, dtype: str, params: SamplingParams, **options: Any) -> LLM:
        """All prompts at once, against each by itself in milestone 4. Returns the engine."""
        plain = m4.LLM(model, dtype=dtype, **self.OPTIONS)
        llm = LLM(model, dtype=dtype, **self.OPTIONS, **options)
        outputs = llm.generate([{"prompt_token_ids": p} for p in self.PROMPTS], params, use_tqdm=False)
        for output, prompt in zip(outputs, self.PROMPTS, strict=True):
            same(output, plain.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0])
        return llm

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("budget", [37, 300])
    def test_chunks_see_all_that_is_before_them_and_no_more(self, lab: Lab, dtype: str, budget: int) -> None:
        """nano-vllm #73, #213 (keys up to the prompt's end instead of the chunk's), transformers #43082 (a chunk's
        positions), candle #3743 (its mask), imp #114, #117, vLLM #5952 (it saw itself alone), SGLang #22876, #32591
        (mixed steps: wrong answers, a crash)."""
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=1, prompt_logprobs=1)
        self.compare(lab.model, dtype, params, max_num_batched_tokens=budget)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("num_guesses", [1, 4, 10])
    def test_a_row_is_the_same_in_any_number_of_rows(self, lab: Lab, dtype: str, num_guesses: int) -> None:
        """vLLM #54506, #52522, #48271, #54928, tokenspeed #904, llama.cpp #25618: verified rows were computed by other
        kernels, blocks or splits than decoded ones. DeepSpec #31: drawn in another precision. vLLM #29216: chunks,
        guesses and log-probabilities in one step."""
        for temperature in (0.0, 0.8):
            params = SamplingParams(temperature=temperature, seed=5, max_tokens=40, ignore_eos=True, logprobs=2,
                                    prompt_logprobs=1)
            llm = self.compare(lab.model, dtype, params, speculative_method="suffix", adaptive_drafts=False,
                               num_speculative_tokens=num_guesses, max_num_batched_tokens=61)
            assert num_accepted(llm) > 0
