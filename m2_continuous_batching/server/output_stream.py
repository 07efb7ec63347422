"""From the engine's thread to a coroutine: a mailbox that holds one output, the newest.

An output holds everything that its request has produced so far, so a newer one replaces what was not read yet. However
slow a consumer is, nothing piles up for it.
"""
from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from m0_basics.outputs import RequestOutput
from m0_basics.request import Request


class OutputStream:
    """What one request has produced: the newest state, to be awaited. One consumer."""

    def __init__(self, request: Request, abort: Callable[[str], None]) -> None:
        """To be made in the event loop of the consumer."""
        self.request = request
        self.finished = False               # whether `next` has returned the last output, or raised
        self._abort = abort
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._news: RequestOutput | Exception | None = None

    def put(self, news: RequestOutput | Exception) -> None:
        """From the engine thread: replace what was not taken yet. Raises RuntimeError where the loop has ended."""
        with self._lock:
            is_waking, self._news = self._news is not None, news
        if not is_waking:
            self._loop.call_soon_threadsafe(self._ready.set)

    async def next(self) -> RequestOutput:
        """Wait for a state that was not returned yet. Raises EngineUnavailableError if the engine ends first."""
        assert not self.finished
        await self._ready.wait()
        self._ready.clear()
        with self._lock:
            news, self._news = self._news, None
        assert news is not None
        self.finished = isinstance(news, Exception) or news.finished
        if isinstance(news, Exception):
            raise news
        return news

    def close(self) -> None:
        """Abort the request unless it has finished. Closing twice is harmless."""
        if not self.finished:
            self.finished = True
            self._abort(self.request.request_id)


async def merge(streams: Sequence[OutputStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """(index of the stream, output) of several streams, as the outputs come. Closes all of them at its end."""
    waiting = {asyncio.ensure_future(stream.next()): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = waiting.pop(task)
                yield i, task.result()
                if not streams[i].finished:
                    waiting[asyncio.ensure_future(streams[i].next())] = i
    finally:
        for task in waiting:
            task.cancel()
        for stream in streams:
            stream.close()
