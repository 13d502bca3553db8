"""Real servers on the loopback: our application in a thread, and one that misbehaves as asked."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.base import Hit, SearchRequest
from agentic_r_plugin.search.service.app import build_app
from agentic_r_plugin.search.service.bodies import RequestLimits
from agentic_r_plugin.search.service.request_heads import PatientProtocol
from agentic_r_plugin.search.service.search_service import SearchService

LIMITS = RequestLimits(
    max_queries=8,
    max_topk=50,
    max_passages=100,
    max_query_chars=200,
    max_history=4,
    max_body_bytes=20_000,
    timeout_s=5,
    default_topk=2,
)


class EchoBackend:
    """Ten passages whose text says what was asked; counts its batches."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.batches: list[list[SearchRequest]] = []
        self.delay_s = delay_s

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        self.batches.append(list(requests))
        time.sleep(self.delay_s)
        if any(request.query == "break" for request in requests):
            raise RuntimeError("the disk is on fire")
        if any(request.query == "lose one" for request in requests):
            requests = requests[1:]
        return [self._hits(request, topk) for request in requests]

    def _hits(self, request: SearchRequest, topk: int) -> list[Hit]:
        text = f"{request.question}|{request.history}|{request.query}"
        passages = [Passage(id=str(i), title=f"T{i}", text=text) for i in range(min(topk, 10))]
        return [Hit(passage=passage, score=1 - i / 10) for i, passage in enumerate(passages)]

    def documents(self, ids: Sequence[str]) -> list[Passage | None]:
        return [Passage(id=name, title=f"T{name}", text=f"all of {name}") if name.isdigit() else None for name in ids]

    def fingerprint(self) -> str:
        return "echo"

    def close(self) -> None:
        pass


@contextmanager
def serving(backend, *, limits=LIMITS, token=None, reload=None, header_timeout_s=5.0, **settings) -> Iterator[str]:
    """Our application; yields its address."""
    settings = {"max_batch": 16, "window_ms": 5, "cache_size": 100, "max_waiting": 64} | settings
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    app = build_app(SearchService(backend, **settings), limits, token=token, reload=reload)
    http = PatientProtocol.within(header_timeout_s)
    server = uvicorn.Server(uvicorn.Config(app, http=http, log_level="critical", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


Step = bytes | Callable[[socket.socket], None]


class Misbehaving:
    """Takes one connection per step and sends the step's bytes (or lets it do as it likes), then closes."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps, self.taken = list(steps), 0
        self.arrivals: list[float] = []
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(16)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        for step in self.steps:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.taken += 1
            self.arrivals.append(time.monotonic())
            with connection:
                connection.settimeout(5)
                try:
                    read_request(connection)
                    step(connection) if callable(step) else connection.sendall(step)
                except OSError:
                    continue

    def __enter__(self) -> Misbehaving:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


def read_request(connection: socket.socket) -> None:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            while len(body) < int(value):
                body += connection.recv(65536)


def response(status: int, body: bytes, *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body
