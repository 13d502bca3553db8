"""Replaces the served index without dropping a request.

The new backend is opened in a thread, next to the old one, while requests continue; then one assignment on the event
loop swaps them. With several workers, the supervisor first asks all of them to open the new backend and lets them use
it only if all succeed, so either all workers switch or none.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from agentic_r_plugin.backends import SearchSpec, build_search
from agentic_r_plugin.errors import AgenticRError, SearchError
from agentic_r_plugin.search.base import SearchBackend
from agentic_r_plugin.search.service.search_service import SearchService

log = logging.getLogger(__name__)


def changed_spec(spec: SearchSpec, changes: Mapping[str, str]) -> SearchSpec:
    """The settings with another index; unless given, retriever and corpus are those named by the new index."""
    if not changes:
        return spec
    fields: dict[str, Any] = {"retriever": "", "corpus": ""} | dict(changes)
    return replace(spec, **fields)


class LocalReloader:
    """Reloads the only worker of a service."""

    def __init__(self, service: SearchService, spec: SearchSpec) -> None:
        self.service, self.spec, self._lock = service, spec, asyncio.Lock()

    async def reload(self, changes: Mapping[str, str]) -> str:
        """See `app.Reload`; without changes, the current settings are opened again.

        Raises:
            AgenticRError: the backend cannot be opened; the old one stays in use.
        """
        async with self._lock:
            # Opening takes long, so it runs in a thread; the lock keeps two reloads from overtaking each other.
            spec = changed_spec(self.spec, changes)
            backend = await asyncio.to_thread(build_search, spec)
            self.service.swap(backend)
            self.spec = spec
            log.warning("now serving index %s", self.service.fingerprint)
            return self.service.fingerprint


class WorkerReloader:
    """Reloads one of several workers, controlled by the supervisor through a pipe.

    | from the supervisor | answer |
    |---|---|
    | `("prepare", spec)` | `("prepared", error or None)` |
    | `("commit",)` | `("committed", fingerprint)` |
    | `("discard",)` | |
    | `("reloaded", fingerprint, error)` | none; it is the result of this worker's own `("reload", changes)` |
    """

    def __init__(
        self, service: SearchService, pipe: Connection, open_backend: Callable[[SearchSpec], SearchBackend]
    ) -> None:
        self.service, self.pipe, self._open = service, pipe, open_backend
        self._send_lock = threading.Lock()
        self._pending: SearchBackend | None = None
        self._asked: deque[asyncio.Future[str]] = deque()
        """Reloads requested by this worker; the supervisor answers them in order."""

    def listen(self, loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
        """Handle the messages of the supervisor in a thread, in order.

        Args:
            stop: called when the pipe closes or the thread fails, since a reload needs an answer from every worker.
        """
        self._loop = loop
        threading.Thread(target=self._listen, args=(stop,), name="reload", daemon=True).start()

    async def reload(self, changes: Mapping[str, str]) -> str:
        """See `app.Reload`; asks the supervisor to reload all workers."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._asked.append(future)
        self.send(("reload", dict(changes)))
        return await future

    def send(self, message: tuple[Any, ...]) -> None:
        """Send a message to the supervisor."""
        # The event loop (reload) and the listening thread both send on this pipe.
        with self._send_lock:
            self.pipe.send(message)

    def _listen(self, stop: Callable[[], None]) -> None:
        try:
            while True:
                kind, *content = self.pipe.recv()
                getattr(self, f"_on_{kind}")(*content)
        except (EOFError, OSError):
            pass  # the supervisor is gone: stop instead of serving without one
        finally:
            stop()

    def _on_prepare(self, spec: SearchSpec) -> None:
        # Hold at most one prepared backend.
        self._on_discard()
        try:
            self._pending = self._open(spec)
        except Exception as error:
            log.exception("cannot open what is to be served next")
            self.send(("prepared", str(error) if isinstance(error, AgenticRError) else repr(error)))
        else:
            self.send(("prepared", None))

    def _on_commit(self) -> None:
        backend, self._pending = self._pending, None
        assert backend is not None
        # This runs in the listening thread, but the service may only be changed on its event loop.
        self._loop.call_soon_threadsafe(self.service.swap, backend)
        self.send(("committed", backend.fingerprint()))

    def _on_discard(self) -> None:
        if self._pending is not None:
            self._pending.close()
            self._pending = None

    def _on_reloaded(self, fingerprint: str, error: str | None) -> None:
        self._loop.call_soon_threadsafe(self._tell, fingerprint, error)

    def _tell(self, fingerprint: str, error: str | None) -> None:
        future = self._asked.popleft() if self._asked else None  # none if the request came from a worker that died
        if future is not None and not future.done():
            future.set_result(fingerprint) if error is None else future.set_exception(SearchError(error))
