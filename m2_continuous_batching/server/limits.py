"""Who may send what: the API key, and the size of a request's body. Checked before anything of the body is used."""
from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics"})        # monitoring carries no key


class LimitsMiddleware:
    """Plain ASGI, so that a client that goes away is noticed further in."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int) -> None:
        self.app = app
        self.api_key = api_key
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if (refusal := self._refusal(scope["path"], headers)) is not None:
            await error_response(refusal)(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:          # a body that came in chunks, without its length
                raise self._too_large()
            return message

        await self.app(scope, limited, send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self.api_key is not None and path not in OPEN_PATHS:
            given = headers.get("authorization", "")
            # As bytes and in constant time: how long a comparison takes must not tell how much of a key is right.
            if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self.api_key}".encode()):
                return ApiError(401, "the API key is missing or wrong; send it as: Authorization: Bearer KEY",
                                code="invalid_api_key")
        length = headers.get("content-length", "0")
        return self._too_large() if length.isdecimal() and int(length) > self.max_body_bytes else None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is too large; allowed: {self.max_body_bytes} bytes")
