"""Server-sent events, and what happens when the client goes away: the work for it is cancelled at once.

    data: {"id": ..., "choices": [...]}        one event for each piece
    data: [DONE]                               the last one
"""
from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import as_api_error, error_body
from .output_stream import OutputStream

T = TypeVar("T")


class ClientDisconnectedError(Exception):
    """Nobody waits for the answer any more."""


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; cancel it, and raise ClientDisconnectedError, when the client goes away first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnectedError
        return task.result()
    finally:
        for other in (task, watcher):
            other.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    """Return when the client has gone; the body has been read by now."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStreamResponse(Response):
    """Sends what `events` yields as server-sent events. An error on the way becomes the last event.

    Closes `streams`, from which the events are made, at its end: an event generator that was never started would not.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any], None], streams: Sequence[OutputStream]) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self.events = events
        self.streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await run_while_connected(receive, self._send_all(send))
        except ClientDisconnectedError:
            return
        finally:
            await self.events.aclose()
            for stream in self.streams:
                stream.close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for event in self.events:
                await self._send(send, json.dumps(event, ensure_ascii=False, separators=(",", ":")))
        except Exception as error:
            await self._send(send, json.dumps(error_body(as_api_error(error))))
        await self._send(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @staticmethod
    async def _send(send: Send, data: str) -> None:
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
