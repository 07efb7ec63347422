"""F2.12: `/v1/chat/completions` through the official client, against the offline engine's `chat`."""
from __future__ import annotations

import asyncio

import openai
import pytest

from m0_basics import CompletionOutput, RequestOutput, SamplingParams
from m0_basics.request import Request
from m2_continuous_batching import LLM, StructuredOutputsParams
from m2_continuous_batching.server.answers import Envelope
from m2_continuous_batching.server.chat import _events
from m2_continuous_batching.server.output_stream import OutputStream
from m2_continuous_batching.server.parameters import chat_params
from m2_continuous_batching.server.protocol import ChatBody
from m2_continuous_batching.tools.testing.fixtures import server_and_offline
from m2_continuous_batching.tools.testing.server import MODEL

server, offline = server_and_offline(LLM, max_model_len=96)
MESSAGES = [{"role": "system", "content": "the one"}, {"role": "user", "content": "on the 中"}]


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


def test_nothing_is_sent_before_the_engine_has_produced_something():
    """F2.12: the role comes with the first text, so that a client which waits for it measures the first token."""
    async def run():
        body = ChatBody.model_validate({"messages": MESSAGES, "stream": True, "n": 2})
        request = Request("r", None, [1, 2], SamplingParams(n=2), stream=True)
        stream = OutputStream(request, lambda request_id: None)
        events = _events(body, Envelope.new("chatcmpl", "chat.completion.chunk", MODEL, "id"), [stream])
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.05)
        assert not first.done()
        stream.put(RequestOutput("r", None, [1, 2], [CompletionOutput(1, "a", [5])], False))
        made = [await first, await anext(events)]
        parts = [CompletionOutput(0, "b", [6], finish_reason="stop"), CompletionOutput(1, "ac", [5, 7])]
        stream.put(RequestOutput("r", None, [1, 2], parts, False))
        made += [await anext(events) for _ in range(4)]
        await events.aclose()
        return [(c["index"], c["delta"]) for chunk in made for c in chunk["choices"]]

    role = {"role": "assistant", "content": ""}
    assert asyncio.run(run()) == [(1, role), (1, {"content": "a"}), (0, role), (0, {"content": "b"}), (0, {}),
                                  (1, {"content": "c"})]


def test_usage_of_the_tokens_so_far(server, offline):
    """vLLM's `continuous_usage_stats`: with every piece, and the total at the end."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, end = chat(server, stream=True, stream_options=options)
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2
    assert counts[-1] == end.usage.completion_tokens == 12
    assert {c.usage.prompt_tokens for c in chunks} == {len(expected(offline).prompt_token_ids)}
    with pytest.raises(openai.BadRequestError, match="needs include_usage"):
        chat(server, stream=True, stream_options={"continuous_usage_stats": True})


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
    {"modalities": ["audio"]}, {"audio": {"voice": "x"}}, {"reasoning_effort": "high"}, {"web_search_options": {}},
    {"echo": True}, {"use_beam_search": True}, {"chat_template": "x"}, {"detokenize": False},
])
def test_what_cannot_be_honoured_is_refused_by_name(server, field):
    [name] = field
    with pytest.raises(openai.BadRequestError, match=f"{name} is not supported"):
        chat(server, extra_body=field)


def test_what_asks_for_nothing_is_accepted(server):
    answer = chat(server, extra_body={"tools": [], "tool_choice": "none", "store": False, "modalities": ["text"],
                                      "parallel_tool_calls": True, "user": "me", "reasoning_effort": None,
                                      "response_format": {"type": "text"}, "use_beam_search": False,
                                      "length_penalty": 1.0, "spaces_between_special_tokens": True,
                                      "add_generation_prompt": True, "chat_template_kwargs": {}, "echo": False,
                                      "detokenize": True, "truncate_prompt_tokens": None, "include_reasoning": True,
                                      "continue_final_message": False, "request_id": "mine", "cache_salt": "x"})
    assert answer.usage.completion_tokens == 12
    assert answer.id == "chatcmpl-mine"
    streamed = chat(server, stream=True, stream_options={"continuous_usage_stats": False}, extra_body={
        "request_id": "mine"})
    assert {c.id for c in streamed} == {"chatcmpl-mine"}
    for bad in ("", "a b", "x" * 200, "\n"):
        with pytest.raises(openai.BadRequestError, match="request_id"):
            chat(server, extra_body={"request_id": bad})


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
