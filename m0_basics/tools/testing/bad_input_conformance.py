"""Bad input raises ConfigError, naming what is wrong and what is allowed, and leaves the engine as it was."""
from __future__ import annotations

from typing import Any

import pytest

from m0_basics.base_llm import BaseLLM
from m0_basics.config import ConfigError
from m0_basics.sampling_params import SamplingParams

from .conformance import PROMPTS, Conformance, greedy, ids_of
from .parity import assert_same_tokens
from .tiny_models import VOCAB_SIZE


class BadInputConformance(Conformance):
    """F0.1, F0.5, F1.1: each bad input has one error, and good ones after it get the right tokens."""

    @pytest.mark.parametrize(("prompt", "message"), [
        ({"prompt_token_ids": []}, r"prompt is empty; allowed: at least one token"),
        ("", r"prompt is empty; allowed: at least one token"),
        ([[]], r"prompts\[0\]: the prompt is empty"),
        ([3, VOCAB_SIZE], rf"{VOCAB_SIZE} is not valid; allowed: 0 to {VOCAB_SIZE - 1}"),
        ([3, -1], r"-1 is not valid; allowed: 0 to"),
        ([1] * 96, r"96 tokens; allowed: at most 95"),
        ([1] * 200, r"200 tokens; allowed: at most 95"),
        ({"text": "x"}, r"\['text'\]; allowed: prompt"),
        ({"prompt": "x", "other": 1}, r"'other'.*allowed: prompt"),
        ({"prompt_token_ids": "abc"}, r"type str is not valid; allowed: text, a list of token ids"),
        ("half \ud83d", r"lone surrogate.*allowed: text that UTF-8 can write"),
        ([1, 2.5], r"allowed: text, a list of token ids"),
        ([None], r"prompts\[0\].*NoneType.*allowed: text"),
        (7, r"int.*allowed: text"),
        (None, r"NoneType.*allowed: text"),
        ([[5, 6], "fine", [VOCAB_SIZE + 1]], rf"prompts\[2\].*{VOCAB_SIZE + 1}"),
    ])
    def test_bad_prompt(self, prompt: Any, message: str) -> None:
        llm = self.make(max_model_len=96)
        with pytest.raises(ConfigError, match=message):
            self.run(llm, prompt)
        self.serves(llm)

    @pytest.mark.parametrize(("settings", "message"), [
        ({"stop_token_ids": [VOCAB_SIZE]}, rf"stop_token_ids token id={VOCAB_SIZE} is not valid; allowed: 0 to"),
        ({"stop_token_ids": [-1]}, r"stop_token_ids=\[-1\] is not valid; allowed"),
        ({"max_tokens": 0}, r"max_tokens=0 is not valid; allowed: an integer >= 1 or None"),
        ({"temperature": -1}, r"temperature=-1 is not valid; allowed: a number >= 0"),
        ({"temperature": float("nan")}, r"temperature=nan is not valid"),
        ({"min_tokens": 17}, r"min_tokens=17 is not valid; allowed: at most max_tokens, 16"),
        ({"n": 3, "best_of": 2}, r"best_of=2 is not valid; allowed: at least n, 3"),
        ({"n": 2, "temperature": 0}, r"n=2 is not valid; allowed: 1 where temperature is 0"),
        ({"stop": ["x"], "detokenize": False}, r"detokenize=False is not valid; allowed: True where stop"),
        ({"stop": ["x", ""]}, r"stop=\['x', ''\] is not valid; allowed: non-empty text"),
        ({"temprature": 1.0}, r"unknown sampling parameter temprature; allowed: .*temperature"),
    ])
    def test_bad_parameter(self, settings: dict[str, Any], message: str) -> None:
        llm = self.make()
        with pytest.raises(ConfigError, match=message):
            self.run(llm, PROMPTS, SamplingParams.from_options(**{"temperature": 0, **settings}))
        self.serves(llm)

    def test_number_of_parameters(self) -> None:
        llm = self.make()
        with pytest.raises(ConfigError, match="2 sampling_params for 6 prompts; allowed: one, or one for each"):
            self.run(llm, PROMPTS, [greedy(), greedy()])
        self.serves(llm)

    def test_bad_stream(self) -> None:
        """The error comes from the call, not from the first `next`."""
        llm = self.make()
        with pytest.raises(ConfigError, match=f"{VOCAB_SIZE} is not valid"):
            llm.stream([VOCAB_SIZE], greedy())
        self.serves(llm)

    @pytest.mark.parametrize(("messages", "message"), [
        ([], "messages is empty; allowed: at least one"),
        ([{"content": "x"}], r"messages\[0\]=.*allowed: a dict with role and content")])
    def test_bad_chat(self, messages: Any, message: str) -> None:
        llm = self.make()
        with pytest.raises(ConfigError, match=message):
            llm.chat(messages, greedy(), use_tqdm=False)
        self.serves(llm)

    @pytest.mark.parametrize(("options", "message"), [
        ({"gpu_memory_utilisation": 1}, "unknown option gpu_memory_utilisation; this engine knows: .*max_model_len"),
        ({"dtype": "int3"}, "dtype='int3' is not valid; allowed: auto, float32"),
        ({"max_model_len": 0}, "max_model_len=0 is not valid; allowed: an integer >= 1"),
        ({"max_model_len": 513}, "max_model_len=513 is not valid; allowed: at most 512"),
        ({"device": "tpu"}, "device='tpu' is not valid; allowed: auto, cpu"),
        ({"tensor_parallel_size": 2}, "world_size=2 is not valid; allowed: 1"),
    ])
    def test_bad_option(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            self.make(**options)

    def test_text_without_tokenizer(self) -> None:
        llm = self.make(skip_tokenizer_init=True)
        with pytest.raises(ConfigError, match="skip_tokenizer_init is set; allowed"):
            self.run(llm, "text")
        with pytest.raises(ConfigError, match="skip_tokenizer_init is set"):
            llm.chat([{"role": "user", "content": "text"}], greedy(), use_tqdm=False)
        self.serves(llm)

    def serves(self, llm: BaseLLM) -> None:
        """Nothing of the bad request is left, and good ones get the right tokens."""
        assert not llm.engine.has_unfinished_requests()
        assert_same_tokens(ids_of(self.run(llm, PROMPTS[:2])), self.reference(PROMPTS[:2]))
