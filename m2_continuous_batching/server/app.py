"""The routes: OpenAI's API over an `AsyncLLMEngine`, and vLLM's additions for tokens and monitoring."""
from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from m0_basics.config import ConfigError, check_int, option, reject
from m0_basics.sampling_params import is_utf8

from .async_engine import AsyncLLMEngine
from .chat import create_chat_completion
from .completions import create_completion
from .errors import ApiError, install_error_handlers
from .limits import LimitsMiddleware
from .metrics import PrometheusMetrics
from .parameters import as_messages
from .protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from .streaming import ClientDisconnectedError


@dataclass(frozen=True)
class ServerConfig:
    """What the server needs to know beside its engine."""

    served_model_name: str = option("model", "The name that clients use for the model.")
    api_key: str | None = option(None, "Clients have to send this key.")
    max_body_bytes: int = option(4 * 2 ** 20, "Largest body of a request.")

    def __post_init__(self) -> None:
        check_int("max_body_bytes", self.max_body_bytes, 1)
        if self.api_key is not None and not self.api_key:
            raise reject("api_key", self.api_key, "None, or text that is not empty")


def build_app(engine: AsyncLLMEngine, metrics: PrometheusMetrics, config: ServerConfig | None = None) -> FastAPI:
    """The application. `metrics` has to be one of the LLM's plugins; starting and stopping `engine` is the caller's."""
    config = config or ServerConfig()
    app = FastAPI(title="llm-inference-lab", version=version("llm-inference-lab"))
    app.add_middleware(LimitsMiddleware, api_key=config.api_key, max_body_bytes=config.max_body_bytes)
    install_error_handlers(app)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)                    # for the log: the client is not there to read it

    app.add_exception_handler(ClientDisconnectedError, gone)
    _add_generation(app, engine, config.served_model_name)
    _add_tokens(app, engine, config.served_model_name)
    _add_monitoring(app, engine, metrics)
    return app


def _check_model(wanted: str | None, served: str) -> None:
    if wanted is not None and wanted != served:
        raise ApiError(404, f"model={wanted!r} does not exist; allowed: {served!r}", "model", "model_not_found")


def _add_generation(app: FastAPI, engine: AsyncLLMEngine, name: str) -> None:
    created = int(time.time())

    def model_card() -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "llm-inference-lab", "root": name,
                "parent": None, "max_model_len": engine.llm.config.model_config.max_model_len}

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        _check_model(body.model, name)
        return await create_completion(engine, name, body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        _check_model(body.model, name)
        return await create_chat_completion(engine, name, body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        _check_model(model_id, name)
        return model_card()


def _add_tokens(app: FastAPI, engine: AsyncLLMEngine, name: str) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        _check_model(body.model, name)
        tokenizer = engine.llm.get_tokenizer()

        def work() -> tuple[list[int], list[str] | None]:
            text, add_special_tokens = body.prompt, body.add_special_tokens
            if body.messages is not None:
                text, add_special_tokens = tokenizer.apply_chat_template(as_messages(body.messages)), False
            assert text is not None
            if not is_utf8(text):
                raise ConfigError("the text holds half a character (a lone surrogate); allowed: what UTF-8 can write")
            ids = tokenizer.encode(text, add_special_tokens)
            return ids, [tokenizer.decode([i], False) for i in ids] if body.return_token_strs else None

        tokens, strings = await engine.run_on_inputs(work)
        return {"count": len(tokens), "max_model_len": engine.llm.config.model_config.max_model_len, "tokens": tokens,
                "token_strs": strings}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        _check_model(body.model, name)
        tokenizer, size = engine.llm.get_tokenizer(), engine.llm.spec.vocab_size
        if bad := [i for i in body.tokens if not 0 <= i < size]:
            raise reject("tokens", bad[0], f"0 to {size - 1}, the model's vocabulary")
        return {"prompt": await engine.run_on_inputs(lambda: tokenizer.decode(body.tokens, False))}


def _add_monitoring(app: FastAPI, engine: AsyncLLMEngine, metrics: PrometheusMetrics) -> None:
    async def health() -> Response:
        return Response() if engine.is_healthy else JSONResponse({"status": "the engine is not running"}, 503)

    app.get("/health")(health)
    app.get("/ping")(health)
    app.post("/ping")(health)

    @app.get("/version")
    async def get_version() -> dict[str, str]:
        return {"version": app.version}

    @app.get("/metrics")
    async def get_metrics() -> Response:
        content, content_type = metrics.render()
        return Response(content, media_type=content_type)


@asynccontextmanager
async def running(engine: AsyncLLMEngine, drain_s: float = 0.0) -> AsyncIterator[None]:
    """Start the engine; at the end shut it down."""
    engine.start()
    try:
        yield
    finally:
        await engine.shutdown(drain_s)
