"""Errors as OpenAI's API reports them: a status code, and a JSON body that clients know how to read."""
from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m0_basics.config import ConfigError, short
from m0_basics.outputs import RequestOutput

from .async_engine import SHUTDOWN
from .protocol import UNSUPPORTED
from .unavailable import EngineUnavailableError

logger = logging.getLogger(__name__)
_TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
          405: "invalid_request_error", 408: "invalid_request_error", 413: "invalid_request_error",
          415: "invalid_request_error", 500: "server_error", 503: "server_error"}
_MAX_COMPLAINTS = 5         # about one body
_MAX_MESSAGE = 2000         # characters: what fits a screen
_RETRY_AFTER_S = "1"


class ApiError(HTTPException):
    """An answer other than 200. `param` names the field that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None) -> None:
        if status == 503:
            headers = {"Retry-After": _RETRY_AFTER_S} | dict(headers or {})
        super().__init__(status, message, headers)
        self.param = param
        self.code = code


class FailedRequestError(ApiError):
    """A request that the engine has ended before its time."""


def bad_request(error: ConfigError) -> ApiError:
    """The engine's complaint about a request. Its form is `field=value is not valid; allowed: ...`."""
    found = re.match(r"(\w+)(?:\.\w+| token id)?[= ]", str(error))
    return ApiError(400, str(error), found[1] if found and found[0].endswith("=") else None)


def check_served(output: RequestOutput) -> None:
    """Raise FailedRequestError where the engine has ended the request with an error, or has shut down."""
    for part in output.outputs:
        if part.finish_reason == "abort" and isinstance(part.stop_reason, str):
            if part.stop_reason == SHUTDOWN:
                raise FailedRequestError(503, "the server is shutting down")
            if part.stop_reason.startswith("error: "):
                raise FailedRequestError(500, f"the request failed: {part.stop_reason.removeprefix('error: ')}")


def as_api_error(error: Exception) -> ApiError:
    """Any exception of a request -> what the client is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ConfigError):
        return bad_request(error)
    if isinstance(error, EngineUnavailableError):
        return ApiError(503, str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "internal error")


def error_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's JSON form of an error."""
    kind = _TYPES.get(error.status_code, HTTPStatus(error.status_code).phrase.lower().replace(" ", "_"))
    # A value that is quoted in a message may hold what UTF-8 cannot write.
    message = str(error.detail)[:_MAX_MESSAGE].encode("utf-8", "backslashreplace").decode()
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error_body(error), error.status_code, headers=error.headers)


def install_error_handlers(app: FastAPI) -> None:
    """Let every error that is expected leave `app` in OpenAI's form."""

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(_validation_error(error.errors()))

    async def other(request: Request, error: Exception) -> JSONResponse:
        return error_response(as_api_error(error))

    app.add_exception_handler(RequestValidationError, invalid)
    for kind in (HTTPException, ConfigError, EngineUnavailableError):
        app.add_exception_handler(kind, other)


class InternalErrorMiddleware:
    """Answers an error that nobody expected, inside of what logs the answer and writes its headers.

    A handler of the framework for `Exception` would be called outside of that.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise                   # uvicorn logs it and cuts the connection: half an answer must not look whole
            await error_response(as_api_error(error))(scope, receive, send)


def _validation_error(errors: Sequence[Any]) -> ApiError:
    """What pydantic found -> one message; of a field that may be of several types, all the complaints."""
    complaints, fields = [], []
    for error in errors[:_MAX_COMPLAINTS]:
        # A field of a body is part of the place where the body is checked as a whole.
        path = [str(part) for part in (*error["loc"], error.get("ctx", {}).get("field")) if part not in ("body", None)]
        fields.append(path[0] if path else None)
        if error["type"] == UNSUPPORTED:
            complaints.append(f"{'.'.join(path)} {error['msg']}")
        else:
            value = short(error.get("input"))
            value = value if len(value) <= 80 else value[:77] + "..."
            complaints.append(f"{'.'.join(path) or 'the body'}={value} is not valid: {error['msg'][:300]}")
    if len(errors) > _MAX_COMPLAINTS:
        complaints.append(f"and {len(errors) - _MAX_COMPLAINTS} more")
    return ApiError(400, "; ".join(dict.fromkeys(complaints)), fields[0] if fields else None)
