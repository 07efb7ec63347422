"""`POST /v1/chat/completions`: messages through the model's chat template, the answer as a message."""
from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from m0_basics.outputs import CompletionOutput
from m0_basics.request import Logprob

from .access_log import answer_id, remember_streams
from .answers import Deltas, Envelope, StreamUsage, collect, finite, json_answer, token_text, usage
from .async_engine import AsyncLLMEngine
from .config import ServerConfig
from .output_stream import OutputStream
from .parameters import as_messages, cache_salt, chat_params, scheduling_params, template_options
from .protocol import ChatBody
from .streaming import EventStreamResponse, run_while_connected


async def create_chat_completion(engine: AsyncLLMEngine, config: ServerConfig, body: ChatBody,
                                 request: Request) -> Response:
    """Raises ConfigError or ApiError before anything is sent."""
    streams = await engine.add_requests([as_messages(body.messages)], chat_params(body), scheduling_params(body),
                                        stream=bool(body.stream), add_special_tokens=body.add_special_tokens,
                                        template_options=template_options(body),
                                        cache_salt=cache_salt(body, config, request.headers.get("authorization")))
    remember_streams(request, streams)
    model, request_id = config.served_model_name, answer_id(request, body.request_id)
    if body.stream:
        envelope = Envelope.new("chatcmpl", "chat.completion.chunk", model, request_id)
        return EventStreamResponse(_events(body, envelope, streams), streams)
    [output] = await run_while_connected(request.receive, collect(streams))
    num_tokens = sum(len(part.token_ids) for part in output.outputs)

    def make_choices() -> Iterator[dict[str, Any]]:
        for part in output.outputs:
            yield {"index": part.index, "message": {"role": "assistant", "content": part.text, "refusal": None},
                   "logprobs": _logprobs(part, body), "finish_reason": part.finish_reason,
                   "stop_reason": part.stop_reason}

    num_entries = num_tokens * (1 + (body.top_logprobs or 0)) if body.logprobs else 0
    return await json_answer(engine, Envelope.new("chatcmpl", "chat.completion", model, request_id), make_choices,
                             num_entries, usage=usage(streams, num_tokens))


async def _events(body: ChatBody, envelope: Envelope, streams: Sequence[OutputStream],
                  ) -> AsyncGenerator[dict[str, Any], None]:
    """For each choice: its role, its text piece by piece, why it ended. Then, if asked for, the usage.

    The role comes with the first text and no sooner: clients take it for the first token.
    """
    deltas, begun, reported = Deltas(streams, body), set[int](), StreamUsage(body, streams)

    def chunk(index: int, delta: dict[str, str], part: CompletionOutput | None = None,
              **fields: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": part and _logprobs(part, body), "finish_reason": None}
        return envelope.wrap([choice | fields], **reported.field(deltas.num_tokens))

    async for index, part, _ in deltas:
        if index not in begun:
            begun.add(index)
            yield chunk(index, {"role": "assistant", "content": ""})
        if part.text or part.logprobs:
            yield chunk(index, {"content": part.text}, part)
        if part.finish_reason is not None:
            yield chunk(index, {}, finish_reason=part.finish_reason, stop_reason=part.stop_reason)
    if reported.at_end:
        yield envelope.wrap([], **reported.last(deltas.num_tokens))


def _logprobs(part: CompletionOutput, body: ChatBody) -> dict[str, Any] | None:
    if part.logprobs is None:
        return None
    top = body.top_logprobs or 0
    return {"content": [_entry(token_id, entries[token_id]) | {
        "top_logprobs": [_entry(i, e) for i, e in entries.items() if e.rank is not None and e.rank <= top][:top]}
        for token_id, entries in zip(part.token_ids, part.logprobs, strict=True)], "refusal": None}


def _entry(token_id: int, entry: Logprob) -> dict[str, Any]:
    """A token with its bytes, where it is whole characters: of others the tokenizer does not tell them."""
    text = token_text(token_id, entry)
    whole = entry.decoded_token is not None and "\ufffd" not in text
    return {"token": text, "logprob": finite(entry.logprob), "bytes": list(text.encode()) if whole else None}
