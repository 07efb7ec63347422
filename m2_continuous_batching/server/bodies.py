"""The body of a request, counted before it is parsed, and again before it is validated.

    bytes  --count brackets-->  JSON  --count entries-->  pydantic  -->  the handler

All of it runs in the event loop, where everybody waits for it. So what is done with four megabytes has to be little:
they may hold a million empty lists, which Python needs a second for, or half a million mistakes.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from .config import ServerConfig
from .errors import ApiError

_MAX_NODES = 50_000         # lists, objects and members of objects in one body
_MAX_TEXTS = 250_000        # texts of a body whose brackets have to be told from those in texts
_TEXTS = ("stop", "bad_words")
_CHARS = "characters (an entry of a list counts as one more)"
_LISTS = (*_TEXTS, "stop_token_ids", "allowed_token_ids", "logit_bias")


def bounded_route(config: ServerConfig, max_prompts: int | None) -> type[APIRoute]:
    """A route class whose bodies keep to the limits. `max_prompts`: how many one request may have."""

    class BoundedRequest(Request):
        """A request whose body is JSON and bounded."""

        async def json(self) -> Any:
            if not hasattr(self, "_json"):
                self._json = parse_json(await self.body())
                check_counts(self._json, config, max_prompts)
            return self._json

    class BoundedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                if self.body_field is not None:
                    check_content_type(request.headers.get("content-type"))
                return await handler(BoundedRequest(request.scope, request.receive))

            return handle

    return BoundedRoute


def check_content_type(value: str | None) -> None:
    """Raise ApiError 415 where the body does not say that it is JSON."""
    kind = (value or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        given = f"Content-Type {kind[:80]!r}" if kind else "a body without Content-Type"
        raise ApiError(415, f"{given} is not supported; allowed: Content-Type: application/json")


def parse_json(body: bytes) -> Any:
    """Raises ApiError for what is no JSON, or has more structure than a request needs."""
    if count_nodes(body) > _MAX_NODES:
        _check_nodes(body)
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise ApiError(400, "the body is not JSON: it is not valid UTF-8") from error
    except (RecursionError, ValueError) as error:
        raise ApiError(400, f"the body is not JSON that can be read: {error}") from error


def _check_nodes(body: bytes) -> None:
    """Count what is outside of texts. A split at the quotes takes half the time of a regular expression."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")        # the quotes that are left begin or end a text
    if plain.count(b'"') > 2 * _MAX_TEXTS:
        raise ApiError(400, f"the body holds more texts than the {_MAX_TEXTS} that are allowed in one with many "
                            "brackets or colons")
    if count_nodes(b"".join(plain.split(b'"')[::2])) > _MAX_NODES:
        raise ApiError(400, f"the body holds more lists, objects and fields than the {_MAX_NODES} that are allowed")


def count_nodes(body: bytes) -> int:
    """Lists, objects and their members: those in strings are counted as well."""
    return body.count(b"[") + body.count(b"{") + body.count(b":")


def check_counts(body: Any, config: ServerConfig, max_prompts: int | None) -> None:
    """Raise ApiError for a list with more entries than allowed. Types are not looked at: pydantic will."""
    if not isinstance(body, dict):
        return

    def check(name: str, count: int, allowed: int, what: str = "entries") -> None:
        if count > allowed:
            raise ApiError(400, f"{name} has {count} {what}; allowed: at most {allowed}", name)

    for name in _LISTS:
        value = body.get(name)
        if isinstance(value, list | dict):
            check(name, len(value), config.max_list_items)
        if name in _TEXTS:
            check(name, _num_chars(value, config.max_list_chars), config.max_list_chars, _CHARS)
    prompt, messages = body.get("prompt"), body.get("messages")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) and max_prompts is not None:
        check("prompt", len(prompt), max_prompts, "prompts")
    if isinstance(messages, list):
        check("messages", len(messages), config.max_messages)
        contents = [m.get("content") for m in messages if isinstance(m, dict)]
        check("messages", sum(len(c) for c in contents if isinstance(c, list)), config.max_messages, "parts")
    for name, value in _constraints(body):
        check(name, _num_chars(value, config.max_grammar_chars), config.max_grammar_chars, _CHARS)


def _constraints(body: dict[str, Any]) -> list[tuple[str, Any]]:
    """(top field, what it holds) for each way to constrain the output."""
    found = [(name, body.get(name)) for name in ("guided_json", "guided_regex", "guided_choice")]
    for name in ("structured_outputs", "response_format"):
        value = body.get(name)
        found += [(name, part) for part in value.values()] if isinstance(value, dict) else []
    return found


def _num_chars(value: Any, most: int) -> int:
    """Characters of a text, of a list of them, or of an object written as JSON; above `most` perhaps too few.

    An entry of a list counts as one more: a million empty ones are much to work on.
    """
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return len(value) + sum(len(entry) for entry in value[:most + 1] if isinstance(entry, str))
    try:
        return len(json.dumps(value)) if isinstance(value, dict) else 0
    except RecursionError:
        return 0                        # too deep, which is what its check will say
