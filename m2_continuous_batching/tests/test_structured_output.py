"""F2.11: constrained requests in a batch with free ones."""
from __future__ import annotations

import gc
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m0_basics.loading.gguf_tokenizer import build_tokenizer
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.outputs import RequestOutput
from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.tools.testing.conformance import greedy
from m0_basics.tools.testing.fixtures import TinyModels
from m1_offline.sampler import FullSampler
from m2_continuous_batching import LLM, ConfigError, SamplingParams, StructuredOutputsParams
from m2_continuous_batching.structured_output import Grammars, StructuredSampler, unpack_bits

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "中", "😀"]}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "ok"],
    "additionalProperties": False,
}
REGEX = r"(\d{2,3}-[a-f]{2}|中{1,3}/x){1,2}"
CHOICE = ["yes", "no", "may\"be\\\n", "中😀"]
CONSTRAINTS = {"json": SCHEMA, "regex": REGEX, "choice": CHOICE}
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, seed=3, max_tokens=200)
PROMPTS = [[7, 8, 9], [20, 21], [5] * 9, [100, 3, 50, 60], [33], [11, 12]]


def constrained(params: SamplingParams = SAMPLED, **constraint: Any) -> SamplingParams:
    return replace(params, structured_outputs=StructuredOutputsParams(**constraint))


def obeys(text: str, constraint: StructuredOutputsParams) -> bool:
    """Judged by libraries that have nothing to do with the one that made it so."""
    if constraint.regex is not None:
        return re.fullmatch(constraint.regex, text) is not None
    if constraint.choice is not None:
        return text in constraint.choice
    schema = constraint.json
    try:
        jsonschema.validate(json.loads(text), json.loads(schema) if isinstance(schema, str) else schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def assert_obeys(output: RequestOutput, params: SamplingParams) -> None:
    assert params.structured_outputs is not None
    for part in output.outputs:
        assert part.finish_reason == "stop", (part.finish_reason, part.stop_reason, part.text)
        assert obeys(part.text, params.structured_outputs), part.text


def test_the_judge_can_say_no() -> None:
    """Else nothing below would mean anything."""
    assert not obeys('{"name": "x"}', StructuredOutputsParams(json=SCHEMA))
    assert not obeys('{"name": "x", "age"', StructuredOutputsParams(json=json.dumps(SCHEMA)))
    assert not obeys("1-ab", StructuredOutputsParams(regex=REGEX))
    assert not obeys("ye", StructuredOutputsParams(choice=CHOICE))


@pytest.fixture(scope="module")
def llm(tiny_model: TinyModels) -> LLM:
    return LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=256)


def test_many_threads_share_the_grammars(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One compiles at a time, every thread gets what one alone would get, and what is there waits for no compiler."""
    grammars = Grammars(llm.get_tokenizer(), llm.spec)
    constraints = [StructuredOutputsParams(choice=["yes", "no"[:1 + i % 2] * (1 + i // 2)]) for i in range(8)]
    compile_alone, inside, crowds = grammars._compile_alone, list[str](), list[int]()

    def watched(kind: str, text: str) -> Any:
        inside.append(text)
        time.sleep(0.005)
        crowds.append(len(inside))
        matcher = compile_alone(kind, text)
        inside.remove(text)
        return matcher

    def first_tokens(constraint: StructuredOutputsParams) -> bytes:
        return bytes(grammars.new_matcher(constraint).compute_bitmask())

    monkeypatch.setattr(grammars, "_compile_alone", watched)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(first_tokens, constraints * 4))
        assert set(crowds) == {1}
        with grammars._compiling:
            assert pool.submit(first_tokens, constraints[0]).result(timeout=120) == together[0]
    assert together == [first_tokens(c) for c in constraints] * 4


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 2, "policy": "round-robin:3"}, {"async_scheduling": True}],
                         ids=["together", "preempted", "async"])
def test_mixed_batch(tiny_model: TinyModels, options: dict[str, Any]) -> None:
    """Every constrained output obeys; the tokens of the others are those of a run without them."""
    llm = LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=256, **options)
    free = [greedy(12), replace(SAMPLED, max_tokens=12), greedy(9, logprobs=2, repetition_penalty=1.3)]
    alone = llm.generate(PROMPTS[:3], free, use_tqdm=False)
    limited = [constrained(params, **{kind: value}) for kind, value in CONSTRAINTS.items()
               for params in (SAMPLED, greedy(200, ignore_eos=False))]
    prompts = [p for pair in zip(PROMPTS[:3], PROMPTS[3:], strict=True) for p in pair]
    outputs = llm.generate([*prompts, *PROMPTS[:3]], [*limited, *free], use_tqdm=False)
    for output, params in zip(outputs, limited, strict=False):
        assert_obeys(output, params)
    for output, expected in zip(outputs[len(limited):], alone, strict=True):
        part, other = output.outputs[0], expected.outputs[0]
        assert (part.token_ids, part.text, part.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        if other.logprobs is not None:              # other company rounds otherwise
            for entry, wanted in zip(part.logprobs, other.logprobs, strict=True):
                assert {i: e.logprob for i, e in entry.items()} == pytest.approx(
                    {i: e.logprob for i, e in wanted.items()}, abs=1e-4)
    deadline = time.monotonic() + 60                # a thread that has just handed over its result holds it a moment
    while llm.engine.sampler._walks and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert len(llm.engine.sampler._walks) == 0, "nothing is kept of sequences that ended"


@pytest.mark.slow
def test_preemption_happens_and_changes_nothing(tiny_model: TinyModels, llm: LLM) -> None:
    """Sequences that give way in the middle of an object end with the same tokens."""
    switching = LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=256, max_num_seqs=2,
                    policy="round-robin:3")
    params = [constrained(json=SCHEMA), constrained(regex=REGEX), constrained(choice=CHOICE), replace(SAMPLED)]
    turns = []
    queues = switching.engine.queues
    preempt = queues.preempt
    queues.preempt = lambda entry: (turns.append(entry), preempt(entry))
    outputs = switching.generate(PROMPTS[:4], params, use_tqdm=False)
    assert any(entry.sequence.sampling_params.structured_outputs for entry in turns)
    expected = llm.generate(PROMPTS[:4], params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]


def test_several_outputs_of_a_request(llm: LLM) -> None:
    """Forks walk on their own: all obey, and they differ."""
    params = constrained(replace(SAMPLED, n=4, best_of=6), json=SCHEMA)
    output = llm.generate(PROMPTS[0], params, use_tqdm=False)[0]
    assert_obeys(output, params)
    assert len({part.text for part in output.outputs}) > 1


@pytest.mark.slow
def test_a_step_that_is_run_twice(llm: LLM) -> None:
    """A batch that fails is run again one by one; the matchers do not take a token twice."""
    params = [constrained(json=SCHEMA), replace(SAMPLED)]
    expected = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    sampler, calls = llm.engine.sampler, []

    class FailsAfterwards(type(sampler.inner)):
        """Raises on every third batch of more than one row: after the matchers have moved."""

        def __call__(self, logits: torch.Tensor, sequences: list[Sequence]) -> Any:
            calls.append(len(sequences))
            if len(sequences) > 1 and len(calls) % 3 == 0:
                raise RuntimeError("no luck")
            return super().__call__(logits, sequences)

    inner, sampler.inner = sampler.inner, FailsAfterwards(sampler.inner.tokenizer)
    try:
        outputs = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    finally:
        sampler.inner = inner
    assert 1 in calls
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]


def test_end_of_sequence_only_where_the_grammar_accepts(llm: LLM) -> None:
    """However much a request wants the end, it comes when the text is complete, and then surely."""
    eos = llm.spec.eos_token_ids[0]
    eager = constrained(greedy(40, ignore_eos=False, logit_bias={eos: 1e9}), regex="(ab){3}c*")
    assert llm.generate(PROMPTS[0], eager, use_tqdm=False)[0].outputs[0].text == "ababab"
    shy = constrained(greedy(40, ignore_eos=False, logit_bias={eos: -1e9}), choice=["yes"])
    output = llm.generate(PROMPTS[0], shy, use_tqdm=False)[0].outputs[0]
    assert (output.text, output.finish_reason, output.token_ids[-1]) == ("yes", "stop", eos)


def test_ignore_eos_repeats_the_end(llm: LLM) -> None:
    output = llm.generate(PROMPTS[0], constrained(greedy(12), choice=["yes", "yes!"]), use_tqdm=False)[0].outputs[0]
    assert output.text in ("yes", "yes!")
    assert len(output.token_ids) == 12
    assert set(output.token_ids[len(output.text):]) == {llm.spec.eos_token_ids[0]}


def test_logprobs_are_those_under_the_constraint(llm: LLM) -> None:
    """Tokens that are ruled out have none; what is left sums to one."""
    params = constrained(greedy(8, ignore_eos=False, logprobs=20), regex="[xyz]{3}")
    output = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0]
    for entry in output.logprobs[:3]:
        assert {logprob.decoded_token for logprob in entry.values()} == {"x", "y", "z"}
        assert sum(torch.tensor([logprob.logprob for logprob in entry.values()]).exp()) == pytest.approx(1, abs=1e-5)
    assert list(output.logprobs[3]) == [llm.spec.eos_token_ids[0]]


@pytest.mark.parametrize(("constraint", "message"), [
    ({"regex": "a[b"}, "unclosed character class"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": "[^\x00-\U0010ffff]"}, "some text meets"),
    ({"json": {"type": "bogus"}}, "bogus"),
    ({"json": {"not": {}}}, "not"),
    ({"json": '{"type":'}, "is not JSON"),
    ({"json": "[1]"}, "an object"),
    ({"json": {"type": {1, 2}}}, "is not JSON"),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
])
def test_a_bad_constraint_is_refused(llm: LLM, constraint: dict[str, Any], message: str) -> None:
    """It names the constraint and what is wrong; the engine serves on."""
    with pytest.raises(ConfigError, match=r"prompts\[1\]: structured_outputs\.(json|regex)") as error:
        llm.generate(PROMPTS[:2], [constrained(choice=CHOICE), constrained(**constraint)], use_tqdm=False)
    assert message in str(error.value)
    assert not llm.engine.has_unfinished_requests()
    params = constrained(choice=CHOICE)
    assert_obeys(llm.generate(PROMPTS[0], params, use_tqdm=False)[0], params)


def test_the_others_run_on_when_one_is_refused(llm: LLM) -> None:
    """While a request is under way another one is refused."""
    request = llm.input_processor.process(PROMPTS[0], greedy(5))
    bad = llm.input_processor.process(PROMPTS[1], constrained(regex="("))
    llm.engine.add_request(request)
    llm.engine.step()
    with pytest.raises(ConfigError, match=r"structured_outputs\.regex"):
        llm.engine.add_request(bad)
    outputs = []
    while llm.engine.has_unfinished_requests():
        outputs += llm.engine.step()
    expected = llm.generate(PROMPTS[0], greedy(5), use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == expected[0].outputs[0].token_ids


@pytest.mark.parametrize("options", [{"min_tokens": 2}, {"allowed_token_ids": [1]}, {"bad_words": ["yes"]}])
def test_a_second_ban_is_refused(llm: LLM, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.* structured_outputs"):
        llm.generate(PROMPTS[0], constrained(replace(SAMPLED, **options), choice=["yes"]), use_tqdm=False)


def test_without_a_tokenizer_it_is_refused(tiny_model: TinyModels) -> None:
    llm = LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=64, skip_tokenizer_init=True)
    with pytest.raises(ConfigError, match="structured_outputs"):
        llm.generate(PROMPTS[0], constrained(choice=["yes"]), use_tqdm=False)
    with pytest.raises(ConfigError, match="skip_tokenizer_init"):
        llm.engine.sampler.check(constrained(choice=["yes"]))


def test_without_the_library(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how to install it; free requests do not need it."""
    llm = LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=64)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"llm-inference-lab\[structured\]"):
        llm.generate(PROMPTS[0], constrained(choice=["yes"]), use_tqdm=False)
    assert len(llm.generate(PROMPTS[0], greedy(3), use_tqdm=False)[0].outputs[0].token_ids) == 3


def test_each_constraint_is_compiled_once(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal constraints share a compiled grammar."""
    llm = LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=64)
    grammars, asked, compiled = llm.engine.sampler.grammars, list[Any](), list[str]()
    new_matcher, compile_alone = grammars.new_matcher, grammars._compile_alone
    monkeypatch.setattr(grammars, "new_matcher", lambda constraint: (asked.append(1), new_matcher(constraint))[1])
    monkeypatch.setattr(grammars, "_compile_alone", lambda *a: (compiled.append(a[1]), compile_alone(*a))[1])
    params = [constrained(choice=["yes", "no"]) for _ in range(4)]
    llm.generate(PROMPTS[:4], params, use_tqdm=False)
    assert compiled == ['["yes", "no"]']
    assert len(asked) == 4                              # once for each request, and not in its steps
    kept = llm.engine.sampler._compiled
    assert len(kept) == 4
    del params
    gc.collect()
    assert len(kept) == 0, "what is compiled for a request goes with it"


def test_the_constraints_used_last_stay_compiled(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is bounded."""
    monkeypatch.setattr("m2_continuous_batching.structured_output._NUM_GRAMMARS", 3)
    grammars = Grammars(llm.get_tokenizer(), llm.spec)
    made = {name: StructuredOutputsParams(choice=[name]) for name in "abcde"}
    for name in "abcade":
        grammars.new_matcher(made[name])
    assert [name for name in "abcde" if grammars.has(made[name])] == ["a", "d", "e"]


def test_a_free_batch_takes_the_short_way(llm: LLM) -> None:
    """Without a constraint the logits go on as they are: the same tensor, not a copy."""
    seen: list[torch.Tensor] = []

    class Spy(FullSampler):
        def __call__(self, logits: torch.Tensor, sequences: list[Sequence]) -> Any:
            seen.append(logits)
            return super().__call__(logits, sequences)

    sampler = StructuredSampler(Spy(), llm.tokenizer, llm.spec)
    sequence = Sequence(next_seq_id(), SequenceData([1]), greedy(3), 0)
    logits = torch.zeros(1, llm.spec.vocab_size)
    sampler(logits, [sequence])
    assert seen == [logits]
    assert sampler.grammars is not None
    assert sampler.grammars._ll_tokenizer is None       # not even made


def test_padded_rows_of_the_model_are_masked(llm: LLM) -> None:
    """The model has 288 rows and the tokenizer 268 tokens: the rest is never chosen, however large."""
    assert llm.spec.vocab_size > len(llm.get_tokenizer())
    sequence = Sequence(next_seq_id(), SequenceData([1]), constrained(greedy(3), regex="x|中"), 0)
    logits = torch.arange(llm.spec.vocab_size, dtype=torch.float32).unsqueeze(0)
    token_id = llm.engine.sampler(logits, [sequence]).token_ids[0]
    allowed = {llm.get_tokenizer().encode(text)[0] for text in ("x", "中")}
    left = {i for i, value in enumerate(logits[0].tolist()) if value > float("-inf")}
    assert token_id in left
    assert allowed <= left
    assert max(left) < len(llm.get_tokenizer())


def test_sentencepiece_tokenizer() -> None:
    """The other kind of tokenizer that a GGUF header describes: spaces are ▁, rare characters fall back to bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁yeson", "es", "yes", "▁yes"]
    header = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens,
              "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
              "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
              "tokenizer.ggml.bos_token_id": 1}
    tokenizer = Tokenizer(build_tokenizer(header, Path("x.gguf")), {})
    sampler = StructuredSampler(FullSampler(tokenizer), tokenizer, SimpleNamespace(eos_token_ids=(2,), vocab_size=300))
    params = constrained(choice=["yes no", "中"])
    texts = set()
    for seed in range(12):
        sequence = Sequence(next_seq_id(), SequenceData([1]), params, seed, (2,))
        while 2 not in sequence.output_token_ids:
            sequence.append_token_id(sampler(torch.zeros(1, 300), [sequence]).token_ids[0])
        texts.add(tokenizer.decode(sequence.output_token_ids))
    assert texts == {"yes no", "中"}


@given(st.lists(st.lists(st.integers(-2 ** 31, 2 ** 31 - 1), min_size=3, max_size=3), min_size=1, max_size=3))
def test_unpack_bits(words: list[list[int]]) -> None:
    expected = [[bool(word >> i & 1) for word in row for i in range(32)] for row in words]
    assert unpack_bits(torch.tensor(words, dtype=torch.int32)).tolist() == expected


@pytest.mark.real_model
def test_real_model_answers_in_json() -> None:
    """The default model, from its GGUF file with the tokenizer that its header describes."""
    llm = LLM(max_model_len=512)
    schema = {"type": "object", "properties": {
        "city": {"type": "string", "maxLength": 30}, "country": {"type": "string", "maxLength": 30},
        "is_capital": {"type": "boolean"}},
        "required": ["city", "country", "is_capital"], "additionalProperties": False}
    question = [{"role": "user", "content": "Tell me about Paris. Answer in JSON with city, country, is_capital."}]
    params = constrained(SamplingParams(temperature=0, max_tokens=120), json=schema)
    output = llm.chat(question, params, use_tqdm=False)[0]
    assert_obeys(output, params)
    assert "Paris" in output.outputs[0].text
    choice = constrained(SamplingParams(temperature=0, max_tokens=20), choice=["Paris", "London"])
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert llm.chat(question, choice, use_tqdm=False)[0].outputs[0].text in ("Paris", "London")
