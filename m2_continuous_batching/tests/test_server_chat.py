"""F2.12: `/v1/chat/completions` through the official client, against the offline engine's `chat`."""
from __future__ import annotations

import asyncio
from functools import partial

import openai
import pytest

from m0_basics import SamplingParams
from m2_continuous_batching import LLM, StructuredOutputsParams
from m2_continuous_batching.server.parameters import chat_params
from m2_continuous_batching.server.protocol import ChatBody
from m2_continuous_batching.testing.server import MODEL, RunningServer

OPTIONS = {"dtype": "float32", "max_model_len": 96, "max_num_seqs": 4}
MESSAGES = [{"role": "system", "content": "the one"}, {"role": "user", "content": "on the 中"}]


@pytest.fixture(scope="module")
def server(tiny_model):
    with RunningServer(partial(LLM, str(tiny_model("qwen3")), **OPTIONS)) as running:
        yield running


@pytest.fixture(scope="module")
def offline(tiny_model):
    return LLM(str(tiny_model("qwen3")), **OPTIONS)


def expected(offline, **settings):
    params = SamplingParams(**({"temperature": 0, "max_tokens": 12} | settings))
    return offline.chat(MESSAGES, params, use_tqdm=False)[0]


def chat(server, **body):
    return server.client().chat.completions.create(
        **({"model": MODEL, "temperature": 0, "max_tokens": 12, "messages": MESSAGES} | body))


def test_answer_and_usage_equal_the_offline_engine(server, offline):
    answer, reference = chat(server), expected(offline)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == reference.outputs[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(reference.prompt_token_ids), 12)


def test_without_a_limit_it_goes_on_to_the_models_length(server, offline):
    """Or to the end-of-sequence token."""
    answer = chat(server, max_tokens=None)
    assert answer.choices[0].message.content == expected(offline, max_tokens=None).outputs[0].text
    limited = chat(server, max_tokens=None, max_completion_tokens=5)
    assert limited.usage.completion_tokens == 5


def test_text_parts_are_joined_by_lines(server, offline):
    parts = [{"type": "text", "text": "on"}, {"type": "text", "text": "the 中"}]
    [reference] = offline.chat([{"role": "user", "content": "on\nthe 中"}],
                               SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    answer = chat(server, messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == reference.outputs[0].text


def test_an_answer_can_be_sent_back(server):
    """With all the empty fields that the client writes."""
    first = chat(server).choices[0].message
    again = chat(server, messages=[*MESSAGES, first, {"role": "user", "content": "the"}])
    assert again.usage.completion_tokens > 0


def test_stream_has_role_deltas_finish_and_usage(server, offline):
    chunks = list(chat(server, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected(offline).outputs[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert all(c.object == "chat.completion.chunk" and c.usage is None for c in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == 12


def test_stream_without_usage_has_none(server):
    chunks = list(chat(server, stream=True))
    assert all(len(c.choices) == 1 and c.usage is None for c in chunks)


def test_streams_side_by_side(server, offline):
    """Eight at once, two for each place in the batch, with the asynchronous client."""
    async def run():
        async with server.async_client() as client:
            async def one():
                stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0,
                                                              max_tokens=12, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream])
            return await asyncio.gather(*(one() for _ in range(8)))

    assert asyncio.run(run()) == [expected(offline).outputs[0].text] * 8


def test_n_outputs_equal_the_offline_engine(server, offline):
    texts = [o.text for o in expected(offline, n=3, temperature=1.0, seed=5).outputs]
    assert [c.message.content for c in chat(server, n=3, temperature=1.0, seed=5).choices] == texts
    streamed = [""] * 3
    for chunk in chat(server, n=3, temperature=1.0, seed=5, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server, offline, stream):
    """The chosen token, its bytes, and the two best ones at each step."""
    reference = expected(offline, logprobs=2).outputs[0]
    answer = chat(server, logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        content = [entry for c in answer if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    else:
        content = answer.choices[0].logprobs.content
    assert len(content) == len(reference.token_ids)
    for entry, token_id, step in zip(content, reference.token_ids, reference.logprobs, strict=True):
        assert entry.logprob == pytest.approx(step[token_id].logprob)
        assert entry.token == step[token_id].decoded_token
        assert entry.bytes == (None if "\ufffd" in entry.token else list(entry.token.encode()))
        best = sorted(step.values(), key=lambda e: e.rank)[:2]
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx([e.logprob for e in best])
    alone = chat(server, logprobs=True).choices[0].logprobs.content
    assert [e.top_logprobs for e in alone] == [[]] * 12


@pytest.mark.parametrize("field", [
    {"tools": [{"type": "function", "function": {"name": "f"}}]}, {"tool_choice": "required"}, {"functions": [{}]},
    {"modalities": ["audio"]}, {"audio": {"voice": "x"}}, {"store": True}, {"reasoning_effort": "high"},
    {"web_search_options": {}}, {"service_tier": "flex"}, {"prediction": {"type": "content", "content": "x"}},
])
def test_what_cannot_be_honoured_is_refused_by_name(server, field):
    [name] = field
    with pytest.raises(openai.BadRequestError, match=f"{name} is not supported"):
        chat(server, extra_body=field)


def test_what_asks_for_nothing_is_accepted(server):
    answer = chat(server, extra_body={"tools": [], "tool_choice": "none", "store": False, "modalities": ["text"],
                                      "parallel_tool_calls": True, "user": "me", "reasoning_effort": None,
                                      "response_format": {"type": "text"}})
    assert answer.usage.completion_tokens == 12


@pytest.mark.parametrize(("fields", "expected"), [
    ({"response_format": {"type": "json_object"}}, {"json": {"type": "object"}}),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}},
     {"json": {"type": "integer"}}),
    ({"structured_outputs": {"json": {"type": "object"}}}, {"json": {"type": "object"}}),
    ({"guided_json": '{"type": "object"}'}, {"json": '{"type": "object"}'}),
    ({"guided_regex": "[0-9]+"}, {"regex": "[0-9]+"}),
    ({"guided_choice": ["yes", "no"]}, {"choice": ["yes", "no"]}),
])
def test_every_spelling_of_a_constraint(server, fields, expected):
    """All become the same `structured_outputs`; two of them at once are refused."""
    body = ChatBody.model_validate({"messages": MESSAGES, **fields})
    assert chat_params(body).structured_outputs == StructuredOutputsParams(**expected)
    twice = {"guided_regex": "a", **fields} if "guided_regex" not in fields else {"guided_choice": ["a"], **fields}
    with pytest.raises(openai.BadRequestError, match="constrained more than once"):
        chat(server, extra_body=twice)


def test_a_constrained_answer(server):
    """End to end: the text is one of the choices, whatever the random model would rather say."""
    answer = chat(server, max_tokens=None, extra_body={"guided_choice": ["yes", "the one"]})
    assert answer.choices[0].message.content in ("yes", "the one")
    assert answer.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="regex"):
        chat(server, extra_body={"guided_regex": "(["})
