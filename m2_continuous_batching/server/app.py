"""The routes: OpenAI's API over an `AsyncLLMEngine`, and vLLM's additions for tokens and monitoring."""
from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware

from m0_basics.config import ConfigError, reject, short
from m0_basics.sampling_params import is_utf8

from .access_log import AccessLogMiddleware
from .admission import num_chars, num_chars_within
from .answers import to_json
from .async_engine import AsyncLLMEngine
from .bodies import bounded_route
from .chat import create_chat_completion
from .completions import create_completion
from .config import ServerConfig
from .errors import ApiError, InternalErrorMiddleware, install_error_handlers
from .limits import LimitsMiddleware
from .metrics import PrometheusMetrics
from .parameters import as_messages, template_options
from .protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from .streaming import ClientDisconnectedError
from .workers import LONG


def build_app(engine: AsyncLLMEngine, metrics: PrometheusMetrics, config: ServerConfig | None = None) -> FastAPI:
    """The application. `metrics` has to be one of the LLM's plugins; starting and stopping `engine` is the caller's."""
    config = config or ServerConfig()
    app = FastAPI(title="llm-inference-lab", version=version("llm-inference-lab"))
    # The last one is the first that a request meets.
    app.add_middleware(LimitsMiddleware, config=config)
    app.add_middleware(InternalErrorMiddleware)
    app.add_middleware(CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=config.allowed_methods,
                       allow_headers=config.allowed_headers, allow_credentials=config.allow_credentials,
                       expose_headers=["x-request-id"])
    app.add_middleware(AccessLogMiddleware)
    install_error_handlers(app)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)                    # for the log: the client is not there to read it

    app.add_exception_handler(ClientDisconnectedError, gone)
    router = APIRouter(route_class=bounded_route(config, engine.max_prompts))
    _add_generation(router, engine, config)
    _add_tokens(router, engine, config.served_model_name)
    app.include_router(router)
    _add_monitoring(app, engine, metrics, config.max_step_s)
    return app


def _check_model(wanted: str | None, served: str) -> None:
    if wanted is not None and wanted != served:
        raise ApiError(404, f"model={short(wanted)} does not exist; allowed: {served!r}", "model", "model_not_found")


def _add_generation(app: APIRouter, engine: AsyncLLMEngine, config: ServerConfig) -> None:
    created, name = int(time.time()), config.served_model_name

    def model_card() -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "llm-inference-lab", "root": name,
                "parent": None, "max_model_len": engine.llm.config.model_config.max_model_len}

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        _check_model(body.model, name)
        return await create_completion(engine, config, body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        _check_model(body.model, name)
        return await create_chat_completion(engine, config, body, request)

    @app.get("/v1/models/", include_in_schema=False)
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        _check_model(model_id, name)
        return model_card()


def _add_tokens(app: APIRouter, engine: AsyncLLMEngine, name: str) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Response:
        _check_model(body.model, name)
        messages = None if body.messages is None else as_messages(body.messages)
        size = num_chars(messages or body.prompt) + num_chars_within(body.chat_template_kwargs, LONG)

        def work() -> bytes:
            text, special = body.prompt, body.add_special_tokens
            if messages is not None:
                text = tokenizer.apply_chat_template(messages, **template_options(body))
            assert text is not None
            if not is_utf8(text):
                raise ConfigError("the text holds half a character (a lone surrogate); allowed: what UTF-8 can write")
            ids = tokenizer.encode(text, messages is None if special is None else special)
            names = {i: tokenizer.decode([i], False) for i in set(ids)} if body.return_token_strs else None
            strings = "null" if names is None else _json_list([names[i] for i in ids])
            length = engine.llm.config.model_config.max_model_len
            return (f'{{"count":{len(ids)},"max_model_len":{length},"tokens":{_json_list(ids)},'
                    f'"token_strs":{strings}}}').encode()

        tokenizer = engine.llm.get_tokenizer()
        return Response(await engine.workers.run(work, size), media_type="application/json")

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> Response:
        _check_model(body.model, name)
        tokenizer, size = engine.llm.get_tokenizer(), engine.llm.spec.vocab_size

        def work() -> bytes:
            if (bad := next((i for i in body.tokens if not 0 <= i < size), None)) is not None:
                raise reject("tokens", bad, f"0 to {size - 1}, the model's vocabulary")
            return to_json({"prompt": tokenizer.decode(body.tokens, False)}).encode()

        return Response(await engine.workers.run(work, len(body.tokens)), media_type="application/json")


def _json_list(values: list[Any]) -> str:
    """As JSON, made in parts: the interpreter is held for one of them, and not for a million values."""
    parts = (to_json(values[i:i + 10_000])[1:-1] for i in range(0, len(values), 10_000))
    return f"[{','.join(parts)}]"


def _add_monitoring(app: FastAPI, engine: AsyncLLMEngine, metrics: PrometheusMetrics, max_step_s: float) -> None:
    async def health() -> Response:
        if not engine.is_healthy:
            return JSONResponse({"status": "the engine is not running"}, 503)
        if (age := engine.step_age) > max_step_s:
            return JSONResponse({"status": f"a step runs for {age:.1f} s; allowed: {max_step_s:g} s"}, 503)
        return Response()

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
