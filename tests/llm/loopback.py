"""A real HTTP server on the loopback interface that speaks as much of OpenAI's protocol as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CUT = (200, None, {"cut": "yes"})
"""An answer that says it is longer than it is: the connection is closed in its middle."""

Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]


@dataclass
class Loopback:
    """The running server: where it is and what it was asked."""

    url: str
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    """(path, body, headers)."""


@contextmanager
def serve(
    answer: Callable[[str, dict[str, Any]], Answer], *, models: list[dict[str, Any]] | None = None
) -> Iterator[Loopback]:
    """Answer every POST with `answer(path, body)`: (status, JSON or text) or (status, JSON or text, headers).

    `GET /v1/models` lists `models`; without them there is no such page.
    """
    server: Loopback

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send(200 if models else 404, {"object": "list", "data": models or []}, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, body, dict(self.headers)))
            status, content, *headers = answer(self.path, body)
            if content is None:
                self.send_response(status)
                self.send_header("Content-Length", "100")
                self.end_headers()
                self.wfile.write(b'{"choices": [{"mess')
                self.close_connection = True
                return
            self.send(status, content, headers[0] if headers else {})

        def send(self, status: int, content: Any, headers: dict[str, str]) -> None:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that went away is no fault of the server's."""

    httpd = Quiet(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server = Loopback(url=f"http://127.0.0.1:{httpd.server_address[1]}/v1")
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def chat(reply: str) -> Answer:
    """A chat completion."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": reply}}]}
