"""The service over real connections: the contract's wire format, strangers' bodies, many clients at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace

import faiss
import httpx
import pytest
import torch

from agentic_r_plugin.backends import SearchSpec
from agentic_r_plugin.errors import ConfigError, SearchError, SearchUnavailableError
from agentic_r_plugin.net import is_loopback
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.search.dense import FaissBackend
from agentic_r_plugin.search.service import server
from agentic_r_plugin.search.service.search_service import SearchService
from agentic_r_plugin.search.service.server import ServeConfig, running_service
from tests.search.loopback import LIMITS, EchoBackend, serving


@pytest.fixture(scope="module")
def url():
    with serving(EchoBackend()) as address:
        yield address


def test_answers_have_the_form_of_the_contract(url):
    answer = httpx.post(f"{url}/retrieve", json={"queries": ["a", "b"], "topk": 1, "return_scores": True})
    assert answer.status_code == 200
    document = {"id": "0", "title": "T0", "text": "None|()|b", "contents": '"T0"\nNone|()|b'}
    assert answer.json()["result"][1] == [{"document": document, "score": 1.0}]
    bare = httpx.post(f"{url}/retrieve", json={"queries": ["b"]}).json()
    assert bare["result"][0][0] == document and len(bare["result"][0]) == LIMITS.default_topk
    assert httpx.post(f"{url}/retrieve", json={"queries": []}).json() == {"result": []}


def test_questions_and_histories_reach_the_retriever(url):
    body = {"queries": ["q", "r"], "questions": ["Q", None], "histories": [["h"], []], "topk": 1}
    found = httpx.post(f"{url}/retrieve", json=body).json()["result"]
    assert [documents[0]["text"] for documents in found] == ["Q|('h',)|q", "None|()|r"]


def test_reasonings_reach_a_retriever_that_reads_them():
    backend = EchoBackend()
    body = {"queries": ["q", "r"], "reasonings": ["first", ""], "topk": 1}
    with serving(backend) as url:
        httpx.post(f"{url}/retrieve", json=body)
        RetrievalClient(url).search([SearchRequest(query="s", reasoning="third")], 1)
        wrong = httpx.post(f"{url}/retrieve", json=body | {"reasonings": ["one"]})
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "invalid_request")
        httpx.post(f"{url}/retrieve", json=body | {"reasonings": ["a" * 9 + "b" * 200, "x" * 200]})
    read = [request.reasoning for batch in backend.batches for request in batch]
    assert read == ["first", "", "third", "b" * 200, "x" * 200], "of a longer one, the end"


def test_where_the_reasoning_is_not_read_it_neither_splits_the_cache_nor_counts_against_a_limit():
    backend = EchoBackend()
    backend.reads_reasoning = False
    with serving(backend, cache_size=2) as url:
        client = RetrievalClient(url)
        for reasoning in ("a", "b", "x" * 201, ""):
            client.search([SearchRequest(query="q", reasoning=reasoning)], 1)
    assert backend.batches == [[SearchRequest(query="q")]]


def test_documents_are_opened_with_the_limits_and_the_token_of_a_search():
    document = {"id": "7", "title": "T7", "text": "all of 7", "contents": '"T7"\nall of 7'}
    with serving(EchoBackend(), token="t0ken") as address:
        client = RetrievalClient(address, token="t0ken")
        assert [found and found.contents for found in client.documents(["7", "gone"])] == [document["contents"], None]
        headers = {"Authorization": "Bearer t0ken"}
        answer = httpx.post(f"{address}/documents", json={"ids": ["7", "gone"]}, headers=headers)
        assert answer.json() == {"result": [document, None]}
        assert httpx.post(f"{address}/documents", json={"ids": ["7"]}).status_code == 401
        for body, status in (
            ({"ids": "7"}, 400),
            ({"ids": [7]}, 400),
            ({"ids": ["7"] * 9}, 413),
            ({"ids": ["7" * 201]}, 413),
        ):
            answer = httpx.post(f"{address}/documents", json=body, headers=headers)
            assert answer.status_code == status and answer.json()["error"]["message"]
        with pytest.raises(SearchError, match="documents"):
            RetrievalClient(address, token="other", retries=0).documents(["7"])
        in_parts = RetrievalClient(address, token="t0ken", max_batch=8)
        ids = [str(number) for number in range(20)]
        for found in (in_parts.documents(ids), asyncio.run(in_parts.adocuments(ids))):
            assert [document and document.id for document in found] == ids


def test_a_backend_without_documents_is_an_error_and_not_an_unknown_document():
    class Plain(EchoBackend):
        documents = None

    with serving(Plain()) as address, pytest.raises(SearchError, match="Plain cannot open documents"):
        RetrievalClient(address, retries=0).documents(["7"])


def test_a_backend_that_fails_to_open_a_document_is_not_taken_for_a_service_that_shuts_down():
    class Broken(EchoBackend):
        def documents(self, ids):
            raise RuntimeError("the disk is on fire")

    with serving(Broken()) as address:
        answer = httpx.post(f"{address}/documents", json={"ids": ["7"]})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "search_failed")
    assert "RuntimeError: the disk is on fire" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "expected a JSON object"),
        (b"{", 400, "expected a JSON object"),
        (b"[1]", 400, "body: Input should be a valid dictionary"),
        (b'{"queries": ["\xff"]}', 400, "expected a JSON object in UTF-8"),
        (b'{"queries": ["\\ud800"]}', 400, "queries[0]: Input should be a valid string, unable"),
        (b"[" * 15_000, 400, "expected a JSON object"),
        (b'{"queries": ' + b"[" * 9000 + b"]" * 9000 + b"}", 400, ""),
        (b'{"queries": "q"}', 400, "queries: Input should be a valid list, found str"),
        (b'{"queries": [1]}', 400, "queries[0]: Input should be a valid string, found int"),
        (b'{"queries": ["q", null]}', 400, "queries[1]: Input should be a valid string, found NoneType"),
        (b"{}", 400, "queries: Field required"),
        (b'{"queries": ["q"], "topk": -1}', 400, "topk"),
        (b'{"queries": ["q"], "topk": true}', 400, "topk"),
        (b'{"queries": ["q"], "topk": 1.5}', 400, "topk"),
        (b'{"queries": ["q"], "topk": "3"}', 400, "topk"),
        (b'{"queries": ["q"], "topk": NaN}', 400, "topk"),
        (b'{"queries": ["q"], "topk": 51}', 413, "topk: Input should be less than or equal to 50"),
        (b'{"queries": ["q"], "topk": 1' + b"0" * 4000 + b"}", 413, "topk: Input should be less than or equal to 50"),
        (b'{"queries": ["q"], "topk": 1' + b"0" * 5000 + b"}", 400, "expected a JSON object"),
        (b'{"queries": ["q"], "return_scores": "yes"}', 400, "return_scores"),
        (b'{"queries": ["q"], "questions": ["a", "b"]}', 400, "questions: expected a list as long as 'queries' (1)"),
        (b'{"queries": ["q"], "questions": [3]}', 400, "questions[0]"),
        (b'{"queries": ["q"], "reasonings": ["\\ud800"]}', 400, "reasonings[0]"),
        (b'{"queries": ["q"], "histories": ["h"]}', 400, "histories[0]: Input should be a valid list"),
        (b'{"queries": ["q"], "histories": [["a", "b", "c", "d", "e"]]}', 413, "at most 4 items"),
        (b'{"queries": ["' + b"x" * 201 + b'"]}', 413, "queries[0]: String should have at most 200 characters"),
        (b'{"queries": ["q","q","q","q","q","q","q","q","q"]}', 413, "queries: List should have at most 8 items"),
        (b'{"queries": ["a", "b", "c"], "topk": 34}', 413, "3 queries of 34 passages; at most 100 passages"),
        (b'{"queries": ["' + b"x" * 30_000 + b'"]}', 413, "larger than 20000 bytes"),
    ],
)  # fmt: skip
def test_what_is_not_a_request_gets_a_typed_error(url, body, status, message):
    answer = httpx.post(f"{url}/retrieve", content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == {400: "invalid_request", 413: "too_large"}[status]
    assert message in error["message"]


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ('"topk": 0', 2), ('"topk": null', 2), ('"topk": 3.0', 3), ('"return_scores": null, "topk": 1', 1),
        ('"topk": 1, "timeout": 30, "user": {"name": []}', 1),
    ],
)  # fmt: skip
def test_what_clients_of_other_services_send_is_taken(url, fields, found):
    # curl sends this type of content with -d
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = httpx.post(f"{url}/retrieve", content='{"queries": ["q", ""], ' + fields + "}", headers=headers)
    assert answer.status_code == 200
    assert [[document["id"] for document in row] for row in answer.json()["result"]] == [["0", "1", "2"][:found]] * 2


def test_all_queries_of_a_grpo_batch_fit_into_one_request_by_default():
    config = ServeConfig()
    names = ("max_queries", "max_passages", "max_body_bytes")
    limits = replace(LIMITS, **{name: getattr(config, name) for name in names})
    body = {"queries": [f"town {number}" for number in range(512 * 5)], "topk": 3, "return_scores": True}
    with serving(EchoBackend(), limits=limits, max_waiting=config.max_waiting) as url:
        answer = httpx.post(f"{url}/retrieve", json=body, timeout=60)
    assert answer.status_code == 200
    assert [row[2]["document"]["text"] for row in answer.json()["result"]] == [
        f"None|()|town {number}" for number in range(2560)
    ]


def test_no_query_is_no_result(url):
    assert httpx.post(f"{url}/retrieve", json={"queries": []}).json() == {"result": []}


def test_unknown_paths_and_methods_get_typed_errors(url):
    assert httpx.get(f"{url}/nope").json()["error"]["type"] == "not_found"
    answer = httpx.get(f"{url}/retrieve")
    assert (answer.status_code, answer.json()["error"]["type"]) == (405, "method_not_allowed")


def test_a_body_without_end_is_refused_before_it_is_read(url):
    def endless():
        for _ in range(10_000):
            yield b"x" * 10_000

    try:
        answer = httpx.post(f"{url}/retrieve", content=endless())
        assert answer.status_code == 413
    except (httpx.WriteError, httpx.ReadError):  # the service hung up on it
        pass
    assert httpx.get(f"{url}/ready").json() == {"status": "ready"}


def test_half_a_request_does_not_hold_the_others_up():
    with serving(EchoBackend(), limits=replace(LIMITS, timeout_s=0.5)) as url:
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as half:
            half.sendall(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert httpx.post(f"{url}/retrieve", json={"queries": ["a"]}).status_code == 200
            half.settimeout(5)
            assert b"504" in half.recv(1000)


def test_many_clients_at_once_share_batches_and_each_gets_its_own_answer():
    backend = EchoBackend(delay_s=0.01)

    async def ask(address):
        client = RetrievalClient(address)
        requests = [SearchRequest(query=f"q{i}", question="Q") for i in range(60)]
        answers = await asyncio.gather(*(client.asearch([request], 2) for request in requests))
        again = await client.asearch(requests[:5], 2)
        await client.aclose()
        return answers, again

    with serving(backend) as url:
        answers, again = asyncio.run(ask(url))
        assert [hits[0][0].passage.text for hits in answers] == [f"Q|()|q{i}" for i in range(60)]
        assert again == [answers[i][0] for i in range(5)]
        assert sum(map(len, backend.batches)) == 60 and len(backend.batches) < 30
        metrics = httpx.get(f"{url}/metrics").text
    assert "agentic_r_search_queries_total 65\n" in metrics
    assert "agentic_r_search_cache_hits_total 5\n" in metrics
    assert f"agentic_r_search_batches_total {len(backend.batches)}\n" in metrics
    assert 'agentic_r_search_request_seconds_bucket{le="+Inf"} 61\n' in metrics


def test_the_cache_keeps_question_and_topk_apart():
    backend = EchoBackend()
    with serving(backend, cache_size=2) as url:
        client = RetrievalClient(url)

        def asked(query, topk, question=None):
            before = len(backend.batches)
            hits = client.search([SearchRequest(query=query, question=question)], topk)[0]
            assert len(hits) == topk
            return len(backend.batches) - before

        assert [asked("a", 3), asked("a", 2), asked("a", 3), asked("a", 4), asked("a", 4)] == [1, 0, 0, 1, 0]
        assert [asked("a", 3, "Q"), asked("a", 3, "Q"), asked("b", 3), asked("a", 4)] == [1, 0, 1, 1]


def test_a_failing_backend_is_an_error_and_the_service_lives_on(url):
    answer = httpx.post(f"{url}/retrieve", json={"queries": ["break"]})
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "type": "search_failed",
        "message": "the search backend failed: RuntimeError: the disk is on fire",
    }
    assert httpx.post(f"{url}/retrieve", json={"queries": ["a"]}).status_code == 200
    answer = httpx.post(f"{url}/retrieve", json={"queries": ["lose one"]})
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "search_failed")
    assert "1 searches given, 0 results returned" in answer.json()["error"]["message"]
    assert httpx.post(f"{url}/retrieve", json={"queries": ["still here"]}).status_code == 200


def test_the_cache_holds_no_more_passages_than_its_budget():
    backend = EchoBackend()
    with serving(backend, cache_size=1) as url:
        client = RetrievalClient(url)
        for topk in (10, 10, 50):  # the backend has ten passages
            client.search([SearchRequest(query="a")], topk)
        assert len(backend.batches) == 2
    service = SearchService(backend, max_batch=1, window_ms=0, cache_size=2, max_waiting=1)
    hits = backend.search([SearchRequest(query="a")], 10)[0] * 5
    for query in ("a", "b"):
        service._remember(SearchRequest(query=query), 50, hits)
    known = {query: service._cached(SearchRequest(query=query), 50) for query in ("a", "b")}
    assert known == {"a": None, "b": hits}
    service._remember(SearchRequest(query="b"), 60, hits[:40])
    service._remember(SearchRequest(query="c"), 5, hits[:5])
    assert len(service._cache) == 2 and service._cached_hits == 45


def test_what_the_cache_keeps_of_a_request_does_not_grow_with_its_history():
    service = SearchService(EchoBackend(), max_batch=1, window_ms=0, cache_size=2, max_waiting=1)
    long = SearchRequest(query="a", question="Q", history=("h" * 20_000,) * 64)
    service._remember(long, 1, [])
    assert service._cached(long, 1) == [] and service._cached(replace(long, history=()), 1) is None
    assert sum(sys.getsizeof(key) for key in service._cache) < 100


def test_ready_says_whether_searches_are_answered():
    async def states():
        service = SearchService(EchoBackend(), max_batch=1, window_ms=0, cache_size=0, max_waiting=1)
        found = [service.ready]
        service.start()
        found.append(service.ready)
        service._worker.cancel()
        await asyncio.sleep(0.01)
        found.append(service.ready)
        await service.stop()
        return found

    assert asyncio.run(states()) == [False, True, False]


def test_a_stop_answers_every_search_of_the_batch_that_is_under_way():
    async def answers():
        service = SearchService(EchoBackend(delay_s=0.3), max_batch=8, window_ms=20, cache_size=0, max_waiting=8)
        service.start()
        asked = [asyncio.create_task(service.search([SearchRequest(query="a")], topk)) for topk in (1, 2, 3)]
        await asyncio.sleep(0.15)  # the search of one depth is under way, the others are no longer in the queue
        await service.stop()
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 2)

    assert [str(answer) for answer in asyncio.run(answers())] == ["the service is shutting down"] * 3


def test_a_slow_backend_times_out_and_a_full_queue_is_refused():
    with serving(EchoBackend(delay_s=1.0), limits=replace(LIMITS, timeout_s=0.3)) as url:
        answer = httpx.post(f"{url}/retrieve", json={"queries": ["a"]})
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "timeout")
    with serving(EchoBackend(delay_s=0.5), max_waiting=4) as url:
        body = {"queries": list("abcd")}
        first = threading.Thread(target=httpx.post, args=(f"{url}/retrieve",), kwargs={"json": body})
        first.start()
        time.sleep(0.2)
        answer = httpx.post(f"{url}/retrieve", json={"queries": ["x"]})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "overloaded")
        assert answer.headers["Retry-After"] == "1"
        first.join()
        assert len(RetrievalClient(url).search([SearchRequest(query="x")], 1)[0]) == 1


def test_with_a_token_nobody_searches_without_it():
    with serving(EchoBackend(), token="sécret") as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": b"Bearer \xff"}):
            answer = httpx.post(f"{url}/retrieve", json={"queries": ["a"]}, headers=headers)
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "unauthorized")
            assert httpx.get(f"{url}/metrics", headers=headers).status_code == 401
        assert httpx.get(f"{url}/health").json()["fingerprint"] == "echo"
    with serving(EchoBackend(), token="secret") as url:
        assert RetrievalClient(url, token="secret").search([SearchRequest(query="a")], 1)[0][0].score == 1.0
        with pytest.raises(SearchError, match="HTTP 401: unauthorized"):
            RetrievalClient(url).search([SearchRequest(query="a")], 1)


def test_the_service_finds_what_its_backend_finds(index_folder):
    backend = FaissBackend(index_folder, precision="float32")
    requests = [SearchRequest(query=f"p{n} p{n + 1}", question="q1") for n in range(6)]
    expected = backend.search(requests, 4)
    with serving(backend) as url:
        found = RetrievalClient(url).search(requests, 4)
    for ours, wanted in zip(found, expected, strict=True):
        assert [hit.passage for hit in ours] == [hit.passage for hit in wanted]
        assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in wanted], abs=1e-5)


def test_a_service_process_starts_answers_and_ends_with_its_block(corpus_file):
    with running_service(ServeConfig(backend="bm25", corpus=str(corpus_file), port=0)) as url:
        assert RetrievalClient(url).search([SearchRequest(query="p1")], 40)[0][0].score > 0
    with pytest.raises(SearchUnavailableError, match="no answer after 1 attempt"):
        RetrievalClient(url, retries=0).search([SearchRequest(query="p1")], 1)


def test_a_service_that_cannot_start_shows_the_end_of_its_log(tmp_path):
    with (
        pytest.raises(SearchUnavailableError, match=r"ended with code 1 at start; its log ends:\n.*no index there"),
        running_service(ServeConfig(index=str(tmp_path), port=0)),
    ):
        pass


PARENT = """
import sys, time
from agentic_r_plugin.search.service.server import ServeConfig, running_service
with running_service(ServeConfig(backend="bm25", corpus=sys.argv[1], port=0)) as url:
    print(url, flush=True)
    time.sleep(60)
"""


def test_a_service_whose_parent_is_killed_ends_too(corpus_file):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(corpus_file)], stdout=subprocess.PIPE, text=True)
    url = parent.stdout.readline().strip()
    assert httpx.get(f"{url}/health").status_code == 200
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    with pytest.raises(httpx.ConnectError):
        while time.monotonic() < deadline:
            httpx.get(f"{url}/health")
            time.sleep(0.2)


def test_a_terminated_service_finishes_and_takes_its_ready_file_along(corpus_file, tmp_path):
    ready = tmp_path / "ready.json"
    command = [sys.executable, "-m", "agentic_r_plugin.cli", "serve", "--backend", "bm25", "--port", "0"]
    process = subprocess.Popen([*command, "--corpus", str(corpus_file), "--ready-file", str(ready)])
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    announced = json.loads(ready.read_text())
    assert announced["pid"] == process.pid
    assert httpx.get(f"{announced['url']}/health").json()["fingerprint"] == announced["fingerprint"]
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert not ready.exists()


def test_a_service_on_all_addresses_announces_one_that_other_machines_can_use(corpus_file, monkeypatch):
    monkeypatch.setenv("SEARCH_TOKEN", "s3cret")
    monkeypatch.setenv("NO_PROXY", "*")
    config = ServeConfig(backend="bm25", corpus=str(corpus_file), port=0, host="0.0.0.0", token_env="SEARCH_TOKEN")
    with running_service(config) as url:
        host = httpx.URL(url).host
        assert host != "0.0.0.0" and not is_loopback(host)
        assert httpx.post(f"{url}/retrieve", json={"queries": ["q"]}).status_code == 401
        with closing(RetrievalClient(url, token="s3cret")) as client:
            assert len(client.search([SearchRequest(query="q")], 1)) == 1


@pytest.mark.parametrize("gpus", [0, 2])
def test_each_worker_takes_its_share_of_the_machine_and_maps_the_index(monkeypatch, gpus):
    threads, index_threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    try:
        share = server.share_of_machine(SearchSpec(backend="faiss", index="i", options={"nprobe": 8}), 3, 4)
        assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (3, 3)
        assert (share.device, share.options) == ("cuda:1" if gpus else "auto", {"mapped": True, "nprobe": 8})
        own = SearchSpec(backend="torch", index="i", device="cpu", options={"mapped": False})
        assert server.share_of_machine(own, 3, 4) == own
    finally:
        torch.set_num_threads(threads)
        faiss.omp_set_num_threads(index_threads)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "can be reached from outside; set token_env"),
        ({"host": "example.org"}, "can be reached from outside"),
        ({"port": 70_000}, "expected 0 to 65535"),
        ({"timeout_s": 0.0}, "timeout_s must be above 0"),
        ({"cache_size": -1}, "cache_size must not be below 0"),
    ],
)
def test_unsafe_or_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ServeConfig(**settings)


def test_answers_are_sent_without_delay():
    async def options():
        accepted = asyncio.get_running_loop().create_future()
        with server._bound_socket(ServeConfig(port=0)) as listener:
            running = await asyncio.start_server(lambda _, writer: accepted.set_result(writer), sock=listener)
            _, ours = await asyncio.open_connection(*listener.getsockname())
            theirs = await accepted
            found = theirs.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for writer in (ours, theirs):
                writer.close()
            running.close()
            return found

    assert asyncio.run(options()) != 0


def test_a_taken_port_is_said(corpus_file):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(SearchUnavailableError, match=f"cannot listen on 127.0.0.1 port {port}: Address"),
            running_service(ServeConfig(backend="bm25", corpus=str(corpus_file), port=port)),
        ):
            pass
