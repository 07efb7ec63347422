"""The server as a process: its socket, its signals, and how it ends.

SIGTERM or SIGINT: no new connection is accepted and no new request is taken; open requests may go on for the grace
period; what is left is aborted, and its clients are told; the process ends with status 0.
"""
from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from m0_basics.config import reject

from .async_engine import AsyncLLMEngine

_FAREWELL_S = 5.0           # after the grace period: for the last events to reach their clients


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address (port 0: any free one). Raises ConfigError where that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        raise reject("port", port, f"one that is free on host {host!r}, or 0 for any that is ({error})") from error
    return sock


class _Server(uvicorn.Server):
    """uvicorn, with an engine that starts before it and drains while it shuts down."""

    def __init__(self, app: FastAPI, engine: AsyncLLMEngine, grace_s: float, on_ready: Callable[[], None]) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", lifespan="off",
                                        timeout_graceful_shutdown=int(grace_s + _FAREWELL_S)))
        self.engine = engine
        self.grace_s = grace_s
        self.on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.start()
        await super().startup(sockets)
        self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self.engine.shutdown(self.grace_s))
        await super().shutdown(sockets)
        await draining


def serve(app: FastAPI, engine: AsyncLLMEngine, sock: socket.socket, grace_s: float,
          on_ready: Callable[[], None]) -> None:
    """Serve on `sock` until SIGTERM or SIGINT; `on_ready` is called once connections are accepted."""
    def ignore(*_: Any) -> None:
        """uvicorn repeats the signal at its very end, which would make it the process's exit status."""

    previous = {number: signal.signal(number, ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _Server(app, engine, grace_s, on_ready).run([sock])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
