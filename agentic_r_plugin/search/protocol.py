"""uvicorn's HTTP protocol, with limits on how long a request's head may take and on how large it may be.

uvicorn limits idle connections and nothing else: a client that sends half a head, or nothing at all, would hold its
connection for good, and a head without end the memory. What a body may take is limited by the application. Requests
are parsed by httptools, which takes a quarter off what a search that the cache answers costs the processor.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 65_536


class PatientProtocol(HttpToolsProtocol):
    """Closes a connection whose next request's head is not whole in time, or is too large."""

    header_timeout_s = 15.0

    @classmethod
    def within(cls, header_timeout_s: float) -> type[PatientProtocol]:
        """The protocol with another limit, in seconds."""
        return type("PatientProtocol", (cls,), {"header_timeout_s": header_timeout_s})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The clock starts with the connection."""
        super().connection_made(transport)
        self._limit: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Between two requests the clock starts with the first byte."""
        if self._limit is None and self._between_requests():
            self._expect_head()
        super().data_received(data)
        if not self._between_requests():
            self._head_bytes = 0
            if self._limit is not None:
                self._limit.cancel()
                self._limit = None
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("the request's head is too large")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        if self._limit is not None:
            self._limit.cancel()
        super().connection_lost(exc)

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        self._limit = self.loop.call_later(self.header_timeout_s, partial(self._give_up, self.cycle))

    def _give_up(self, cycle: Any) -> None:
        self._limit = None
        if self.cycle is cycle and not self.transport.is_closing():
            self.transport.close()
