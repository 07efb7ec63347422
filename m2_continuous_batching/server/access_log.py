"""One line in the log for each request, and an id by which client, log and answer can be put together."""
from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_response
from .output_stream import OutputStream

logger = logging.getLogger(__name__)
_REQUEST_ID = re.compile("[!-~]{1,128}")            # ASCII without spaces


class AccessLogMiddleware:
    """Takes `X-Request-Id` from the client or makes one, sends it back, and logs how the request went."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def logged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, logged)
        except asyncio.CancelledError:                  # the server ends, and its grace period is over
            if not status:
                await error_response(ApiError(503, "the server is shutting down"))(scope, receive, logged)
        finally:
            tokens = num_tokens(state.get("streams", ()))
            seconds = time.perf_counter() - begin
            path = scope["path"][:200].encode("unicode_escape").decode()    # a line is a line, whatever is in it
            logger.info("%s %s %s %s %.3f s %s", scope["method"], path, status or 499, tokens, seconds, request_id)


def num_tokens(streams: list[OutputStream]) -> str:
    """Tokens in and out, as far as it got."""
    prompt = sum(len(stream.request.prompt_token_ids) for stream in streams)
    output = sum(len(s.output_token_ids) for stream in streams for s in stream.request.sequences)
    return f"{prompt}+{output} tokens"


def remember_streams(request: Request, streams: list[OutputStream]) -> None:
    """Let the log know what a request runs."""
    request.state.streams = streams


def answer_id(request: Request, wanted: str | None) -> str:
    """The id that an answer carries: the client's own for it, or that of the request."""
    return wanted or str(request.state.request_id)
