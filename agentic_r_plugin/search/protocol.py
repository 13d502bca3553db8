"""uvicorn's HTTP protocol, with a limit on how long a client may take over a request's head.

uvicorn limits idle connections and nothing else: a client that sends half a head, or nothing at all, would hold its
connection for good. What a body may take is limited by the application.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class PatientProtocol(H11Protocol):
    """Closes a connection whose next request's head is not whole in time."""

    header_timeout_s = 15.0

    @classmethod
    def within(cls, header_timeout_s: float) -> type[PatientProtocol]:
        """The protocol with another limit, in seconds."""
        return type("PatientProtocol", (cls,), {"header_timeout_s": header_timeout_s})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The clock starts with the connection."""
        super().connection_made(transport)
        self._limit: asyncio.TimerHandle | None = None
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Between two requests the clock starts with the first byte."""
        if self._limit is None and self._between_requests():
            self._expect_head()
        super().data_received(data)
        if self._limit is not None and not self._between_requests():
            self._limit.cancel()
            self._limit = None

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
