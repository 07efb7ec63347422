"""The clients of the soak test: good ones, rude ones, and what has to come of each of their requests.

    good    completions and chats, streamed or not, from coroutines and from threads: greedy, so the text is known
    rude    hang up after some pieces, while they wait, or in the middle of their own request
    wrong   fields of no use, bytes that are no JSON, no JSON by its content type: to be refused
"""
from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import openai

MODEL = "soak"
PATIENCE_S = 600.0                  # a request that takes longer is lost
# How often in one round of a client; it begins a new round when it has done them all, in any order.
ACTIONS = {"whole": 4, "stream": 4, "chat": 3, "chat_stream": 3, "malformed": 2, "broken_json": 1, "wrong_type": 1,
           "leave_stream": 2, "leave_whole": 2, "leave_in_body": 1}
SYNC_ACTIONS = {"sync_whole": 1, "sync_stream": 1, "sync_chat": 1, "sync_chat_stream": 1}
_MALFORMED: tuple[dict[str, Any], ...] = (
    {"temperature": "hot"}, {"prompt": ""}, {"prompt": [10 ** 9]}, {"top_p": 7}, {"max_tokens": -5},
    {"n": 10 ** 6}, {"suffix": "x"}, {"logit_bias": {"word": 1}})
_GOOD_JSON = b'{"prompt": "The sea is", "max_tokens": 4}'
_BROKEN_JSON = (b"", b"{", b"\xff\xfe", b"[" * 9000, b"null", _GOOD_JSON[:-1], _GOOD_JSON + b"}")


class UnexpectedAnswerError(Exception):
    """The server has not refused what it should have refused."""


@dataclass(frozen=True)
class Expected:
    """One greedy request and the offline engine's answer to it."""

    prompt: str
    is_chat: bool
    max_tokens: int
    text: str
    num_tokens: int

    @property
    def body(self) -> dict[str, Any]:
        asked: dict[str, Any] = {"prompt": self.prompt}
        if self.is_chat:
            asked = {"messages": [{"role": "user", "content": self.prompt}]}
        return {"model": MODEL, "temperature": 0, "max_tokens": self.max_tokens, **asked}


@dataclass
class Tally:
    """What became of the requests."""

    counts: Counter[str] = field(default_factory=Counter)       # by action, for those that went as they should
    different: list[dict[str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    lost: int = 0
    output_tokens: int = 0

    @contextmanager
    def record(self, action: str) -> Iterator[None]:
        """Around one request: count it, or take down how it failed."""
        try:
            yield
        except (openai.APITimeoutError, TimeoutError):
            self.lost += 1
        except (openai.APIError, OSError, UnexpectedAnswerError) as error:
            self.errors.append(f"{action}: {type(error).__name__}: {error}")
        else:
            self.counts[action] += 1

    def compare(self, want: Expected, text: str) -> None:
        self.output_tokens += want.num_tokens
        if text != want.text:
            self.different.append({"prompt": want.prompt, "expected": want.text, "got": text})


def total(tallies: Iterable[Tally]) -> Tally:
    """All of them together."""
    result = Tally()
    for tally in tallies:
        result.counts += tally.counts
        result.different += tally.different
        result.errors += tally.errors
        result.lost += tally.lost
        result.output_tokens += tally.output_tokens
    return result


async def run_client(url: str, number: int, deadline: float, expected: list[Expected],
                     on_round: Callable[[], None] = lambda: None) -> Tally:
    """One client that does all of `ACTIONS`, once at least, and until `time.monotonic()` reaches the deadline.

    `on_round` is called at the end of each round.
    """
    tally, rng = Tally(), random.Random(number)
    async with openai.AsyncOpenAI(**_options(url)) as client:
        for action in _rounds(ACTIONS, rng, deadline, on_round):
            want = rng.choice([e for e in expected if e.is_chat == action.startswith("chat")])
            with tally.record(action):
                await _act(client, url, action, want, rng, tally)
    return tally


def run_sync_client(url: str, number: int, deadline: float, expected: list[Expected]) -> Tally:
    """One client for a thread of its own, with OpenAI's synchronous client."""
    tally, rng = Tally(), random.Random(-1 - number)
    with openai.OpenAI(**_options(url)) as client:
        for action in _rounds(SYNC_ACTIONS, rng, deadline):
            want = rng.choice([e for e in expected if e.is_chat == ("chat" in action)])
            with tally.record(action):
                answer = _create(client, want)(**want.body, stream=action.endswith("stream"))
                pieces = answer if action.endswith("stream") else [answer]
                tally.compare(want, "".join(map(text_of, pieces)))
    return tally


def text_of(answer: Any) -> str:
    """The text of an answer, or of a piece of one, be it a completion's or a chat's."""
    [choice] = answer.choices
    part = getattr(choice, "delta", None) or getattr(choice, "message", None)
    return (choice.text if part is None else part.content) or ""


async def send_raw(url: str, body: bytes, content_type: str = "application/json", missing: int = 0,
                   leave_after_s: float = 0.0) -> int:
    """POST the bytes as they are; return the status. With `missing` bytes it hangs up before the body's end: 0."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: soak\r\nConnection: close\r\nContent-Type: %s\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (content_type.encode(), len(body) + missing, body))
        await writer.drain()
        if missing:
            await asyncio.sleep(leave_after_s)
            return 0
        async with asyncio.timeout(PATIENCE_S):
            status_line = await reader.readline()
        if not status_line:
            raise ConnectionResetError("the server closed the connection without an answer")
        return int(status_line.split()[1])
    finally:
        writer.close()


async def _act(client: openai.AsyncOpenAI, url: str, action: str, want: Expected, rng: random.Random,
               tally: Tally) -> None:
    """One request. Raises what `Tally.record` knows."""
    if action in ("whole", "chat"):
        tally.compare(want, text_of(await _create(client, want)(**want.body)))
    elif action in ("stream", "chat_stream"):
        tally.compare(want, await _read_stream(client, want, None))
    elif action == "leave_stream":
        await _read_stream(client, want, rng.randint(0, 8))
    elif action == "leave_whole":
        await _leave(client, want, rng.uniform(0.0, 0.5))
    elif action == "leave_in_body":
        await send_raw(url, _GOOD_JSON[:rng.randrange(len(_GOOD_JSON))], missing=9, leave_after_s=rng.uniform(0.0, 0.1))
    elif action == "malformed":
        await _send_malformed(client, want, rng.choice(_MALFORMED))
    elif action == "wrong_type":
        _check_refused(await send_raw(url, _GOOD_JSON, rng.choice(["text/plain", "application/xml"])), _GOOD_JSON, 415)
    else:
        body = rng.choice(_BROKEN_JSON)
        _check_refused(await send_raw(url, body), body)


async def _read_stream(client: openai.AsyncOpenAI, want: Expected, pieces: int | None) -> str:
    """The text of the stream, or, given a number, of its first pieces; then the connection is closed."""
    text = ""
    async with aclosing(await _create(client, want)(**want.body, stream=True)) as stream:
        if pieces == 0:
            return text
        async for chunk in stream:
            text += text_of(chunk)
            if pieces is not None and (pieces := pieces - 1) <= 0:
                break
    return text


async def _leave(client: openai.AsyncOpenAI, want: Expected, after_s: float) -> None:
    """Ask for the whole, and hang up if it has not come in time."""
    try:
        async with asyncio.timeout(after_s):
            await _create(client, want)(**want.body)
    except TimeoutError:
        return


async def _send_malformed(client: openai.AsyncOpenAI, want: Expected, bad: dict[str, Any]) -> None:
    try:
        await _create(client, want)(**want.body, extra_body=bad)
    except openai.BadRequestError:
        return
    raise UnexpectedAnswerError(f"{bad} was accepted")


def _check_refused(status: int, body: bytes, expected: int = 400) -> None:
    if status != expected:
        raise UnexpectedAnswerError(f"{body[:40]!r} was answered with status {status}")


def _create(client: Any, want: Expected) -> Any:
    """The method of either client that sends the request."""
    return client.chat.completions.create if want.is_chat else client.completions.create


def _rounds(actions: dict[str, int], rng: random.Random, deadline: float,
            on_round: Callable[[], None] = lambda: None) -> Iterator[str]:
    """All actions in some order, again and again; the first round is done whole, however late it is."""
    first = True
    while first or time.monotonic() < deadline:
        for action in rng.sample(list(actions), counts=list(actions.values()), k=sum(actions.values())):
            if not first and time.monotonic() >= deadline:
                return
            yield action
        first = False
        on_round()


def _options(url: str) -> dict[str, Any]:
    return {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "timeout": PATIENCE_S}
