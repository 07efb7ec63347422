"""What completions and chats share on the way back: waiting for the outputs, the envelope, usage, and deltas."""
from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.responses import Response

from m0_basics.outputs import CompletionOutput, RequestOutput
from m0_basics.request import Logprob

from .async_engine import AsyncLLMEngine
from .errors import check_served
from .output_stream import OutputStream, merge
from .protocol import GenerationBody

_LOWEST = -9999.0           # JSON has no -Infinity; vLLM's value


@dataclass(frozen=True)
class Envelope:
    """The fields that every answer, and every piece of a streamed one, begins with."""

    id: str
    object: str
    created: int                # Unix time in seconds
    model: str

    @classmethod
    def new(cls, prefix: str, kind: str, model: str, request_id: str) -> Envelope:
        """`request_id`: by which log and answer can be put together."""
        return cls(f"{prefix}-{request_id}", kind, int(time.time()), model)

    def wrap(self, choices: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        return {**vars(self), "choices": choices, **fields}


async def json_answer(engine: AsyncLLMEngine, envelope: Envelope, make_choices: Callable[[], Iterable[dict[str, Any]]],
                      num_entries: int, **fields: Any) -> Response:
    """An answer in one piece. With `num_entries` log-probabilities it is made in another thread, choice by choice.

    A choice is as long as the model's context at most; all of them, as one object, could hold everybody up.
    """
    def render() -> bytes:
        choices = ",".join(map(to_json, make_choices()))
        return f'{to_json({**vars(envelope), **fields})[:-1]},"choices":[{choices}]}}'.encode()

    content = await engine.workers.run(render, num_entries * 16) if num_entries else render()
    return Response(content, media_type="application/json")


def to_json(value: Any) -> str:
    """As short as JSON gets; raises ValueError for a number that it has no word for."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def usage(streams: Sequence[OutputStream], num_completion_tokens: int) -> dict[str, Any]:
    """Tokens in and out. A prompt counts once, however many outputs it has. Cached are those that were not computed."""
    num_prompt_tokens = sum(len(stream.request.prompt_token_ids) for stream in streams)
    return {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_completion_tokens,
            "total_tokens": num_prompt_tokens + num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(stream.request.num_cached_tokens for stream in streams)}}


async def collect(streams: Sequence[OutputStream]) -> list[RequestOutput]:
    """The last output of each stream. Raises ApiError where the engine has failed one; closes all of them."""
    last: dict[int, RequestOutput] = {}
    async for i, output in merge(streams):
        check_served(output)
        last[i] = output
    return [last[i] for i in range(len(streams))]


class Deltas:
    """Cuts growing outputs into pieces: what was not sent yet."""

    def __init__(self, streams: Sequence[OutputStream], body: GenerationBody) -> None:
        self._streams = streams
        self._num_outputs = body.n or 1
        self._sent: dict[int, CompletionOutput] = {}
        self.num_tokens = 0             # of all that was sent

    async def __aiter__(self) -> AsyncIterator[tuple[int, CompletionOutput, RequestOutput]]:
        """(index of the choice, its new text and tokens, all that its request has returned so far).

        A piece has text, log-probabilities, or a finish_reason.
        """
        async for i, output in merge(self._streams):
            check_served(output)
            for part in output.outputs:
                index = i * self._num_outputs + part.index
                sent = self._sent.get(index, CompletionOutput(part.index, "", []))
                chars, tokens = len(sent.text), len(sent.token_ids)
                has_logprobs = bool(part.logprobs) and len(part.token_ids) > tokens
                if len(part.text) > chars or has_logprobs or part.finish_reason != sent.finish_reason:
                    self._sent[index] = part
                    self.num_tokens += len(part.token_ids) - tokens
                    yield index, replace(part, text=part.text[chars:], token_ids=part.token_ids[tokens:],
                                         logprobs=part.logprobs and part.logprobs[tokens:]), output


class StreamUsage:
    """The `usage` of a stream's pieces: null until the last one, the tokens so far, or no such field at all."""

    def __init__(self, body: GenerationBody, streams: Sequence[OutputStream]) -> None:
        options = body.stream_options
        self.at_end = options is not None and bool(options.include_usage)
        self._so_far = options is not None and bool(options.continuous_usage_stats)
        self._streams = streams

    def field(self, num_tokens: int) -> dict[str, Any]:
        """For a piece up to which `num_tokens` were generated."""
        if not self.at_end:
            return {}
        return {"usage": usage(self._streams, num_tokens) if self._so_far else None}

    def last(self, num_tokens: int) -> dict[str, Any]:
        """For the last piece, which has no choices."""
        return {"usage": usage(self._streams, num_tokens)}


def token_text(token_id: int, entry: Logprob) -> str:
    """A token as log-probabilities name it; by its number where there is no tokenizer."""
    return f"token_id:{token_id}" if entry.decoded_token is None else entry.decoded_token


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, _LOWEST)
