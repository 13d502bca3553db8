"""Worker processes of one retrieval service, and the supervisor that keeps them running.

All workers accept connections from one listening socket, which the supervisor holds open. A worker that dies loses only
its current requests; the others continue, and a new worker replaces it with the index that is served at that time.

`uvicorn.supervisors.Multiprocess` is not used. Its reload replaces one worker after another, so two indexes answer at
the same time, and stay so if a later worker cannot open the new one. A stopped worker closes idle connections, on which
a request may just arrive. It does not report the outcome of a reload, and restarts dying workers without end.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import signal
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from agentic_r_plugin.backends import SearchSpec, build_search
from agentic_r_plugin.errors import ConfigError, SearchUnavailableError
from agentic_r_plugin.search.base import SearchBackend
from agentic_r_plugin.search.service.metrics import Metrics
from agentic_r_plugin.search.service.reload import WorkerReloader, changed_spec

log = logging.getLogger(__name__)

_MAX_DEATHS, _DEATHS_WITHIN_S = 10, 60.0
"""The service gives up if its workers die more often than this."""


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    fingerprint: str | None = None
    """None until the worker is ready."""


class Supervisor:
    """Starts, watches, reloads and stops the workers of a service.

    Args:
        stop_s: seconds that a worker may take to finish its requests when the service stops.
    """

    def __init__(self, spec: SearchSpec, count: int, listener: socket.socket, settings: Any, *, stop_s: float) -> None:
        self.spec, self.count, self.listener, self.settings, self.stop_s = spec, count, listener, settings, stop_s
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, _Worker] = {}
        self._deaths: deque[float] = deque()
        self._stopping = self._hangup = self._answering = False
        self._reload: _Reload | None = None
        self._wanted: deque[tuple[int | None, dict[str, str]]] = deque()

    def run(self, ready: Callable[[str], contextlib.AbstractContextManager[None]]) -> None:
        """Run until SIGTERM or SIGINT; SIGHUP opens the current settings again.

        Args:
            ready: entered with the index' fingerprint once every worker is ready.

        Raises:
            ConfigError: the backend cannot be opened.
            SearchUnavailableError: workers die repeatedly.
        """
        # Handlers only set flags, which the loop reads between two steps.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "_stopping", True))
        signal.signal(signal.SIGHUP, lambda *_: setattr(self, "_hangup", True))
        with tempfile.TemporaryDirectory(prefix="agentic-r-metrics-") as folder:
            self._metrics = Path(folder) / "metrics"
            Metrics.create(self._metrics, self.count)
            try:
                for slot in range(self.count):
                    self._start(slot)
                while not self._stopping and any(w.fingerprint is None for w in self._workers.values()):
                    self._step()
                self._answering = True
                if not self._stopping:
                    with ready(str(self._workers[0].fingerprint)):
                        while not self._stopping:
                            self._step()
            finally:
                self._end()

    def _start(self, slot: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work,
            args=(slot, self.count, self.listener, self.spec, self.settings, self._metrics, theirs),
            name=f"retrieval-{slot}",
        )
        process.start()
        # Only the worker then holds this end, so its death ends the pipe here (EOFError).
        theirs.close()
        self._workers[slot] = _Worker(process, ours)

    def _step(self) -> None:
        """Wait briefly for messages and deaths of workers, and handle them."""
        pipes = {worker.pipe: slot for slot, worker in self._workers.items()}
        ends = {worker.process.sentinel: slot for slot, worker in self._workers.items()}
        for found in multiprocessing.connection.wait([*pipes, *ends], timeout=0.2):
            if found in pipes:
                with contextlib.suppress(EOFError, OSError):
                    self._hear(pipes[found], found.recv())  # type: ignore[index,union-attr]
        # Messages come first: a worker that failed to start sends the reason before it ends.
        for slot in ends.values():
            if not self._workers[slot].process.is_alive():
                self._replace(slot)
        if self._hangup:
            self._hangup = False
            self._wanted.append((None, {}))
        # A reload needs an answer from every worker, so it waits until all of them are up.
        if self._reload is None and self._wanted and all(w.fingerprint for w in self._workers.values()):
            self._begin_reload(*self._wanted.popleft())

    def _hear(self, slot: int, message: tuple[Any, ...]) -> None:
        kind, *content = message
        if kind == "ready":
            self._workers[slot].fingerprint = content[0]
        elif kind == "failed" and not self._answering:
            # At the start a failure is a wrong setting; later the old workers still serve, so it is only logged.
            raise ConfigError(content[0])
        elif kind == "failed":
            log.error("a new worker cannot open what is served: %s", content[0])
        elif kind == "reload":
            self._wanted.append((slot, content[0]))
        elif kind == "prepared" and self._reload is not None:
            self._reload.answers[slot] = content[0]
            self._finish_reload()
        elif kind == "committed":
            self._workers[slot].fingerprint = content[0]

    def _replace(self, slot: int) -> None:
        worker = self._workers[slot]
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths and now - self._deaths[0] > _DEATHS_WITHIN_S:
            self._deaths.popleft()
        if len(self._deaths) > _MAX_DEATHS:
            raise SearchUnavailableError(
                f"retrieval workers ended {len(self._deaths)} times in {_DEATHS_WITHIN_S:g} s, "
                f"the last with code {worker.process.exitcode}; giving up"
            )
        log.warning("worker %d ended with code %s; starting another", slot, worker.process.exitcode)
        worker.pipe.close()
        self._start(slot)
        # The new worker opens the old index, so a reload in progress cannot succeed on all workers.
        if self._reload is not None:
            self._reload.answers[slot] = f"worker {slot} ended meanwhile"
            self._finish_reload()

    def _begin_reload(self, asked_by: int | None, changes: dict[str, str]) -> None:
        self._reload = _Reload(asked_by, changed_spec(self.spec, changes), {})
        for worker in self._workers.values():
            _tell(worker, ("prepare", self._reload.spec))

    def _finish_reload(self) -> None:
        """Once all workers have answered, let all of them switch, or none."""
        reload = self._reload
        assert reload is not None
        if len(reload.answers) < self.count:
            return
        error = next((answer for answer in reload.answers.values() if answer is not None), None)
        if error is None:
            # Set before the commit: workers started from now on open the new index.
            self.spec = reload.spec
        else:
            log.error("reload failed: %s", error)
        for worker in self._workers.values():
            _tell(worker, ("commit",) if error is None else ("discard",))
        if reload.asked_by is not None:
            fingerprint = self._await_commit(reload.asked_by) if error is None else ""
            _tell(self._workers[reload.asked_by], ("reloaded", fingerprint, error))
        self._reload = None

    def _await_commit(self, slot: int) -> str:
        """The new fingerprint, once every live worker uses it."""
        # The caller may search at once, and any worker may answer: reply only when none serves the old index.
        waiting = {number for number, worker in self._workers.items() if worker.fingerprint}
        deadline = time.monotonic() + 10
        while waiting and time.monotonic() < deadline:
            for number in list(waiting):
                worker = self._workers[number]
                try:
                    if worker.pipe.poll(0.05):
                        message = worker.pipe.recv()
                        self._hear(number, message)
                        waiting -= {number} if message[0] == "committed" else set()
                except (EOFError, OSError):
                    waiting.discard(number)
        return str(self._workers[slot].fingerprint)

    def _end(self) -> None:
        for worker in self._workers.values():
            if worker.process.is_alive():
                worker.process.terminate()
        # One deadline for all workers, which stop at the same time.
        deadline = time.monotonic() + self.stop_s
        for worker in self._workers.values():
            worker.process.join(max(0.1, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()


@dataclass
class _Reload:
    """A reload in progress."""

    asked_by: int | None
    spec: SearchSpec
    answers: dict[int, str | None]
    """Error of each worker that has answered; None if it could open the index."""


def _tell(worker: _Worker, message: tuple[Any, ...]) -> None:
    with contextlib.suppress(OSError):  # a worker that has just died is replaced in the next step
        worker.pipe.send(message)


def _work(
    slot: int, count: int, listener: socket.socket, spec: SearchSpec, settings: Any, metrics: Path, pipe: Connection
) -> None:
    """Main function of a worker process: open the backend, report it, serve until asked to stop."""
    from agentic_r_plugin.search.service.server import serve_here, share_of_machine

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the supervisor stops its workers
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def open_share(wanted: SearchSpec) -> SearchBackend:
        return build_search(share_of_machine(wanted, slot, count))

    try:
        backend = open_share(spec)
    except Exception as error:
        pipe.send(("failed", str(error)))
        return
    fingerprint = backend.fingerprint()

    pipe.send(("ready", fingerprint))
    serve_here(
        settings,
        listener,
        backend,
        lambda service: WorkerReloader(service, pipe, open_share),
        Metrics(metrics, slot, count),
    )
