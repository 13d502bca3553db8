"""`agentic-r serve`: the retrieval service, and how a parent process starts it as a child process.

SIGTERM and SIGINT stop it after the current requests are answered. SIGHUP opens its index again (it may have been
replaced, or its link may have changed) and switches to it without dropping a request.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentic_r_plugin.backends import SearchSource, SearchSpec, build_search, resolved
from agentic_r_plugin.child import die_with, end
from agentic_r_plugin.compute import threads_of_each
from agentic_r_plugin.config import FREE, save_config, setting, to_dict
from agentic_r_plugin.credentials import read_secret, refuse_secrets
from agentic_r_plugin.errors import AgenticRError, ConfigError, SearchUnavailableError
from agentic_r_plugin.net import is_loopback
from agentic_r_plugin.search.wire import MAX_PASSAGES
from agentic_r_plugin.store import read_json, write_json

if TYPE_CHECKING:
    import uvicorn

    from agentic_r_plugin.search.base import SearchBackend
    from agentic_r_plugin.search.service.app import Reload
    from agentic_r_plugin.search.service.metrics import Metrics
    from agentic_r_plugin.search.service.reload import LocalReloader, WorkerReloader
    from agentic_r_plugin.search.service.search_service import SearchService

log = logging.getLogger(__name__)

_STOP_S = 5
"""Seconds that current requests may take after the service is asked to stop."""
_STARTUP_S = 1800.0
"""Seconds that a child process may take to load an index; one that ends is noticed at once."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig(SearchSource):
    """Settings of `agentic-r serve`."""

    host: str = setting("address, 0.0.0.0: all; one that is not loopback needs token_env", FREE, default="127.0.0.1")
    port: int = setting("0: a free one", FREE, default=8000)
    token_env: str = setting("environment variable that holds the token clients must send", FREE, default="")
    workers: int = setting("processes, each with a retriever; one that dies is replaced", FREE, default=1)
    allow_reload: bool = setting("accept POST /reload from all search clients", FREE, default=False)
    ready_file: str = setting("gets JSON {url, pid, fingerprint} when the service answers", FREE, default="")
    exit_with_parent: bool = setting("end when the process that started it ends", FREE, default=False)
    default_topk: int = setting("passages for requests without topk", FREE, default=3)
    max_queries: int = setting("queries of one request", FREE, default=4096)
    max_passages: int = setting("queries times topk of one request", FREE, default=MAX_PASSAGES)
    max_body_bytes: int = setting("bytes of one request", FREE, default=16_000_000)
    max_waiting: int = setting("queries waiting before new ones are refused (503)", FREE, default=8192)
    timeout_s: float = setting("for one request", FREE, default=60.0)
    header_timeout_s: float = setting("for a client to send a request's head", FREE, default=15.0)
    window_ms: float = setting("time that a batch waits for further queries", FREE, default=4.0)
    cache_size: int = setting("results kept, 32 passages each on average; 0: none", FREE, default=10_000)

    def __post_init__(self) -> None:
        way_out = "give the name of an environment variable that holds it"
        refuse_secrets("serve", {"token_env": self.token_env, "options": self.options}, way_out)
        positive = ("default_topk", "max_queries", "max_passages", "max_body_bytes")
        for name in (*positive, "max_waiting", "timeout_s", "header_timeout_s", "batch_size", "workers"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, found {getattr(self, name)}")
        for name in ("window_ms", "cache_size"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be below 0, found {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port}: expected 0 to 65535")
        if not self.token_env and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host!r} can be reached from outside; set token_env, or serve on 127.0.0.1 only"
            )


def run(config: ServeConfig, *, resume: bool = False) -> None:
    """Serve until interrupted or terminated; current requests are finished. `resume` has no effect.

    Raises:
        ConfigError, IndexMismatchError, RecordError: the backend cannot be opened, or the port is in use.
        SearchUnavailableError: workers die repeatedly.
    """
    from agentic_r_plugin.search.service.metrics import Metrics
    from agentic_r_plugin.search.service.reload import LocalReloader
    from agentic_r_plugin.search.service.workers import Supervisor

    read_secret(config.token_env, "token_env")
    spec = SearchSpec(**{item.name: getattr(config, item.name) for item in fields(SearchSource)})
    # Bound first: a port in use is found before an index is loaded.
    with _bound_socket(config) as listener:

        def ready(fingerprint: str) -> contextlib.AbstractContextManager[None]:
            address = {"url": _url(config.host, listener), "pid": os.getpid(), "fingerprint": fingerprint}
            return _announced(address, config.ready_file)

        if config.exit_with_parent:
            die_with(os.getppid(), politely=True, family=True)
        if config.workers > 1:
            listener.listen(1024)
            # The supervisor waits longer than the workers give their requests.
            Supervisor(spec, config.workers, listener, config, stop_s=_STOP_S + 2).run(ready)
            return
        backend = build_search(spec)
        listener.listen(1024)
        with ready(backend.fingerprint()):
            serve_here(config, listener, backend, lambda service: LocalReloader(service, spec), Metrics())


def serve_here(
    config: ServeConfig,
    listener: socket.socket,
    backend: SearchBackend,
    reloader_of: Callable[[SearchService], LocalReloader | WorkerReloader],
    metrics: Metrics,
) -> None:
    """Serve from this process until asked to stop; closes the current backend at the end."""
    import asyncio

    from agentic_r_plugin.search.service.reload import WorkerReloader
    from agentic_r_plugin.search.service.search_service import SearchService

    service = SearchService(
        backend,
        max_batch=config.batch_size,
        window_ms=config.window_ms,
        cache_size=config.cache_size,
        max_waiting=config.max_waiting,
        metrics=metrics,
    )
    reloader = reloader_of(service)
    server = _http_server(config, service, reloader.reload if config.allow_reload else None)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        if isinstance(reloader, WorkerReloader):
            reloader.listen(loop, lambda: os.kill(os.getpid(), signal.SIGTERM))
        elif threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGHUP, lambda: tasks.add(loop.create_task(_reload_again(reloader))))
        await server.serve(sockets=[listener])

    # The event loop holds only weak references to tasks; this set keeps reloads alive.
    tasks: set[asyncio.Task[None]] = set()
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal again after it has shut down; by then there is nothing left to stop
        signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        asyncio.run(serve())
    finally:
        service.backend.close()


def _http_server(config: ServeConfig, service: SearchService, reload: Reload | None) -> uvicorn.Server:
    import uvicorn

    from agentic_r_plugin.search.service.app import build_app
    from agentic_r_plugin.search.service.bodies import RequestLimits
    from agentic_r_plugin.search.service.request_heads import PatientProtocol

    own = {item.name for item in fields(RequestLimits)} & {item.name for item in fields(config)}
    limits = RequestLimits(**{name: getattr(config, name) for name in own})
    return uvicorn.Server(
        uvicorn.Config(
            build_app(service, limits, token=read_secret(config.token_env, "token_env"), reload=reload),
            http=PatientProtocol.within(config.header_timeout_s),
            log_level="warning",
            access_log=False,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=_STOP_S,
        )
    )


async def _reload_again(reloader: LocalReloader) -> None:
    try:
        await reloader.reload({})
    except Exception as error:  # nothing awaits this task; on any error the old index stays in use
        log.error("reload failed, the index in use stays: %s", error, exc_info=not isinstance(error, AgenticRError))


def share_of_machine(spec: SearchSpec, slot: int, count: int) -> SearchSpec:
    """Settings of one of `count` workers: its share of CPU threads, a GPU in rotation, and a mapped index.

    The index of `faiss` is searched on the CPU whatever the retriever's device; mapped, the workers share one copy.
    """
    import torch

    from agentic_r_plugin.search.hybrid import parts_of

    if spec.device == "auto" and torch.cuda.is_available():
        spec = replace(spec, device=f"cuda:{slot % torch.cuda.device_count()}")
    torch.set_num_threads(threads_of_each(count))
    if resolved(spec).backend == "faiss":
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        return replace(spec, options={"mapped": True} | spec.options)
    if spec.backend == "hybrid":
        parts = [to_dict(share_of_machine(part, slot, count)) for part in parts_of(spec)]
        # Each part names its index now; `parts_of` would refuse the one of the hybrid as unused.
        return replace(spec, index="", options=spec.options | {"parts": parts})
    return spec


def _bound_socket(config: ServeConfig) -> socket.socket:
    """A socket bound to host and port.

    Its protocol is explicit because asyncio sets TCP_NODELAY only on such sockets; without it every answer waits for
    about 40 ms until the client acknowledges the response head.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {config.host} port {config.port}: {error.strerror or error}") from error
    return listener


def _url(host: str, listener: socket.socket) -> str:
    """Address for clients: for a wildcard address (0.0.0.0, ::), one that other machines can reach."""
    port = listener.getsockname()[1]
    if host in ("0.0.0.0", "::"):
        host = _own_address(listener.family)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _own_address(family: int) -> str:
    """The address that this machine sends from, or its host name if it has no route out. Nothing is sent."""
    outside = "2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1"  # reserved for documentation
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((outside, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()


@contextmanager
def _announced(ready: dict[str, Any], file: str) -> Iterator[None]:
    """Announce the service's address; connections made from now on are answered once the event loop runs."""
    print(f"serving on {ready['url']}", file=sys.stderr, flush=True)
    if file:
        write_json(file, ready)
    try:
        yield
    finally:
        if file:
            Path(file).unlink(missing_ok=True)


@contextmanager
def running_service(config: ServeConfig) -> Iterator[str]:
    """Run the service in a child process for the duration of the block; yields its address.

    The child always ends, even if this process is killed.

    Raises:
        SearchUnavailableError: it ended, or was not ready in time; quotes the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix="agentic-r-serve-") as name:
        folder = Path(name)
        ready = folder / "ready.json"
        save_config(replace(config, ready_file=str(ready), exit_with_parent=True), folder / "config.yaml")
        command = [sys.executable, "-m", "agentic_r_plugin.cli", "serve", "--config", str(folder / "config.yaml")]
        with (folder / "log.txt").open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield _wait_ready(process, ready, folder / "log.txt")
        finally:
            end(process)


def _wait_ready(process: subprocess.Popen[bytes], ready: Path, logfile: Path) -> str:
    deadline = time.monotonic() + _STARTUP_S
    while not ready.is_file():
        if (code := process.poll()) is not None:
            raise SearchUnavailableError(f"the retrieval service ended with code {code} at start; {_tail(logfile)}")
        if time.monotonic() > deadline:
            raise SearchUnavailableError(f"the retrieval service was not ready in {_STARTUP_S:g} s; {_tail(logfile)}")
        time.sleep(0.05)
    return str(read_json(ready)["url"])


def _tail(logfile: Path, lines: int = 15) -> str:
    text = logfile.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-lines:]
    return "its log ends:\n" + "\n".join(text) if text else "its log is empty"
