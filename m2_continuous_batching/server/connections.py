"""How many connections there are, and how long one may take to say what it wants.

A connection costs a file, of which a process has a limited number: those that say nothing must not use up the ones for
`/health`. So the one that has kept the server waiting for the longest, for a request or for the body that it has
announced, makes room for a new one.
"""
from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

_HEADER_S = 20.0            # from the connection, or the answer before, to the end of a request's headers
_OTHER_FILES = 64           # that a process has open beside its connections
_MANY_FILES = 65_536


def raise_file_limit(max_connections: int) -> int:
    """Let this process open as many files as it may. Returns how many of the connections that is enough for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return max_connections if soft == resource.RLIM_INFINITY else max(1, min(max_connections, soft - _OTHER_FILES))


def bounded_protocol(max_connections: int, header_s: float = _HEADER_S) -> type[H11Protocol]:
    """uvicorn's protocol with these limits."""

    class BoundedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _waits_for: object = None               # the request whose body is to come; None: any request
        _waits_since = 0.0

        @property
        def is_idle(self) -> bool:
            """Whether no request is being answered, or is complete as far as its headers."""
            return self.cycle is None or self.cycle.response_complete

        @property
        def is_awaited(self) -> bool:
            """Whether it is the client's turn: to send a request, or the rest of one."""
            return self.is_idle or self.cycle.more_body

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()
            others = [c for c in self.connections if c is not self and isinstance(c, BoundedProtocol) and c.is_awaited]
            if len(self.connections) > max_connections:
                min(others, key=lambda c: c._waits_since, default=self).give_up()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def give_up(self) -> None:
            """Close without a word: there is nothing that it would be an answer to."""
            self.connections.discard(self)
            self.transport.abort()

        def _watch(self) -> None:
            """While it is idle a timer runs: a byte now and then does not start it anew."""
            if not self.is_idle:
                self._stop_timer()
                if self._waits_for is not self.cycle:
                    self._waits_for, self._waits_since = self.cycle, self.loop.time()
            elif self._timer is None and not self.transport.is_closing():
                self._waits_for, self._waits_since = None, self.loop.time()
                self._timer = self.loop.call_later(header_s, self.give_up)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return BoundedProtocol
