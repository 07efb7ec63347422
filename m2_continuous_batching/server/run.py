"""The server as a process: its socket, its signals, and how it ends.

SIGTERM or SIGINT: no new connection is accepted and no new request is taken; open requests may go on for the grace
period; what is left is aborted, and its clients are told; the process ends with status 0. It ends whatever runs: a
thread that does not return is left behind, and where nothing moves at all a watchdog says so and ends the process.
"""
from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from m0_basics.config import reject

from .async_engine import AsyncLLMEngine
from .connections import bounded_protocol, raise_file_limit

_FAREWELL_S = 5.0           # after the grace period: for the last events to reach their clients
_WATCHDOG_S = 15.0          # after the grace period: the process ends now, whatever it does
_SWITCH_S = 0.0005          # how long a thread keeps the interpreter from others that want it
_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens at the address (port 0: any free one). Raises ConfigError where that is not possible.

    It listens at once: of two servers that are only bound to a port the second would find out after loading its model.
    Who connects before the server is ready waits.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        sock.close()
        raise reject("port", port, f"one that is free on host {host!r}, or 0 for any that is ({error})") from error
    return sock


class _Server(uvicorn.Server):
    """uvicorn, with an engine that starts before it and drains while it shuts down."""

    def __init__(self, app: FastAPI, engine: AsyncLLMEngine, grace_s: float, on_ready: Callable[[], None],
                 max_connections: int) -> None:
        super().__init__(uvicorn.Config(app, http=bounded_protocol(max_connections), log_level="warning",
                                        access_log=False, lifespan="off", backlog=_BACKLOG,
                                        timeout_graceful_shutdown=int(grace_s + _FAREWELL_S)))
        self.engine = engine
        self.grace_s = grace_s
        self.on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.start()
        await super().startup(sockets)
        self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # A thread in C, which needs nothing of Python: not even that the interpreter is free.
        faulthandler.dump_traceback_later(self.grace_s + _WATCHDOG_S, exit=True)
        draining = asyncio.create_task(self.engine.shutdown(self.grace_s))
        await super().shutdown(sockets)
        await draining


def serve(app: FastAPI, engine: AsyncLLMEngine, sock: socket.socket, grace_s: float,
          on_ready: Callable[[], None], max_connections: int = 1000) -> None:
    """Serve on `sock` until SIGTERM or SIGINT; `on_ready` is called once connections are accepted. For a process.

    Where a thread cannot be ended, this ends the process.
    """
    def ignore(*_: Any) -> None:
        """uvicorn repeats the signal at its very end, which would make it the process's exit status."""

    previous = {number: signal.signal(number, ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    # An operation of the model gives the interpreter away and waits to get it back: from a thread that computes in
    # Python for as long as this says, hundreds of times in a step.
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()                 # what is there stays: to look through it again and again would stop everybody
    try:
        _Server(app, engine, grace_s, on_ready, raise_file_limit(max_connections)).run([sock])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if engine.is_working:       # at its end Python waits for threads, and would wait for ever
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
    faulthandler.cancel_dump_traceback_later()
