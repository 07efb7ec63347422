"""A server inside the test's process: a real uvicorn on a free port, in a thread, over any milestone's engine."""
from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import openai
import uvicorn

from m0_basics.base_llm import BaseLLM
from m2_continuous_batching.engine import engine_of
from m2_continuous_batching.server.app import build_app
from m2_continuous_batching.server.async_engine import AsyncLLMEngine
from m2_continuous_batching.server.config import ServerConfig
from m2_continuous_batching.server.connections import bounded_protocol
from m2_continuous_batching.server.metrics import PrometheusMetrics
from m2_continuous_batching.server.run import bind

MODEL = "tiny"
PROTOCOL_LIMITS = (1000, 20.0)      # connections, and seconds for the headers of a request


class RunningServer:
    """`with RunningServer(make_llm) as server:` where `make_llm` takes the plugins."""

    def __init__(self, make_llm: Callable[..., BaseLLM], max_queued_requests: int | None = None,
                 **config: Any) -> None:
        metrics = PrometheusMetrics(MODEL)
        self.llm = make_llm(plugins=[metrics])
        metrics.show_counters_of(engine_of(self.llm).plugins)
        self.engine = AsyncLLMEngine(self.llm, max_queued_requests)
        self.app = build_app(self.engine, metrics, ServerConfig(MODEL, **config))
        self._sock = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        self._uvicorn = uvicorn.Server(uvicorn.Config(
            self.app, http=bounded_protocol(*PROTOCOL_LIMITS), log_level="warning", lifespan="off",
            timeout_graceful_shutdown=5))
        self._thread = threading.Thread(target=self._uvicorn.run, args=([self._sock],), daemon=True)

    def __enter__(self) -> Self:
        self.engine.start()
        self._thread.start()
        wait_until(lambda: self._uvicorn.started)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._uvicorn.should_exit = True
        self._thread.join()
        asyncio.run(self.engine.shutdown())

    @property
    def connections(self) -> set[Any]:
        """Those that are open."""
        return self._uvicorn.server_state.connections

    def client(self, **options: Any) -> openai.OpenAI:
        """The official client."""
        return openai.OpenAI(**self._client_options(options))

    def async_client(self, **options: Any) -> openai.AsyncOpenAI:
        """The official client for coroutines; to be made inside the event loop."""
        return openai.AsyncOpenAI(**self._client_options(options))

    def _client_options(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options

    def send(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """(status, JSON) of a GET, or of a POST of `body`: bytes as they are, anything else as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"} | (headers or {}))
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, _parse(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _parse(error.read())

    def is_empty(self) -> bool:
        """Whether the engine holds nothing at all."""
        scheduler = engine_of(self.llm).scheduler
        return (not self.engine.num_open_requests and not scheduler.queues.has_unfinished_requests()
                and scheduler.kv_cache_manager.usage == 0 and not scheduler.running and not scheduler.waiting)


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode()


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for what another thread is about to do. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.005)
