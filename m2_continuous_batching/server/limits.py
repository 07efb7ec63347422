"""Who may send what: the API key, and the size of a request's body. Checked before anything of the body is used."""
from __future__ import annotations

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import ServerConfig
from .errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics"})        # monitoring carries no key
_BODY_S = 60.0              # a body that takes longer to come than this is given up


class LimitsMiddleware:
    """Plain ASGI, so that a client that goes away is noticed further in."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app = app
        self.api_key = config.api_key
        self.max_body_bytes = config.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (refusal := self._refusal(scope, Headers(scope=scope))) is not None:
            await error_response(refusal)(scope, receive, send)
            return
        received, complete = 0, False
        deadline = asyncio.get_running_loop().time() + _BODY_S

        async def limited() -> Message:
            nonlocal received, complete
            if complete:                    # what comes now is that the client goes away
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(408, f"the body did not come within {_BODY_S:.0f} s") from error
            complete = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > self.max_body_bytes:          # a body that came in chunks, without its length
                raise self._too_large()
            return message

        await self.app(scope, limited, send)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        if self.api_key is not None and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # As bytes and in constant time: how long a comparison takes must not tell how much of a key is right.
            right = hmac.compare_digest(given.strip().encode("latin-1"), self.api_key.encode())
            if scheme.lower() != "bearer" or not right:
                return ApiError(401, "the API key is missing or wrong; send it as: Authorization: Bearer KEY",
                                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        return self._too_large() if length.isdecimal() and int(length[:20]) > self.max_body_bytes else None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is too large; allowed: {self.max_body_bytes} bytes")
