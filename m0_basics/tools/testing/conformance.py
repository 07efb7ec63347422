"""One behaviour suite for every engine: a milestone's tests subclass the mixins of what its engine can do.

    class TestConformance(GreedyConformance, StopConformance, ...):
        llm_class = LLM
        options = {"block_size": 8}             # how this milestone is run
        tiny_memory_options = {"num_blocks": 9}     # and how it is run with too little cache for comfort

Sampling and bad input have files of their own beside this one. Everything goes
through the public face (`generate`, `chat`, `stream`) or through the methods of the engine seam.
"""
from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, ClassVar

import pytest

from m0_basics.base_llm import BaseLLM
from m0_basics.config import ConfigError
from m0_basics.outputs import RequestOutput
from m0_basics.sampling_params import SamplingParams

from .fixtures import PARROT_TEXT, TinyModels
from .parity import assert_same_tokens, mixed_length_prompts, reference_greedy
from .tiny_models import BOS, FAMILIES_UNDER_TEST, VOCAB_SIZE

NUM_TOKENS = 16
PROMPTS = mixed_length_prompts(VOCAB_SIZE, 6, seed=0)


def greedy(max_tokens: int | None = NUM_TOKENS, **settings: Any) -> SamplingParams:
    """Greedy, going on after an end-of-sequence token: random models emit them at random."""
    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **settings})


def ids_of(outputs: list[RequestOutput]) -> list[list[int]]:
    """The token ids of each request's first output."""
    return [output.outputs[0].token_ids for output in outputs]


class Conformance:
    """Base of the mixins: which engine, and how one is made over a tiny model."""

    llm_class: ClassVar[Callable[..., BaseLLM]]
    options: ClassVar[dict[str, Any]] = {}
    tiny_memory_options: ClassVar[dict[str, Any]] = {}
    several_tokens_a_step: ClassVar[bool] = False       # a stream may bring more than one at once

    @pytest.fixture(autouse=True)
    def _provide_models(self, tiny_model: TinyModels) -> None:
        self.tiny_model = tiny_model

    def make(self, variant: str = "qwen3", **options: Any) -> BaseLLM:
        """A fresh engine over a tiny model, in float32: the references are."""
        return type(self).llm_class(str(self.tiny_model(variant)), **{"dtype": "float32", **self.options, **options})

    def run(self, llm: BaseLLM, prompts: Any, params: Any = None) -> list[RequestOutput]:
        """`generate` without the progress bar."""
        return llm.generate(prompts, params or greedy(), use_tqdm=False)

    def reference(self, prompts: list[list[int]], max_tokens: int = NUM_TOKENS, variant: str = "qwen3",
                  **settings: Any) -> list[list[int]]:
        return reference_greedy(self.tiny_model(variant), prompts, max_tokens, **settings)


class GreedyConformance(Conformance):
    """Greedy tokens equal transformers' (F0.11, F1.1, FX.1)."""

    @pytest.mark.parametrize("variant", FAMILIES_UNDER_TEST)
    def test_tokens_equal_transformers(self, variant: str) -> None:
        outputs = self.run(self.make(variant), PROMPTS)
        assert_same_tokens(ids_of(outputs), self.reference(PROMPTS, variant=variant))

    def test_tokens_equal_transformers_in_tiny_memory(self) -> None:
        outputs = self.run(self.make(**self.tiny_memory_options), PROMPTS)
        assert_same_tokens(ids_of(outputs), self.reference(PROMPTS))

    def test_batch_equals_single_runs_and_state_does_not_leak(self) -> None:
        llm = self.make()
        single = [ids_of(self.run(llm, prompt))[0] for prompt in PROMPTS]
        batch = ids_of(self.run(llm, [PROMPTS[0], *PROMPTS]))       # the first one twice
        assert_same_tokens(batch, [single[0], *single])
        assert_same_tokens(single, self.reference(PROMPTS))
        assert not llm.engine.has_unfinished_requests()

    def test_parameters_per_prompt(self) -> None:
        lengths = [1, 9, 3, 16, 2, 5]
        outputs = self.run(self.make(), PROMPTS, [greedy(n) for n in lengths])
        assert_same_tokens(ids_of(outputs), [r[:n] for r, n in zip(self.reference(PROMPTS), lengths, strict=True)])
        assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 6

    def test_forms_of_a_prompt(self) -> None:
        llm = self.make()
        text = "the 中 cat"
        ids = llm.get_tokenizer().encode(text)
        outputs = self.run(llm, [text, {"prompt": text}, {"prompt_token_ids": ids}, ids])
        assert_same_tokens(ids_of(outputs), self.reference([ids]) * 4)
        assert_same_tokens(ids_of([*self.run(llm, text), *self.run(llm, ids)]), self.reference([ids]) * 2)
        assert [output.prompt for output in outputs] == [text, text, None, None]
        assert all(output.prompt_token_ids == ids and output.finished for output in outputs)
        assert len({output.request_id for output in outputs}) == 4
        for output in outputs:
            assert output.outputs[0].text == llm.get_tokenizer().decode(output.outputs[0].token_ids)

    def test_chat(self) -> None:
        llm = self.make()
        conversations = [[{"role": "user", "content": "中 in the end"}], [{"role": "user", "content": "?"}]]
        texts = [f"{BOS}user\n{c[0]['content']}<|im_end|>\n{BOS}assistant\n" for c in conversations]
        prompts = [llm.get_tokenizer().encode(text) for text in texts]
        many = llm.chat(conversations, greedy(), use_tqdm=False)
        one = llm.chat(conversations[0], greedy(), use_tqdm=False)
        assert [output.prompt for output in many] == texts
        assert_same_tokens(ids_of([*many, *one]), self.reference([*prompts, prompts[0]]))

    def test_without_tokenizer(self) -> None:
        outputs = self.run(self.make(skip_tokenizer_init=True), PROMPTS)
        assert_same_tokens(ids_of(outputs), self.reference(PROMPTS))
        assert [output.outputs[0].text for output in outputs] == [""] * 6

    def test_no_prompts(self) -> None:
        assert self.run(self.make(), []) == []


class StopTokenConformance(Conformance):
    """When a request ends, and what it says of the reason (F0.8, F1.5)."""

    def test_end_of_sequence(self) -> None:
        llm = self.make("parrot_eos")
        ended, ignored = self.run(llm, [BOS, BOS], [greedy(64, ignore_eos=False), greedy(64)])
        output = ended.outputs[0]
        assert (output.text, output.finish_reason, output.stop_reason) == (PARROT_TEXT, "stop", None)
        assert output.token_ids[-1] == llm.spec.eos_token_ids[0]
        assert (len(ignored.outputs[0].token_ids), ignored.outputs[0].finish_reason) == (64, "length")
        assert ignored.outputs[0].token_ids[:len(output.token_ids)] == output.token_ids

    def test_stop_token(self) -> None:
        llm, full = self.make(), self.reference([PROMPTS[3]])[0]
        stop = full[6]
        for params in (greedy(stop_token_ids=[stop]), greedy(stop_token_ids=[stop], ignore_eos=False)):
            output = self.run(llm, PROMPTS[3], params)[0].outputs[0]
            assert output.token_ids == full[:full.index(stop) + 1]
            assert (output.finish_reason, output.stop_reason) == ("stop", stop)
            assert output.text == llm.get_tokenizer().decode(output.token_ids[:-1])

    def test_min_tokens(self) -> None:
        """No stop token comes before `min_tokens`: neither is it obeyed, nor chosen."""
        llm = self.make("parrot_eos")
        recited = len(PARROT_TEXT.encode())
        early, late = self.run(llm, [BOS, BOS], [greedy(64, ignore_eos=False, min_tokens=recited),
                                                 greedy(recited + 8, ignore_eos=False, min_tokens=recited + 3)])
        assert (len(early.outputs[0].token_ids), early.outputs[0].finish_reason) == (recited + 1, "stop")
        assert len(late.outputs[0].token_ids) >= recited + 3
        assert llm.spec.eos_token_ids[0] not in late.outputs[0].token_ids[:recited + 3]

        llm, full = self.make(), self.reference([PROMPTS[3]])[0]
        output = self.run(llm, PROMPTS[3], greedy(stop_token_ids=[full[2]], min_tokens=5))[0].outputs[0]
        assert output.token_ids[:2] == full[:2]
        assert full[2] not in output.token_ids[:5]

    def test_max_model_len(self) -> None:
        prompt = PROMPTS[0]
        output = self.run(self.make(max_model_len=len(prompt) + 7), prompt, greedy(None))[0].outputs[0]
        assert output.token_ids == self.reference([prompt])[0][:7]
        assert output.finish_reason == "length"

    def test_no_max_tokens_runs_to_the_end_of_sequence(self) -> None:
        output = self.run(self.make("parrot_eos"), BOS, greedy(None, ignore_eos=False))[0].outputs[0]
        assert (output.text, output.finish_reason) == (PARROT_TEXT, "stop")


class StopConformance(StopTokenConformance):
    """The same, and stop strings (F1.5)."""

    @pytest.mark.parametrize(("stop", "text"), [
        ("z", "aé中😀"), ("中", "aé"), ("é中", "a"), ("😀z?a", "aé中"), (["?a", "😀z"], "aé中"), ("aé", ""),
        ("never", PARROT_TEXT * 2)])
    def test_stop_string(self, stop: str | list[str], text: str) -> None:
        """Every character here has a token per byte, so each of these strings spans tokens; it is cut off."""
        length = 2 * len(PARROT_TEXT.encode())
        plain, included = self.run(self.make("parrot"), [BOS, BOS], [
            greedy(length, stop=stop), greedy(length, stop=stop, include_stop_str_in_output=True)])
        assert plain.outputs[0].text == text
        if stop == "never":
            assert (included.outputs[0].text, included.outputs[0].stop_reason) == (text, None)
            return
        found = "😀z" if isinstance(stop, list) else stop
        for output in (plain.outputs[0], included.outputs[0]):
            assert (output.finish_reason, output.stop_reason) == ("stop", found)
        assert included.outputs[0].text == text + found
        assert len(plain.outputs[0].token_ids) == len((text + found).encode())

    def test_stop_string_in_random_text(self) -> None:
        """A string cut from the middle of an output, across two tokens, ends the next output there."""
        llm = self.make()
        decode = llm.get_tokenizer().decode
        tried = 0
        for output in self.run(llm, PROMPTS, greedy(48)):
            ids, text = output.outputs[0].token_ids, output.outputs[0].text
            pieces = [decode([i]) for i in ids]
            stops = [a[-1] + b[0] for a, b in pairwise(pieces[8:]) if (a + b).isascii() and a and b]
            for stop in stops[:2]:
                tried += 1
                again = self.run(llm, output.prompt_token_ids, greedy(48, stop=[stop]))[0].outputs[0]
                assert again.text == text[:text.index(stop)]
                assert again.token_ids == ids[:len(again.token_ids)]
                assert stop not in decode(again.token_ids[:-1])
                assert stop in decode(again.token_ids)
        assert tried >= 4

    def test_min_tokens_holds_a_stop_string_back(self) -> None:
        length = len(PARROT_TEXT.encode())
        output = self.run(self.make("parrot"), BOS, greedy(3 * length, stop="z", min_tokens=length))[0].outputs[0]
        assert output.text == PARROT_TEXT + "aé中😀"
        assert output.stop_reason == "z"

    def test_stop_string_that_begins_with_the_space_after_the_prompt(self) -> None:
        output = self.run(self.make("sentencepiece"), "the", greedy(8, stop=[" in"]))[0].outputs[0]
        assert (output.text, output.stop_reason, len(output.token_ids)) == ("", " in", 1)

    def test_stop_string_while_streaming(self) -> None:
        """What a stop string may still cut off is not handed out."""
        for stop, text in (("😀z?a", "aé中"), ("z!", PARROT_TEXT * 2)):
            parts = list(self.make("parrot").stream(BOS, greedy(2 * len(PARROT_TEXT.encode()), stop=stop)))
            assert "".join(part.outputs[0].text for part in parts) == text


class StreamingConformance(Conformance):
    """Deltas joined equal the final text and tokens (F1.6)."""

    @pytest.mark.slow
    @pytest.mark.parametrize("variant", ["qwen3", "llama", "parrot"])
    def test_deltas_join_to_the_whole(self, variant: str) -> None:
        """Random bytes make every kind of broken character; the parrot's characters span up to four tokens."""
        llm = self.make(variant)
        for prompt in [*PROMPTS, [llm.get_tokenizer().encode(BOS)[0]]]:
            whole = self.run(llm, prompt, greedy(32))[0].outputs[0]
            parts = list(llm.stream(prompt, greedy(32)))
            assert [i for part in parts for i in part.outputs[0].token_ids] == whole.token_ids
            assert "".join(part.outputs[0].text for part in parts) == whole.text
            assert whole.text == llm.get_tokenizer().decode(whole.token_ids)
            assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
            assert parts[-1].outputs[0].finish_reason == "length"
            assert len(parts) == 32 or self.several_tokens_a_step, "one delta for each token"

    def test_a_character_that_spans_tokens_comes_whole(self) -> None:
        parts = list(self.make("parrot").stream(BOS, greedy(len(PARROT_TEXT.encode()))))
        assert [part.outputs[0].text for part in parts if part.outputs[0].text] == list(PARROT_TEXT)

    def test_the_space_after_the_prompt_comes_too(self) -> None:
        """A SentencePiece decoder drops the space before its first token: that is the prompt's, not the output's."""
        llm = self.make("sentencepiece")
        whole = self.run(llm, "the", greedy(6))[0].outputs[0]
        assert whole.text == " in. 中 the in"
        assert "".join(part.outputs[0].text for part in llm.stream("the", greedy(6))) == whole.text
        assert self.run(llm, whole.token_ids[:2], greedy(3))[0].outputs[0].text == " 中 the"

    def test_a_character_cut_by_the_end_is_not_lost(self) -> None:
        llm = self.make("parrot")
        for length in range(1, len(PARROT_TEXT.encode())):
            text = "".join(part.outputs[0].text for part in llm.stream(BOS, greedy(length)))
            assert text == PARROT_TEXT.encode()[:length].decode(errors="replace")

    def test_text_comes_while_the_request_runs(self) -> None:
        llm = self.make("parrot")
        stream = llm.stream(BOS, greedy(10))
        assert next(stream).outputs[0].text == "a"
        assert llm.engine.has_unfinished_requests()
        list(stream)
        assert not llm.engine.has_unfinished_requests()

    def test_closing_the_iterator_frees_the_request(self) -> None:
        llm = self.make()
        stream: Any = llm.stream(PROMPTS[0], greedy(100))
        for _ in range(3):
            next(stream)
        stream.close()
        assert not llm.engine.has_unfinished_requests()
        assert_same_tokens(ids_of(self.run(llm, PROMPTS)), self.reference(PROMPTS))

    @pytest.mark.parametrize("steps", [0, 1])
    def test_dropping_the_iterator_frees_the_request(self, steps: int) -> None:
        llm = self.make()
        stream = llm.stream(PROMPTS[0], greedy(100))
        for _ in range(steps):
            next(stream)
        assert llm.engine.has_unfinished_requests()
        del stream
        gc.collect()
        assert not llm.engine.has_unfinished_requests()

    def test_streams_side_by_side(self) -> None:
        llm = self.make()
        streams: list[Iterator[RequestOutput]] = [llm.stream(prompt, greedy()) for prompt in PROMPTS[:3]]
        got: list[list[int]] = [[], [], []]
        for parts in zip(*streams, strict=True):
            for tokens, part in zip(got, parts, strict=True):
                tokens += part.outputs[0].token_ids
        assert_same_tokens(got, self.reference(PROMPTS[:3]))

    def test_generate_while_a_stream_is_open(self) -> None:
        llm = self.make()
        stream = llm.stream(PROMPTS[0], greedy())
        got = list(next(stream).outputs[0].token_ids)
        assert_same_tokens(ids_of(self.run(llm, PROMPTS[1:])), self.reference(PROMPTS[1:]))
        got += [i for part in stream for i in part.outputs[0].token_ids]
        assert_same_tokens([got], self.reference(PROMPTS[:1]))

    def test_stream_of_a_chat(self) -> None:
        llm = self.make()
        messages = [{"role": "user", "content": "on the 中"}]
        whole = llm.chat(messages, greedy(), use_tqdm=False)[0]
        parts = list(llm.stream(messages, greedy()))
        assert parts[0].prompt_token_ids == whole.prompt_token_ids
        assert "".join(part.outputs[0].text for part in parts) == whole.outputs[0].text

    def test_stream_of_a_chat_that_goes_on(self) -> None:
        llm = self.make()
        messages = [{"role": "user", "content": "on the 中"}, {"role": "assistant", "content": "the"}]
        template: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
        whole = llm.chat(messages, greedy(), use_tqdm=False, **template)[0]
        parts = list(llm.stream(messages, greedy(), **template))
        assert parts[0].prompt_token_ids == whole.prompt_token_ids != llm.chat(
            messages, greedy(1), use_tqdm=False)[0].prompt_token_ids
        assert "".join(part.outputs[0].text for part in parts) == whole.outputs[0].text
        with pytest.raises(ConfigError, match="add_generation_prompt=True"):
            llm.stream(messages, greedy(), continue_final_message=True)


class AbortConformance(Conformance):
    """Aborting one request leaves the others' tokens as they are."""

    @pytest.mark.parametrize("steps", [0, 1, 5])
    def test_abort_leaves_the_others_alone(self, steps: int) -> None:
        llm = self.make(**self.tiny_memory_options)
        engine, reference = llm.engine, self.reference(PROMPTS)
        requests = [llm.input_processor.process(prompt, greedy()) for prompt in PROMPTS]
        for request in requests:
            engine.add_request(request)
        finished: dict[str, RequestOutput] = {}
        for _ in range(steps):
            finished |= {output.request_id: output for output in engine.step()}
        victims = [requests[0], requests[4]]
        for request in victims:
            engine.abort_request(request.request_id)
            engine.abort_request(request.request_id)        # a second time, as a client may: ignored
            assert request.is_finished
        while engine.has_unfinished_requests():
            finished |= {output.request_id: output for output in engine.step()}
        for request, expected in zip(requests, reference, strict=True):
            if request not in victims:
                assert_same_tokens(ids_of([finished[request.request_id]]), [expected])
        for request in victims:
            assert request.sequences[0].status.finish_reason == "abort"
            assert len(request.sequences[0].output_token_ids) <= steps

    def test_aborting_all_leaves_nothing(self) -> None:
        llm = self.make(**self.tiny_memory_options)
        for _ in range(5):          # whatever an abort failed to give back would be missing sooner or later
            requests = [llm.input_processor.process(prompt, greedy()) for prompt in PROMPTS]
            for request in requests:
                llm.engine.add_request(request)
            llm.engine.step()
            llm.engine.step()
            for request in requests:
                llm.engine.abort_request(request.request_id)
            assert not llm.engine.has_unfinished_requests()
        llm.engine.abort_request("never seen")
        assert_same_tokens(ids_of(self.run(llm, PROMPTS)), self.reference(PROMPTS))
