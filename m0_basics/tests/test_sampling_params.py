"""F0.5: names and defaults are vLLM's, and every bad value or contradiction is refused."""
from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from m0_basics.config import ConfigError
from m0_basics.sampling_params import (
    BeamSearchParams,
    SamplingParams,
    SamplingType,
    StructuredOutputsParams,
    check_batch,
)

# vLLM's SamplingParams, as its documentation lists it (best_of: up to its version 0.8).
VLLM_DEFAULTS = {
    "n": 1, "best_of": None, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None, "stop": None, "stop_token_ids": None,
    "bad_words": None, "ignore_eos": False, "max_tokens": 16, "min_tokens": 0, "logprobs": None,
    "prompt_logprobs": None, "detokenize": True, "skip_special_tokens": True, "logit_bias": None,
    "allowed_token_ids": None, "include_stop_str_in_output": False, "structured_outputs": None,
}


def test_names_and_defaults_are_vllms():
    assert {f.name: f.default for f in fields(SamplingParams)} == VLLM_DEFAULTS


def test_every_field_has_a_help_text():
    assert all(f.metadata["help"].endswith(".") for f in fields(SamplingParams))


BAD_VALUES = [
    ("n", 0, "an integer >= 1"), ("n", 1.0, "an integer >= 1"), ("n", True, "an integer >= 1"),
    ("best_of", 0, "an integer >= 1"),
    ("temperature", -0.1, "a number >= 0"), ("temperature", float("inf"), "a number >= 0"),
    ("temperature", float("nan"), "a number >= 0"), ("temperature", "hot", "a number >= 0"),
    ("temperature", None, "a number >= 0"),
    ("top_p", 0.0, "a number above 0, up to 1"), ("top_p", 1.01, "a number above 0, up to 1"),
    ("top_k", -2, "an integer >= 0"), ("top_k", 1.5, "an integer >= 0"),
    ("min_p", -0.1, "a number from 0 to 1"), ("min_p", 1.1, "a number from 0 to 1"),
    ("presence_penalty", 2.1, "a number from -2 to 2"), ("presence_penalty", -2.1, "a number from -2 to 2"),
    ("frequency_penalty", 3, "a number from -2 to 2"), ("frequency_penalty", float("nan"), "a number from -2 to 2"),
    ("repetition_penalty", 0.0, "from 1e-06 to 1e+06"), ("repetition_penalty", 1e-40, "from 1e-06 to 1e+06"),
    ("repetition_penalty", -1.0, "from 1e-06"), ("logit_bias", {1: 1e39}, "from -1e+09 to 1e+09"),
    ("logit_bias", {1: float("nan")}, "from -1e+09 to 1e+09"), ("logit_bias", {1: True}, "number"),
    ("seed", 1.5, "an integer or None"), ("seed", True, "an integer or None"),
    ("stop", [""], "non-empty text"), ("stop", "\ud800", "non-empty text"), ("stop", [3], "non-empty text"),
    ("stop", 3, "text, or a list of it"), ("bad_words", [""], "non-empty text"),
    ("bad_words", "word", "a list of text"),
    ("stop_token_ids", [-1], "token ids >= 0"), ("stop_token_ids", ["2"], "token ids >= 0"),
    ("stop_token_ids", 2, "a list of token ids"),
    ("allowed_token_ids", [], "None, or at least one token id"), ("allowed_token_ids", [True], "token ids >= 0"),
    ("logit_bias", {-1: 1.0}, "token id -> number"), ("logit_bias", {1: float("inf")}, "token id -> number"),
    ("logit_bias", {1: "x"}, "token id -> number"), ("logit_bias", [1], "a dict of token id"),
    ("ignore_eos", 1, "True or False"), ("detokenize", None, "True or False"),
    ("skip_special_tokens", "no", "True or False"), ("include_stop_str_in_output", 0, "True or False"),
    ("max_tokens", 0, "an integer >= 1 or None"), ("max_tokens", 2.0, "an integer >= 1 or None"),
    ("min_tokens", -1, "an integer >= 0"), ("min_tokens", None, "an integer >= 0"),
    ("logprobs", -1, "an integer >= 0 or None"), ("prompt_logprobs", "all", "an integer >= 0 or None"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD_VALUES)
def test_a_bad_value_names_field_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ConfigError) as error:
        SamplingParams(**{name: value})
    assert str(error.value).startswith(f"{name}=")
    assert " is not valid; allowed: " in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize(("settings", "message"), [
    ({"n": 3, "best_of": 2}, "best_of=2 is not valid; allowed: at least n, 3"),
    ({"min_tokens": 17}, "min_tokens=17 is not valid; allowed: at most max_tokens, 16"),
    ({"stop": "x", "detokenize": False}, "detokenize=False is not valid; allowed: True where stop strings"),
    ({"n": 2, "temperature": 0}, "n=2 is not valid; allowed: 1 where temperature is 0"),
    ({"best_of": 2, "temperature": 0}, "best_of=2 is not valid; allowed: 1 where temperature is 0"),
])
def test_contradictions(settings, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize("settings", [
    {"n": 3, "best_of": 3}, {"min_tokens": 16}, {"min_tokens": 99, "max_tokens": None}, {"top_p": 1e-9}, {"top_k": 1},
    {"presence_penalty": -2}, {"repetition_penalty": 1e-3}, {"seed": -7}, {"seed": 2 ** 80}, {"logprobs": 0},
    {"logit_bias": {0: -100}}, {"min_p": 1}, {"stop": ["a", "中"]}, {"temperature": 1e6}])
def test_good_values_at_the_edge(settings):
    params = SamplingParams(**settings)
    assert all(getattr(params, name) == value for name, value in settings.items())


def test_values_are_normalised_as_in_vllm():
    params = SamplingParams(n=2, stop="x", top_k=-1, stop_token_ids=(5, 6))
    assert (params.stop, params.top_k, params.best_of) == (["x"], 0, 2)
    assert (params.stop_token_ids, params.bad_words, params.allowed_token_ids) == ([5, 6], [], None)
    stops = ["a"]
    params = SamplingParams(stop=stops)
    stops.append("b")
    assert params.stop == ["a"], "a later change of the caller's list does not get in"


@pytest.mark.parametrize(("settings", "kind"), [
    ({}, SamplingType.RANDOM), ({"seed": 1}, SamplingType.RANDOM_SEED), ({"seed": 0}, SamplingType.RANDOM_SEED),
    ({"temperature": 0}, SamplingType.GREEDY), ({"temperature": 0, "seed": 1}, SamplingType.GREEDY),
    ({"temperature": 9e-6}, SamplingType.GREEDY), ({"temperature": 2e-5}, SamplingType.RANDOM)])
def test_sampling_type_is_derived(settings, kind):
    assert SamplingParams(**settings).sampling_type is kind


def test_parameters_are_frozen():
    with pytest.raises(FrozenInstanceError):
        SamplingParams().temperature = 0.5


def test_an_unknown_parameter_lists_those_that_exist():
    with pytest.raises(ConfigError) as error:
        SamplingParams.from_options(temprature=0.5, max_token=3)
    listed = ", ".join(VLLM_DEFAULTS)
    assert str(error.value) == f"unknown sampling parameter max_token, temprature; allowed: {listed}"
    assert SamplingParams.from_options(temperature=0.5) == SamplingParams(temperature=0.5)


def test_what_an_engine_does_not_support_is_refused():
    supported = {"temperature", "max_tokens"}
    SamplingParams(temperature=0.3, max_tokens=2).require_supported(supported, "Engine")
    for settings, name in (({"top_k": 3}, "top_k=3"), ({"stop": "x"}, r"stop=\['x'\]"), ({"n": 2}, "n=2")):
        with pytest.raises(ConfigError, match=f"{name}: Engine does not support it; it supports: max_tokens, temp"):
            SamplingParams(**settings).require_supported(supported, "Engine")


@pytest.mark.parametrize("settings", [{}, {"json": "{}", "regex": "a"}, {"json": {}, "choice": ["a"]}])
def test_structured_outputs_takes_exactly_one_constraint(settings):
    with pytest.raises(ConfigError, match="allowed: exactly one of json, regex, choice"):
        StructuredOutputsParams(**settings)


def test_structured_outputs():
    for settings in ({"json": {"type": "object"}}, {"regex": "a+"}, {"choice": ["a", "b"]}):
        params = SamplingParams(structured_outputs=StructuredOutputsParams(**settings))
        assert params.structured_outputs == StructuredOutputsParams(**settings)
        assert SamplingParams.from_options(structured_outputs=settings) == params       # as JSON brings it


@pytest.mark.parametrize(("value", "message"), [
    ("a+", "None, StructuredOutputsParams, or a dict"), ({"grammar": "x"}, "unknown key grammar .* regex, choice"),
    ({"json": 3}, "a JSON schema"), ({"regex": 3}, "a regular expression"), ({"choice": []}, "at least one text"),
    ({"choice": "ab"}, "at least one text"), ({"choice": ["a", 1]}, "at least one text")])
def test_structured_outputs_of_a_wrong_type(value, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams.from_options(structured_outputs=value)


@pytest.mark.parametrize(("settings", "message"), [
    ({"beam_width": 0}, "beam_width=0 is not valid; allowed: an integer >= 1"),
    ({"max_tokens": 0}, "max_tokens=0 is not valid; allowed: an integer >= 1"),
    *[({"length_penalty": value}, r"length_penalty=.* is not valid; allowed: a number from -10 to 10")
      for value in (float("nan"), float("inf"), 1e308, -1e308, 10 ** 400, 10.5, True, "1")]])
def test_beam_search_parameters(settings, message):
    with pytest.raises(ConfigError, match=message):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, **settings})


def test_a_batch_is_checked_once_per_distinct_set():
    """F0.3"""
    made = check_batch([{"temperature": 0.5, "top_k": 3}, {}, {"top_k": 3, "temperature": 0.5}, {"stop": ["a"]}])
    assert made == [SamplingParams(temperature=0.5, top_k=3), SamplingParams(), made[0], SamplingParams(stop="a")]
    assert made[0] is made[2]
    with pytest.raises(ConfigError, match="top_k=-3 is not valid"):
        check_batch([{}, {"top_k": -3}])


def test_a_complaint_about_a_large_value_fits_a_screen() -> None:
    """However much was sent: a million numbers, a megabyte of text, or both in each other."""
    for name, value in (("stop_token_ids", [-1] * 10 ** 6), ("stop", ["x" * 10 ** 6, ""]), ("seed", "y" * 10 ** 6),
                        ("structured_outputs", [{"a": ["b" * 1000] * 1000}] * 1000),
                        ("logit_bias", {str(i): [i] for i in range(10 ** 5)})):
        with pytest.raises(ConfigError) as error:
            SamplingParams(**{name: value})
        assert len(str(error.value)) < 500
        assert str(error.value).startswith(f"{name}=")
