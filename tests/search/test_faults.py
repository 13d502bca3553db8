"""What goes wrong while the service serves: indexes swapped, workers killed, strangers by the thousand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from agentic_r_plugin.errors import SearchError
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.search.indexing.index import IndexConfig, read_manifest
from agentic_r_plugin.search.indexing.index import run as build_index
from agentic_r_plugin.search.service.reload import WorkerReloader
from tests.benchmarks.retrieval_hostile import hostile_bodies, send_all
from tests.search.loopback import EchoBackend, serving
from tests.search.tiny_retriever import write_corpus


@pytest.fixture(scope="module")
def other_index(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("other")
    corpus = write_corpus(folder / "corpus.jsonl", count=30, seed=5)
    build_index(IndexConfig(corpus=str(corpus), retriever=model_folder, out=str(folder / "index")))
    return folder / "index"


@contextmanager
def service(index, tmp_path, *flags):
    """The command `serve` as a process; yields (address, process)."""
    ready = tmp_path / "ready.json"
    command = [sys.executable, "-m", "agentic_r_plugin.cli", "serve", "--index", str(index), "--port", "0"]
    process = subprocess.Popen([*command, "--ready-file", str(ready), "--allow-reload", *flags])
    try:
        deadline = time.monotonic() + 180
        while not ready.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        yield json.loads(ready.read_text())["url"], process
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0
        assert not ready.exists()


class Asking:
    """Threads that ask plain requests, without retries, over kept connections, until asked to stop."""

    def __init__(self, url, threads=4):
        self.url, self.stop, self.answers, self.failures = url, False, [], []
        self.threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def _ask(self):
        number = 0
        with httpx.Client(timeout=60) as client:
            while not self.stop:
                number += 1
                body = {"queries": [f"p{number % 30} p{(number + 1) % 30}"], "topk": 1}
                try:
                    answer = client.post(f"{self.url}/retrieve", json=body)
                    (self.answers if answer.status_code == 200 else self.failures).append(answer.text)
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop = True
        for thread in self.threads:
            thread.join()


def test_an_index_is_swapped_under_load_without_one_failed_request(index_folder, other_index, tmp_path):
    first, second = (read_manifest(folder).fingerprint() for folder in (index_folder, other_index))
    link = tmp_path / "served"
    link.symlink_to(index_folder)
    with service(link, tmp_path) as (url, process), Asking(url) as asking:
        client = RetrievalClient(url, retries=0)
        assert client.health()["fingerprint"] == first
        assert client.reload(str(other_index)) == second == client.health()["fingerprint"]
        assert client.search([SearchRequest(query="p1")], 40)[0][29].passage.id and len(asking.answers) > 0
        with pytest.raises(SearchError, match=r"HTTP 400: reload_failed: .*no index there .*the index in use stays"):
            client.reload(str(tmp_path / "nowhere"))
        assert client.health()["fingerprint"] == second
        assert client.reload(str(link)) == first
        link.unlink()
        link.symlink_to(other_index)
        os.kill(process.pid, signal.SIGHUP)
        deadline = time.monotonic() + 60
        while client.health()["fingerprint"] != second and time.monotonic() < deadline:
            time.sleep(0.05)
        assert client.health()["fingerprint"] == second
        assert "agentic_r_search_reloads_total 3\n" in httpx.get(f"{url}/metrics").text
    assert not asking.failures and len(asking.answers) > 10


def test_workers_are_replaced_reloaded_together_and_count_together(index_folder, other_index, tmp_path):
    second = read_manifest(other_index).fingerprint()
    copy = tmp_path / "copy"
    shutil.copytree(other_index, copy)
    with service(index_folder, tmp_path, "--workers", "2", "--cache-size", "0") as (url, process):
        client = RetrievalClient(url, retries=8)
        with Asking(url) as asking:
            assert client.reload(str(other_index)) == second
            with pytest.raises(SearchError, match="no index there"):
                client.reload(str(tmp_path / "nowhere"))
        assert not asking.failures and asking.answers
        seen = {httpx.get(f"{url}/health").json()["fingerprint"] for _ in range(20)}
        assert seen == {second}
        asked = len(asking.answers)
        counted = httpx.get(f"{url}/metrics").text
        assert f"agentic_r_search_queries_total {asked}\n" in counted
        assert f'agentic_r_search_requests_total{{status="200"}} {asked}\n' in counted
        workers = _children(process.pid)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        for number in range(50):  # a request in the dead worker's hands is tried again by the client
            assert len(client.search([SearchRequest(query=f"p{number % 30}")], 3)[0]) == 3
        deadline = time.monotonic() + 90
        while len(_children(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(_children(process.pid)) == 2 and workers[0] not in _children(process.pid)
    assert not any(_alive(pid) for pid in workers)


def _children(pid):
    """Worker processes of a supervisor (not multiprocessing's resource tracker)."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return [child for child in found if _alive(child) and b"spawn_main" in _command(child)]


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_that_cannot_start_are_one_clear_error(tmp_path):
    command = [sys.executable, "-m", "agentic_r_plugin.cli", "serve", "--index", str(tmp_path), "--port", "0"]
    ended = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "no index there" in ended.stderr and "Traceback" not in ended.stderr


def test_hostile_requests_get_4xx_and_the_service_goes_on():
    with serving(EchoBackend(), max_waiting=4096) as url:
        statuses = send_all(url, hostile_bodies(600, seed=0), connections=8)
        assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
        assert RetrievalClient(url).search([SearchRequest(query="x")], 1)[0][0].score == 1.0
    assert sum(statuses.values()) == 600
    assert set(statuses) <= {400, 404, 405, 413}, statuses
    assert statuses[400] > 100 and statuses[413] > 20


@contextlib.contextmanager
def slow_clients(url):
    """Fifty connections that have sent no head, or a part of one."""
    with contextlib.ExitStack() as stack:
        port = int(url.rpartition(":")[2])
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(50)]
        for number, connection in enumerate(slow):
            connection.sendall([b"", b"POST /retr", b"POST /retrieve HTTP/1.1\r\nHost: x\r\n"][number % 3])
        yield slow


def test_slow_clients_do_not_hold_others_up():
    with serving(EchoBackend(), header_timeout_s=300) as url, slow_clients(url):
        # Well before the slow clients are hung up on.
        assert httpx.post(f"{url}/retrieve", json={"queries": ["a"]}, timeout=60).status_code == 200


def test_slow_clients_are_hung_up_on():
    with serving(EchoBackend(), header_timeout_s=0.5) as url:
        with slow_clients(url) as slow:
            for connection in slow:
                connection.settimeout(10)
                assert connection.recv(100) == b""
        with httpx.Client() as patient:  # an idle connection between two requests is not a slow one
            assert patient.post(f"{url}/retrieve", json={"queries": ["a"]}).status_code == 200
            time.sleep(0.8)
            assert patient.post(f"{url}/retrieve", json={"queries": ["a"]}).status_code == 200


def test_a_head_without_end_is_hung_up_on():
    with serving(EchoBackend()) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
        client.settimeout(5)
        client.sendall(b"GET /health HTTP/1.1\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            for number in range(10_000):
                line = f"X-{number}: {'x' * 1000}\r\n".encode()
                client.sendall(line)
                sent += len(line)
            assert b"400" in client.recv(1000)
        assert sent < 10_000_000
        assert httpx.get(f"{url}/health").status_code == 200


def test_reloading_is_refused_unless_it_was_allowed():
    with serving(EchoBackend()) as url:
        answer = httpx.post(f"{url}/reload", json={"index": "x"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "forbidden")


def test_a_page_in_a_browser_cannot_reload():
    asked = []

    async def reload(changes):
        asked.append(changes)
        return "new"

    with serving(EchoBackend(), reload=reload) as url:
        assert httpx.post(f"{url}/reload", json={"index": "x"}).json()["fingerprint"] == "new"
        answer = httpx.post(f"{url}/reload", content=b'{"index": "y"}', headers={"Origin": "https://example.org"})
        assert (answer.status_code, asked) == (403, [{"index": "x"}])


def test_each_of_two_reloads_at_once_gets_its_own_outcome():
    async def outcomes():
        ours, theirs = multiprocessing.Pipe()
        reloader = WorkerReloader(None, theirs, lambda spec: None)
        asked = [asyncio.ensure_future(reloader.reload({"index": name})) for name in ("a", "nowhere")]
        await asyncio.sleep(0)
        reloader._tell("of a", None)
        reloader._tell("", "no index there")
        reloader._tell("", "of a worker that is gone")
        return await asyncio.gather(*asked, return_exceptions=True), [ours.recv(), ours.recv()]

    (first, second), sent = asyncio.run(outcomes())
    assert first == "of a" and isinstance(second, SearchError) and str(second) == "no index there"
    assert sent == [("reload", {"index": "a"}), ("reload", {"index": "nowhere"})]


def test_a_worker_carries_out_what_the_supervisor_sent_before_it_listened():
    class Swapped(list):
        swap = list.append

    class Backend:
        def fingerprint(self):
            return "new"

    async def outcome():
        ours, theirs = multiprocessing.Pipe()
        service, stopped = Swapped(), threading.Event()
        ours.send(("prepare", None))
        ours.send(("commit",))
        reloader = WorkerReloader(service, theirs, lambda spec: Backend())
        reloader.listen(asyncio.get_running_loop(), stopped.set)
        answers = [await asyncio.to_thread(ours.recv) for _ in range(2)]
        ours.close()
        assert await asyncio.to_thread(stopped.wait, 10), "a worker without a supervisor stops"
        return answers, service

    answers, service = asyncio.run(outcome())
    assert answers == [("prepared", None), ("committed", "new")]
    assert [type(backend).__name__ for backend in service] == ["Backend"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_can_no_longer_follow_its_supervisor_stops():
    async def stops():
        ours, theirs = multiprocessing.Pipe()
        stopped = threading.Event()
        WorkerReloader(None, theirs, lambda spec: None).listen(asyncio.get_running_loop(), stopped.set)
        ours.send(("commit",))  # nothing is prepared
        return await asyncio.to_thread(stopped.wait, 10)

    assert asyncio.run(stops())


def test_metrics_are_prometheus_text():
    parser = pytest.importorskip("prometheus_client.parser")
    with serving(EchoBackend()) as url:
        RetrievalClient(url).search([SearchRequest(query=str(i)) for i in range(5)], 2)
        httpx.post(f"{url}/retrieve", content=b"{")
        families = {item.name: item for item in parser.text_string_to_metric_families(httpx.get(f"{url}/metrics").text)}
    values = {sample.name + str(sample.labels): sample.value for item in families.values() for sample in item.samples}
    assert values["agentic_r_search_queries_total{}"] == 5
    assert values["agentic_r_search_requests_total{'status': '200'}"] == 1
    assert values["agentic_r_search_requests_total{'status': '400'}"] == 1
    assert values["agentic_r_search_request_seconds_count{}"] == 2
    assert values["agentic_r_search_batch_queries_bucket{'le': '8'}"] == 1
    assert values["agentic_r_search_batch_queries_bucket{'le': '4'}"] == 0
    assert values["agentic_r_search_cache_entries{}"] == 5
    assert values["agentic_r_search_index_info{'fingerprint': 'echo'}"] == 1
    assert {item.type for item in families.values()} == {"counter", "gauge", "histogram"}
