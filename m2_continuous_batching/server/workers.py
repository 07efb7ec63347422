"""Threads for what takes long beside the engine: tokenising, compiling, writing large answers.

    short      one after the other, each some milliseconds
    long       texts and answers that take seconds: they wait for each other, and nobody else waits for them
    check      bad words, and constraints that are compiled already: nobody who compiles holds them up
    compile    constraints, one after the other: several at a time would wait for each other (`Grammars`)

What runs in them leaves the interpreter to others: the libraries release it, and Python is made to hand it over often
(see `run.serve`).
"""
from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from .unavailable import EngineStoppedError, QueueFullError

T = TypeVar("T")
LONG = 32_768               # characters, or what takes as long
_MAX_COMPILING = 32         # constraints at a time, waiting ones included


class Workers:
    """Runs work for coroutines. After `close` everything that waits, and all that comes, gets EngineStoppedError."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(1, "inputs")
        self._long = ThreadPoolExecutor(1, "long-inputs")
        self._check = ThreadPoolExecutor(1, "check")
        self._compile = ThreadPoolExecutor(1, "compile")
        self._num_compiling = 0
        self._awaited: dict[asyncio.Future[Any], Future[Any]] = {}

    @property
    def is_busy(self) -> bool:
        """Whether a thread works that nothing can stop."""
        return any(thread.is_alive() for pool in self._pools for thread in pool._threads)

    @property
    def _pools(self) -> tuple[ThreadPoolExecutor, ...]:
        return self._short, self._long, self._check, self._compile

    async def run(self, work: Callable[[], T], size: int = 0) -> T:
        """Run `work`. `size`: the characters that it is about, by which a thread is chosen."""
        return await self._run(self._long if size > LONG else self._short, work)

    async def check(self, work: Callable[[], T]) -> T:
        """Run `work`, which checks parameters and compiles no constraint."""
        return await self._run(self._check, work)

    async def compile(self, work: Callable[[], T], seconds: float) -> T:
        """Run `work`, which compiles a constraint. Raises QueueFullError where that takes longer than `seconds`.

        What has begun is not stopped then: the library counts its work, and will come to an end.
        """
        if self._num_compiling >= _MAX_COMPILING:
            raise QueueFullError(f"{self._num_compiling} constraints are being compiled; try again later")
        self._num_compiling += 1
        try:
            async with asyncio.timeout(seconds):
                return await self._run(self._compile, work)
        except TimeoutError as error:
            raise QueueFullError(f"the constraint was not compiled within {seconds:g} s; try again later") from error
        finally:
            self._num_compiling -= 1

    def close(self) -> None:
        """Start nothing more, and wait for nothing. From the event loop."""
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for future in list(self._awaited):
            if not future.done():
                future.set_exception(EngineStoppedError("the server is shutting down"))

    async def _run(self, pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            running = pool.submit(work)
        except RuntimeError as error:
            raise EngineStoppedError("the engine has shut down") from error
        # A future of its own, which `close` can end while the thread works on.
        future: asyncio.Future[T] = loop.create_future()
        self._awaited[future] = running
        running.add_done_callback(lambda done: _tell(loop, future, done))
        try:
            return await future
        finally:
            running.cancel()                # the client has gone, and it was not its turn yet
            del self._awaited[future]


def _tell(loop: asyncio.AbstractEventLoop, future: asyncio.Future[T], done: Future[T]) -> None:
    """From a worker's thread: hand over what came out."""
    def settle() -> None:
        if future.done() or done.cancelled():
            return
        if (error := done.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(done.result())

    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)
