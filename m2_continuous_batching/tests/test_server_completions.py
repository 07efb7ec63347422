"""F2.12: `/v1/completions`, through the official client and by hand, against the offline engine and transformers."""
from __future__ import annotations

import asyncio
import threading

import openai
import pytest
import torch

from m0_basics import SamplingParams
from m0_basics.tools.testing.parity import mixed_length_prompts, reference_logits
from m2_continuous_batching import LLM
from m2_continuous_batching.server import completions
from m2_continuous_batching.server.completions import _logprobs
from m2_continuous_batching.tools.testing.fixtures import server_and_offline
from m2_continuous_batching.tools.testing.server import MODEL, RunningServer

server, offline = server_and_offline(LLM, max_model_len=128)
PROMPTS = ["the one", "on the 中", "Hello", "in an error"]


def greedy(offline, prompts, **settings):
    """[(text, token ids, finish reason)] of the offline engine."""
    params = SamplingParams(**({"temperature": 0, "max_tokens": 12} | settings))
    return [o.outputs[0] for o in offline.generate(prompts, params, use_tqdm=False)]


def complete(server, **body):
    return server.client().completions.create(**({"model": MODEL, "temperature": 0, "max_tokens": 12} | body))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_and_usage_equal_the_offline_engine(server, offline, prompt):
    answer = complete(server, prompt=prompt)
    [expected] = greedy(offline, prompt)
    assert answer.object == "text_completion"
    assert answer.model == MODEL
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason == "length"
    num_prompt = len(offline.get_tokenizer().encode(prompt))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        num_prompt, 12, num_prompt + 12)


def test_every_form_of_prompt(server, offline):
    ids = [offline.get_tokenizer().encode(p) for p in PROMPTS]
    texts = [o.text for o in greedy(offline, PROMPTS)]
    assert [c.text for c in complete(server, prompt=PROMPTS).choices] == texts
    assert [c.text for c in complete(server, prompt=ids).choices] == texts
    assert [c.text for c in complete(server, prompt=ids[1]).choices] == texts[1:2]
    assert [c.index for c in complete(server, prompt=PROMPTS).choices] == [0, 1, 2, 3]


def test_default_length_is_sixteen_tokens(server):
    answer = server.client().completions.create(model=MODEL, prompt="Hello", temperature=0,
                                                extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16


def test_stream_joins_to_the_whole(server, offline):
    chunks = list(complete(server, prompt=PROMPTS, stream=True, stream_options={"include_usage": True}))
    texts, reasons = [""] * 4, [None] * 4
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [o.text for o in greedy(offline, PROMPTS)]
    assert reasons == ["length"] * 4
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 48
    assert chunks[-1].usage.prompt_tokens == sum(len(offline.get_tokenizer().encode(p)) for p in PROMPTS)
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 8, "it came in pieces"


def test_async_client_streams(server, offline):
    async def run():
        async with server.async_client() as client:
            async def one(prompt):
                stream = await client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=12,
                                                         stream=True)
                return "".join([c.choices[0].text async for c in stream])
            return await asyncio.gather(*map(one, PROMPTS))

    assert asyncio.run(run()) == [o.text for o in greedy(offline, PROMPTS)]


def test_n_outputs_equal_the_offline_engine(server, offline):
    """Two prompts, three outputs each: choice 3 is the first of the second prompt."""
    body = {"temperature": 1.0, "seed": 7, "n": 3, "prompt": PROMPTS[:2]}
    params = SamplingParams(temperature=1.0, seed=7, n=3, max_tokens=12)
    expected = [o.text for output in offline.generate(PROMPTS[:2], params, use_tqdm=False) for o in output.outputs]
    answer = complete(server, **body)
    assert [c.text for c in answer.choices] == expected
    assert [c.index for c in answer.choices] == list(range(6))
    texts = [""] * 6
    for chunk in complete(server, **body, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_best_of_equals_the_offline_engine(server, offline):
    params = SamplingParams(temperature=1.0, seed=7, best_of=3, max_tokens=12)
    [expected] = offline.generate(PROMPTS[:1], params, use_tqdm=False)
    answer = complete(server, prompt=PROMPTS[0], temperature=1.0, seed=7, best_of=3)
    assert [c.text for c in answer.choices] == [expected.outputs[0].text]


@pytest.mark.parametrize("settings", [
    {"stop": ["e"]}, {"presence_penalty": 1.5, "frequency_penalty": 0.5}, {"logit_bias": {"100": 50.0}},
    {"repetition_penalty": 1.7}, {"min_tokens": 12, "stop_token_ids": [5]}, {"allowed_token_ids": [40, 41, 42]},
    {"bad_words": ["the"]}, {"temperature": 1.0, "seed": 3, "top_k": 4}, {"temperature": 1.0, "seed": 3, "min_p": 0.2},
    {"temperature": 0.7, "seed": 3, "top_p": 0.5}, {"ignore_eos": True}, {"skip_special_tokens": False},
    {"stop": "e", "include_stop_str_in_output": True},
])
def test_sampling_parameters_reach_the_sampler(server, offline, settings):
    answer = complete(server, prompt=PROMPTS[0], extra_body=settings)
    params = dict(settings)
    if "logit_bias" in params:
        params["logit_bias"] = {100: 50.0}
    [expected] = greedy(offline, PROMPTS[0], **params)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].stop_reason == expected.stop_reason


def test_legacy_logprobs(server, offline):
    """Log-probabilities of the output equal the offline engine's; offsets point into the text."""
    choice = complete(server, prompt=PROMPTS[0], logprobs=3).choices[0]
    [expected] = greedy(offline, PROMPTS[0], logprobs=3)
    chosen = [entry[i] for i, entry in zip(expected.token_ids, expected.logprobs, strict=True)]
    assert choice.logprobs.tokens == [e.decoded_token for e in chosen]
    assert choice.logprobs.token_logprobs == pytest.approx([e.logprob for e in chosen])
    for top, entry in zip(choice.logprobs.top_logprobs, expected.logprobs, strict=True):
        assert max(top.values()) == pytest.approx(max(e.logprob for e in entry.values()))
        assert set(top) == {e.decoded_token for e in entry.values()}
    assert_offsets(choice)


def assert_offsets(choice):
    """Where a token is whole characters, its text stands at its offset."""
    whole = 0
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        if "\ufffd" not in token:
            assert choice.text[offset:offset + len(token)] == token
            whole += 1
    assert whole > 0


def test_echo_with_logprobs(server, offline, tiny_model):
    """The prompt comes first, in text and in numbers; nothing predicts its first token (transformers agrees)."""
    prompt = "the one on 中 an error"
    ids = offline.get_tokenizer().encode(prompt)
    [expected] = greedy(offline, prompt, max_tokens=3)
    streamed = list(complete(server, prompt=prompt, echo=True, logprobs=2, max_tokens=3, stream=True))
    choice = complete(server, prompt=prompt, echo=True, logprobs=2, max_tokens=3).choices[0]
    assert choice.text == prompt + expected.text == "".join(c.choices[0].text for c in streamed)
    values = choice.logprobs.token_logprobs
    assert values[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    whole = [*ids, *expected.token_ids]
    logprobs = torch.log_softmax(reference_logits(tiny_model("qwen3"), whole), dim=-1)
    assert values[1:] == pytest.approx([logprobs[i, t].item() for i, t in enumerate(whole[1:])], abs=1e-4)
    assert_offsets(choice)
    assert choice.logprobs.tokens == [offline.get_tokenizer().decode([i], False) for i in whole]
    for name in ("token_logprobs", "tokens", "top_logprobs", "text_offset"):
        pieces = [value for c in streamed for value in getattr(c.choices[0].logprobs, name)]
        assert pieces == getattr(choice.logprobs, name), name


def test_max_tokens_zero_scores_the_prompt(server, offline):
    ids = offline.get_tokenizer().encode(PROMPTS[1])
    answer = complete(server, prompt=PROMPTS[1], echo=True, logprobs=0, max_tokens=0)
    assert answer.choices[0].text == PROMPTS[1]
    assert len(answer.choices[0].logprobs.tokens) == len(ids)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 0)
    assert complete(server, prompt=PROMPTS[1], max_tokens=0).choices[0].text == ""
    streamed = list(complete(server, prompt=PROMPTS[1], echo=True, max_tokens=0, stream=True))
    assert "".join(c.choices[0].text for c in streamed) == PROMPTS[1]


def test_tokens_as_token_ids(server, offline):
    """vLLM's answer to tokens that are no text of their own."""
    [expected] = greedy(offline, PROMPTS[0])
    choice = complete(server, prompt=PROMPTS[0], logprobs=1,
                      extra_body={"return_tokens_as_token_ids": True}).choices[0]
    assert choice.logprobs.tokens == [f"token_id:{i}" for i in expected.token_ids]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_lm_eval_loglikelihood_equals_transformers(server, tiny_model, max_tokens):
    """F2.12: what lm-eval's `local-completions` sends and reads; batch of contexts and continuations in token ids."""
    rows = mixed_length_prompts(260, 6, seed=1, longest=40)
    pairs = [(row, mixed_length_prompts(260, 1, seed=i, longest=8)[0]) for i, row in enumerate(rows)]
    greedy_row = pairs[2][0]
    best = reference_logits(tiny_model("qwen3"), greedy_row)[-1].argmax().item()
    pairs.append((greedy_row, [best]))
    body = {"model": MODEL, "prompt": [context + rest for context, rest in pairs], "temperature": 0,
            "max_tokens": max_tokens, "logprobs": 1, "seed": 1234, "echo": True}
    status, answer = server.send("/v1/completions", body)
    assert status == 200
    choices = sorted(answer["choices"], key=lambda c: c["index"])
    for choice, (context, rest) in zip(choices, pairs, strict=True):
        end = len(context) + len(rest)
        values = choice["logprobs"]["token_logprobs"][len(context):end]
        tops = choice["logprobs"]["top_logprobs"][len(context):end]
        assert len(choice["logprobs"]["token_logprobs"]) == end + max_tokens
        logprobs = torch.log_softmax(reference_logits(tiny_model("qwen3"), context + rest), dim=-1)
        steps = [logprobs[len(context) - 1 + i] for i in range(len(rest))]
        assert sum(values) == pytest.approx(sum(s[t].item() for s, t in zip(steps, rest, strict=True)), abs=1e-3)
        is_greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        assert is_greedy == all(s.argmax().item() == t for s, t in zip(steps, rest, strict=True))
    assert is_greedy, "the last pair is"


def test_echo_of_a_prompt_that_never_ran(server, offline):
    """Its time was up in the queue: the prompt comes back, and no number is known of it."""
    prompt = "the one on"
    choice = complete(server, prompt=prompt, echo=True, logprobs=1, extra_body={"timeout": 1e-9}).choices[0]
    assert (choice.text, choice.finish_reason) == (prompt, "abort")
    assert choice.logprobs.token_logprobs == [None] * len(offline.get_tokenizer().encode(prompt))


@pytest.mark.parametrize("stream", [False, True])
def test_the_event_loop_does_not_build_the_echo(server, monkeypatch, stream):
    """F2.12: the log-probabilities of a prompt, token by token, are put together in the thread for inputs."""
    threads = []

    def watched(body, tokenizer, token_ids, entries, offsets):
        if None in entries:                                 # nothing predicts the first token of a prompt
            threads.append(threading.current_thread().name)
        return _logprobs(body, tokenizer, token_ids, entries, offsets)

    monkeypatch.setattr(completions, "_logprobs", watched)
    answer = complete(server, prompt=PROMPTS[:2], echo=True, logprobs=1, stream=stream)
    assert len(list(answer) if stream else answer.choices) >= 2
    assert len(threads) == 2
    assert all(name.startswith("inputs") for name in threads)


@pytest.mark.parametrize("max_tokens", [0, 12])
def test_usage_of_the_tokens_so_far(server, offline, max_tokens):
    """vLLM's `continuous_usage_stats`: it grows with the text, and its last value is the total."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, end = complete(server, prompt=PROMPTS[:2], max_tokens=max_tokens, stream=True, stream_options=options)
    num_prompt = sum(len(offline.get_tokenizer().encode(p)) for p in PROMPTS[:2])
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts == sorted(counts)
    assert {c.usage.prompt_tokens for c in chunks} == {num_prompt}
    assert counts[-1] == end.usage.completion_tokens == 2 * max_tokens
    assert (len(set(counts)) > 2) == (max_tokens > 0), "also in between"


def test_what_asks_for_nothing_is_accepted(server):
    """Fields that vLLM knows, at the values that its clients write out of habit; the request's own name comes back."""
    body = {"use_beam_search": False, "length_penalty": 1.0, "spaces_between_special_tokens": True,
            "detokenize": True, "truncate_prompt_tokens": None, "request_id": "mine-1", "cache_salt": "x",
            "suffix": "", "stream_options": None}
    answer = complete(server, prompt="x", extra_body=body)
    assert answer.usage.completion_tokens == 12
    assert answer.id == "cmpl-mine-1"
    for name, value in (("use_beam_search", True), ("length_penalty", 0.5), ("detokenize", False),
                        ("truncate_prompt_tokens", 4), ("spaces_between_special_tokens", False)):
        with pytest.raises(openai.BadRequestError, match=f"{name} is not supported by this server; allowed: null"):
            complete(server, prompt="x", extra_body={name: value})


def test_unknown_model_is_404(server):
    with pytest.raises(openai.NotFoundError, match="'other' does not exist; allowed: 'tiny'"):
        complete(server, model="other", prompt="x")


def test_the_space_between_prompt_and_output(tiny_model):
    """A SentencePiece tokenizer: echo does not join words, and each token's text stands at its offset."""
    with RunningServer(lambda **extra: LLM(str(tiny_model("sentencepiece")), dtype="float32", **extra)) as server:
        choice = complete(server, prompt="the", echo=True, logprobs=1, max_tokens=5).choices[0]
        assert choice.text == "the in. 中 the"
        assert choice.logprobs.tokens == ["the", " in", ".", " ", "中", " the"]
        assert choice.logprobs.text_offset == [0, 3, 6, 7, 8, 9]
        pieces = [c.choices[0].text for c in complete(server, prompt="the", max_tokens=5, stream=True)]
        assert "".join(pieces) == " in. 中 the"
        body = {"structured_outputs": {"choice": [" in", " the"]}}
        assert complete(server, prompt="the", extra_body=body).choices[0].text == " in"
