"""F2.11: constraints that are too much, or at an edge, are refused on arrival; steps compile nothing."""
from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching import LLM, ConfigError
from m2_continuous_batching.tests.test_structured_output import (
    PROMPTS,
    SAMPLED,
    assert_obeys,
    constrained,
)


@pytest.fixture(scope="module")
def llm(tiny_model: TinyModels) -> LLM:
    return LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=256)


def test_steps_do_not_compile(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """More constraints at a time than the table holds: each request keeps its own from its arrival on."""
    llm = LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=64, max_num_seqs=70)
    grammars = llm.engine.sampler.grammars
    stepping, compiled = [], []
    step, compile_alone = llm.engine.step, grammars._compile_alone
    monkeypatch.setattr(llm.engine, "step", lambda: (stepping.append(1), step())[1])
    monkeypatch.setattr(grammars, "_compile_alone", lambda *a: (compiled.append(len(stepping)), compile_alone(*a))[1])
    params = [constrained(choice=[f"a{i}", f"b{i}"]) for i in range(70)]
    for output, wanted in zip(llm.generate([[7]] * 70, params, use_tqdm=False), params, strict=True):
        assert_obeys(output, wanted)
    assert compiled == [0] * 70


@pytest.mark.parametrize("choice", [
    [f"{i * 7919 % 100_000:05d}" for i in range(2000)], [f"word {i}" for i in range(10_000)], [""], ["", "x"],
    ["<|im_start|>x"], ["<|im_end|>"], ["a <|im_end|> b"],
    ["()[]{}.*+?|^$\\/-&~#_<>\"'\n\t\0\r ä中😀\u2028"], ["\u00a0"], [r"\d", r"\x41"],
], ids=["2000", "10000", "empty", "empty or not", "special", "end", "end inside", "signs", "space", "escapes"])
def test_choices_at_the_edge(llm: LLM, choice: list[str]) -> None:
    """Any number of them, of any characters: also those that spell a special token, which stay characters."""
    params = constrained(replace(SAMPLED, max_tokens=250, skip_special_tokens=False), choice=choice)
    output = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0]
    assert output.finish_reason == "stop"
    assert output.text in choice
    special = llm.get_tokenizer().encode("<|im_start|><|im_end|>")
    assert not set(special) & set(output.token_ids[:-1])


def test_special_tokens_in_schemas_and_expressions(llm: LLM) -> None:
    for constraint in ({"json": {"const": "<|im_start|>"}}, {"regex": r"<\|im_end\|>[ab]"},
                       {"json": {"type": "object", "properties": {"<|im_end|>": {"enum": ["<|im_start|>"]}},
                                 "required": ["<|im_end|>"], "additionalProperties": False}}):
        params = constrained(replace(SAMPLED, max_tokens=100, skip_special_tokens=False), **constraint)
        assert_obeys(llm.generate(PROMPTS[0], params, use_tqdm=False)[0], params)


def test_a_thousand_optional_properties(llm: LLM) -> None:
    schema = {"type": "object", "properties": {f"p{i}": {"type": "boolean"} for i in range(1000)},
              "additionalProperties": False}
    params = constrained(replace(SAMPLED, temperature=0.0, max_tokens=20), json=schema)
    output = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0]
    assert output.finish_reason in ("stop", "length")
    assert output.text.startswith("{")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize("constraint", [
    {"json": nested(128)}, {"json": nested(3000)}, {"json": '{"not":' * 200_000}, {"json": {"const": "\ud800"}},
    {"json": '{"const": "\\ud800"}'}, {"json": {"properties": {"\udc00": {}}}}, {"regex": "\ud800"},
    {"choice": ["a", "\udfff"]}, {"regex": "(a{1000}){1000}"}, {"regex": "((((a{100}){100}){100}){100})"},
    {"regex": "(" * 5000 + "a" + ")" * 5000}, {"regex": ".*" * 100_000},
    {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(20_000)}}},
], ids=["deep", "deeper", "deep text", "surrogate", "surrogate text", "surrogate key", "surrogate regex",
        "surrogate choice", "repeats", "more repeats", "groups", "stars", "properties"])
def test_a_constraint_that_is_too_much_is_refused(llm: LLM, constraint: dict[str, Any]) -> None:
    """On arrival, in a few lines, in bounded time: the library counts its work."""
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match=r"structured_outputs\.(json|regex|choice)") as error:
        llm.engine.sampler.check(constrained(**constraint))
    assert time.perf_counter() - begin < 120       # stands for: not for ever
    assert len(str(error.value)) < 1000
