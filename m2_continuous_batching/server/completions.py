"""`POST /v1/completions`: OpenAI's first API, which evaluation harnesses score prompts with (echo and logprobs)."""
from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import cached_property
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from m0_basics.config import ConfigError
from m0_basics.input_processor import Prompt, as_prompt_list
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.outputs import CompletionOutput, RequestOutput
from m0_basics.request import Logprob
from m1_offline.detokenizer import IncrementalDetokenizer

from .access_log import answer_id, remember_streams
from .answers import Deltas, Envelope, StreamUsage, collect, finite, json_answer, token_text, usage
from .async_engine import AsyncLLMEngine
from .config import ServerConfig
from .output_stream import OutputStream
from .parameters import cache_salt, completion_params, scheduling_params
from .protocol import CompletionBody
from .streaming import EventStreamResponse, run_while_connected


async def create_completion(engine: AsyncLLMEngine, config: ServerConfig, body: CompletionBody,
                            request: Request) -> Response:
    """Raises ConfigError or ApiError before anything is sent."""
    params = completion_params(body)
    prompts: list[Prompt] = as_prompt_list(body.prompt)
    if not prompts:
        raise ConfigError("prompt=[] is not valid; allowed: at least one prompt")
    streams = await engine.add_requests(prompts, params, scheduling_params(body), stream=bool(body.stream),
                                        add_special_tokens=body.add_special_tokens,
                                        cache_salt=cache_salt(body, config, request.headers.get("authorization")))
    remember_streams(request, streams)
    envelope = Envelope.new("cmpl", "text_completion", config.served_model_name, answer_id(request, body.request_id))
    if body.stream:
        return EventStreamResponse(_events(engine, body, envelope, streams), streams)
    outputs = await run_while_connected(request.receive, collect(streams))
    num_tokens = sum(len(part.token_ids) for output in outputs for part in output.outputs)
    num_prompt = sum(len(o.outputs) * len(o.prompt_token_ids) for o in outputs) if body.echo else 0

    def make_choices() -> Iterator[dict[str, Any]]:
        index = itertools.count()
        for output in outputs:
            prompt = _Prompt(body, output, engine.llm.tokenizer)
            for part in output.outputs:
                yield _Choice(body, prompt, engine.llm.tokenizer).piece(next(index), part)

    num_entries = _num_entries(body, num_tokens, num_prompt)
    return await json_answer(engine, envelope, make_choices, num_entries,
                             usage=usage(streams, num_tokens if body.max_tokens != 0 else 0))


def _num_entries(body: CompletionBody, num_tokens: int, num_prompt: int) -> int:
    """What takes as long to write as so many log-probabilities. An echo without them is four tokens for one."""
    return num_prompt // 4 if body.logprobs is None else (num_tokens + num_prompt) * (1 + body.logprobs)


async def _events(engine: AsyncLLMEngine, body: CompletionBody, envelope: Envelope, streams: Sequence[OutputStream],
                  ) -> AsyncGenerator[dict[str, Any], None]:
    deltas, reported, tokenizer = Deltas(streams, body), StreamUsage(body, streams), engine.llm.tokenizer
    prompts, made = dict[str, _Prompt](), dict[int, _Choice]()

    def num_tokens() -> int:
        return deltas.num_tokens if body.max_tokens != 0 else 0

    async for index, part, output in deltas:
        if (choice := made.get(index)) is None:
            if (prompt := prompts.get(output.request_id)) is None:
                prompt = prompts[output.request_id] = _Prompt(body, output, tokenizer)
                if body.echo:
                    size = _num_entries(body, 0, len(output.prompt_token_ids))
                    await engine.workers.run(prompt.prepare, size)
            choice = made[index] = _Choice(body, prompt, tokenizer)
        yield envelope.wrap([choice.piece(index, part)], **reported.field(num_tokens()))
    if reported.at_end:
        yield envelope.wrap([], **reported.last(num_tokens()))


class _Prompt:
    """What all choices of a prompt share: its echo, where that is asked for. Made once: a long one takes a while."""

    def __init__(self, body: CompletionBody, output: RequestOutput, tokenizer: Tokenizer | None) -> None:
        """`output` may be of any time after the prompt has run: what is read of it here is that of the prompt."""
        self.body = body
        self.tokenizer = tokenizer
        self.token_ids = output.prompt_token_ids
        self._text = output.prompt
        self._known_logprobs = output.prompt_logprobs or []

    def prepare(self) -> None:
        """Make the echo. For another thread than the event loop's."""
        _ = self.echo if self.body.logprobs is None else self.logprobs

    @cached_property
    def echo(self) -> str:
        if not self.body.echo:
            return ""
        if self._text is None and self.tokenizer is not None:
            return self.tokenizer.decode(self.token_ids, skip_special_tokens=False)
        return self._text or ""

    @cached_property
    def logprobs(self) -> dict[str, list[Any]]:
        """The log-probabilities of the prompt in their JSON form."""
        unknown = [None] * (len(self.token_ids) - len(self._known_logprobs))    # it ended before its prompt had run
        return _logprobs(self.body, self.tokenizer, self.token_ids, [*self._known_logprobs, *unknown],
                         _Offsets(0, self.tokenizer, False, end=len(self.echo)))


class _Choice:
    """One choice in the making: the first piece carries the echo of the prompt, where that is asked for."""

    def __init__(self, body: CompletionBody, prompt: _Prompt, tokenizer: Tokenizer | None) -> None:
        self.body = body
        self.prompt = prompt
        self.tokenizer = tokenizer
        self.is_first = True
        self.offsets = _Offsets(len(prompt.echo), tokenizer, body.skip_special_tokens is not False, prompt.token_ids)

    def piece(self, index: int, part: CompletionOutput) -> dict[str, Any]:
        """The JSON form of what is new of the choice; `max_tokens=0` leaves the generated token out."""
        text, token_ids, entries, reason = part.text, part.token_ids, part.logprobs, part.finish_reason
        if self.body.max_tokens == 0:
            text, token_ids, entries, reason = "", [], entries and [], "length"
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = _logprobs(self.body, self.tokenizer, token_ids, entries or [], self.offsets)
            if self.is_first and self.body.echo:
                prompt = self.prompt.logprobs
                logprobs = {name: prompt[name] + logprobs[name] for name in prompt}
        text = self.prompt.echo + text if self.is_first else text
        self.is_first = False
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason,
                "stop_reason": part.stop_reason}


def _logprobs(body: CompletionBody, tokenizer: Tokenizer | None, token_ids: Sequence[int],
              entries: Sequence[dict[int, Logprob] | None], offsets: _Offsets) -> dict[str, list[Any]]:
    def name(token_id: int, entry: Logprob) -> str:
        return f"token_id:{token_id}" if body.return_tokens_as_token_ids else token_text(token_id, entry)

    result: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token_id, entry in zip(token_ids, entries, strict=True):
        result["text_offset"].append(offsets.next(token_id))
        if entry is None:                                   # nothing predicts the first token of a prompt
            text = tokenizer.decode([token_id], skip_special_tokens=False) if tokenizer else None
            result["tokens"].append(name(token_id, Logprob(0.0, decoded_token=text)))
            result["token_logprobs"].append(None)
            result["top_logprobs"].append(None)
            continue
        result["tokens"].append(name(token_id, entry[token_id]))
        result["token_logprobs"].append(finite(entry[token_id].logprob))
        top: dict[str, float] = {}
        for other, logprob in entry.items():                # best first: of tokens with the same text the best stays
            top.setdefault(name(other, logprob), finite(logprob.logprob))
        result["top_logprobs"].append(top)
    return result


class _Offsets:
    """Where each token begins in the text of the choice, in characters."""

    def __init__(self, start: int, tokenizer: Tokenizer | None, skip_special_tokens: bool,
                 prompt_token_ids: Sequence[int] = (), end: int | None = None) -> None:
        self._position = start
        self._end = end
        self._tokenizer = tokenizer
        self._detokenizer = (IncrementalDetokenizer(tokenizer, skip_special_tokens, prompt_token_ids) if tokenizer
                             else None)

    def next(self, token_id: int) -> int:
        begin = self._position
        if self._detokenizer is not None and self._tokenizer is not None:
            self._position += len(self._detokenizer.push(token_id))
            # Characters of earlier tokens that were held back until now stand before it.
            begin = max(begin, self._position - len(self._tokenizer.token_text(token_id)))
        return begin if self._end is None else min(begin, self._end)
