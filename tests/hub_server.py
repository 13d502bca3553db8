"""A Hugging Face hub on loopback that takes uploads to one repository, `me/set`."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

TOKEN = "hf_secretvalue"


@pytest.fixture
def hub(monkeypatch) -> Iterator[SimpleNamespace]:
    """The part of the hub's interface that `create_repo` and `create_commit` use; `requests` are those it was sent."""
    state = SimpleNamespace(requests=[], refuse=False, place="")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            state.requests.append((self.path, self.headers["Authorization"], body))
            if self.path.endswith("/commit/main") and state.refuse:
                self._answer(403, {"error": f"no right to write with {self.headers['Authorization']}"})
            elif self.path == "/api/repos/create":
                state.place = "datasets/me/set" if json.loads(body).get("type") == "dataset" else "me/set"
                self._answer(200, {"url": f"{state.url}/{state.place}", "name": "me/set"})
            elif self.path.endswith("/preupload/main"):
                files = [
                    {"path": item["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for item in json.loads(body)["files"]
                ]
                self._answer(200, {"files": files})
            elif self.path.endswith("/commit/main"):
                self._answer(200, {"commitUrl": f"{state.url}/{state.place}/commit/0", "commitOid": "0" * 40})
            else:
                self._answer(200, {})

        def _answer(self, status: int, value: dict) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", state.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield state
        server.shutdown()
        thread.join()


def committed(requests: list[tuple[str, str, str]], kind: str = "datasets") -> dict[str, bytes]:
    """Path -> content of the only commit."""
    (body,) = [body for path, _, body in requests if path == f"/api/{kind}/me/set/commit/main"]
    files = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
    return {file["path"]: base64.b64decode(file["content"]) for file in files}
