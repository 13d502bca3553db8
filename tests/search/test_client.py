"""The client against a server that really misbehaves: what passes is tried again, what does not is an error."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import multiprocessing
import pickle
import threading
import time
from email.utils import formatdate

import pytest

from agentic_r_plugin.backends import SearchSpec, open_search
from agentic_r_plugin.errors import ConfigError, SearchError, SearchRefusedError, SearchUnavailableError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.base import Hit, SearchRequest
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.search.wire import decode_hits, encode_hits
from tests.search.loopback import EchoBackend, Misbehaving, response, serving

ONE = [SearchRequest(query="q")]
HIT = {"document": {"id": "1", "title": "T", "text": "x", "contents": '"T"\nx'}, "score": 0.5}
GOOD = response(200, json.dumps({"result": [[HIT]]}).encode())


def slow(connection):
    time.sleep(0.6)
    connection.sendall(GOOD)


def drip(connection):
    for i in range(40):
        connection.sendall(GOOD[i : i + 1])
        time.sleep(0.05)


def both(server, **settings):
    """The blocking and the asynchronous way to ask."""
    client = RetrievalClient(server.url, **{"timeout_s": 0.4, "retries": 2} | settings)
    return [lambda: client.search(ONE, 3), lambda: asyncio.run(client.asearch(ONE, 3))]


@pytest.mark.parametrize("way", [0, 1], ids=["sync", "async"])
@pytest.mark.parametrize(
    "fault",
    [
        response(500, b'{"error": {"type": "search_failed", "message": "x"}}'),
        response(502, b"<html>"),
        response(503, b""),
        response(429, b"", "Retry-After: 0"),
        b"",
        GOOD[:-10],
        b"SSH-2.0-OpenSSH\r\n",
        slow,
        drip,
    ],
    ids=["500", "502", "503", "429", "closed", "cut", "other protocol", "slow", "drip"],
)
def test_what_may_pass_is_tried_again(fault, way):
    with Misbehaving([fault, fault, GOOD]) as server:
        hits = both(server)[way]()
        assert (hits[0][0].passage.id, hits[0][0].score) == ("1", 0.5)
        assert server.taken == 3


@pytest.mark.parametrize("way", [0, 1], ids=["sync", "async"])
def test_what_does_not_pass_is_unavailable_with_address_attempts_and_last_fault(way):
    with Misbehaving([response(503, b"a"), response(500, b'{"error": {"type": "t", "message": "boom"}}')]) as server:
        with pytest.raises(SearchUnavailableError) as caught:
            both(server, retries=1)[way]()
        assert f"{server.url}/retrieve: no answer after 2 attempts; last fault: HTTP 500: t: boom" in str(caught.value)
    with pytest.raises(SearchUnavailableError, match=r"after 1 attempt; last fault: ConnectError"):
        both(server, retries=0)[way]()


@pytest.mark.parametrize("way", [0, 1], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>", "expected JSON, found '<html>'"),
        (b"\xff\xfe", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b"[]", "an object with a list 'result'"),
        (b'{"result": null}', "an object with a list 'result'"),
        (b'{"result": []}', "expected 1 results, one per query, found 0; .* set search.options.max_batch=1"),
        (b'{"result": [[{"text": "x", "score": true}]]}', "finite number"),
        (b'{"result": [[{"text": "x", "title": ["T"]}]]}', "field 'title': expected text or a whole number"),
        (b'{"result": [[], []]}', "expected 1 results, one per query, found 2"),
        (b'{"result": [null]}', r"result\[0\]: expected a list"),
        (b'{"result": [[3]]}', r"result\[0\]\[0\]: expected an object with 'document' or"),
        (b'{"result": [[{"document": {"id": "1", "title": "T"}, "score": 1}]]}', "'contents' or 'text', found"),
        (b'{"result": [[{"document": {"id": "1", "title": "T", "text": "x"}, "score": NaN}]]}', "finite number"),
        (b'{"result": [[{"document": {"id": "1", "title": "T", "text": "x"}, "score": "nan"}]]}', "finite number"),
        (b'{"result": [[{"document": 3}]]}', r"result\[0\]\[0\]: expected an object as 'document'"),
        (b'{"result": [[{"id": "1", "score": 0.5}]]}', "'contents' or 'text', found"),
        (b'{"error": "index not loaded"}', "answered with an error: 'index not loaded'"),
        (b'{"result": [[]], "error": {"message": "no index"}}', "answered with an error: .*no index"),
        (b'{"status": "failed"}', "an object with a list 'result'"),
        (b'{"result": [[{"id": "1", "text": "x"}, {"id": "1", "text": "y"}]]}', "'1' occurs twice with different"),
    ],
)
def test_a_malformed_answer_is_an_error_at_once_and_never_empty(body, message, way):
    with Misbehaving([response(200, body)]) as server:
        with pytest.raises(SearchError, match=message) as caught:
            both(server, timeout_s=5)[way]()
        assert not isinstance(caught.value, SearchUnavailableError)
        assert server.url in str(caught.value) and server.taken == 1


def test_a_refusal_is_not_tried_again():
    with (
        Misbehaving([response(400, b'{"error": {"type": "invalid_request", "message": "no"}}')]) as server,
        pytest.raises(SearchError, match="refused the request: HTTP 400: invalid_request: no"),
    ):
        both(server)[0]()


@pytest.mark.parametrize("value", ["1", "date"])
def test_retry_after_is_kept_to(value):
    header = "1" if value == "1" else formatdate(time.time() + 2, usegmt=True)
    with Misbehaving([response(503, b"", f"Retry-After: {header}"), GOOD]) as server:
        both(server)[0]()
        assert server.arrivals[1] - server.arrivals[0] > 0.8


def test_documents_with_contents_alone_are_understood():
    body = json.dumps({"result": [[{"document": {"id": 7, "contents": '"Emma"\nA novel.'}, "score": 2}]]}).encode()
    with Misbehaving([response(200, body)]) as server:
        passage = both(server)[0]()[0][0].passage
    assert (passage.id, passage.title, passage.text) == ("7", "Emma", "A novel.")


HASHED = f"text-{hashlib.blake2b(b'A novel.', digest_size=8).hexdigest()}"


@pytest.mark.parametrize(
    ("hits", "expected"),
    [
        ([{"document": {"id": 7, "contents": '"Emma"\nA novel.'}, "score": 2}], [("7", "Emma", "A novel.", 2.0)]),
        ([{"document": {"title": "Emma", "text": "A novel."}, "docid": "d9", "score": 1.5}],
         [("d9", "Emma", "A novel.", 1.5)]),
        ([{"document": {"title": "Emma", "text": "A novel."}, "docid": 9}], [("9", "Emma", "A novel.", 0.0)]),
        ([{"document": {"contents": "A novel."}, "id": "n", "score": None}], [("n", "", "A novel.", 0.0)]),
        ([{"id": 3.0, "contents": "A novel."}], [("3", "", "A novel.", 0.0)]),
        ([{"_id": "b", "title": None, "text": "A novel.", "score": 0.1}], [("b", "", "A novel.", 0.1)]),
        ([{"document": "A novel."}], [(HASHED, "", "A novel.", 0.0)]),
        ([{"document": {"id": None, "contents": "A novel."}}] * 2, [(HASHED, "", "A novel.", 0.0)]),
        ([{"document": {"id": "", "text": "A novel."}, "score": 1}], [(HASHED, "", "A novel.", 1.0)]),
        ([], []),
        ([{"id": str(rank), "text": "x", "score": 9 - rank} for rank in range(7)],
         [(str(rank), "", "x", 9.0 - rank) for rank in range(3)]),
        ([{"id": "a", "text": "x", "score": 2}, {"id": "a", "text": "x", "score": 1}, {"id": "b", "text": "x"}],
         [("a", "", "x", 2.0), ("b", "", "x", 0.0)]),
        (["A novel."], [(HASHED, "", "A novel.", 0.0)]),
        ([{"id": "1", "title": 1984, "text": "A novel.", "score": "0.5"}], [("1", "1984", "A novel.", 0.5)]),
    ],
)  # fmt: skip
def test_answers_of_other_services_are_understood(hits, expected):
    with Misbehaving([response(200, json.dumps({"result": [hits], "took": 3}).encode())]) as server:
        [found] = both(server)[0]()
    assert [(hit.passage.id, hit.passage.title, hit.passage.text, hit.score) for hit in found] == expected


def test_a_compressed_answer_is_read_and_a_broken_one_is_an_error():
    packed = gzip.compress(json.dumps({"result": [[HIT]]}).encode())
    with Misbehaving([response(200, packed, "Content-Encoding: gzip")] * 2) as server:
        assert [way()[0][0].passage.id for way in both(server)] == ["1", "1"]
    for way in (0, 1):
        with Misbehaving([response(200, b"not gzip", "Content-Encoding: gzip")]) as server:
            with pytest.raises(SearchError, match="malformed answer"):
                both(server)[way]()
            assert server.taken == 1


def test_a_redirect_is_an_error_that_names_where_it_leads():
    with (
        Misbehaving([response(307, b"", "Location: http://other:1/retrieve/")]) as server,
        pytest.raises(SearchRefusedError, match="redirects to http://other:1/retrieve/; give the address that answers"),
    ):
        both(server)[0]()


def test_a_service_that_refuses_many_queries_is_asked_fewer_at_once():
    requests = [SearchRequest(query=str(number)) for number in range(20)]
    with serving(EchoBackend()) as url:
        with pytest.raises(SearchRefusedError, match=r"held 20 queries; .* search\.options\.max_batch"):
            RetrievalClient(url).search(requests, 1)
        spec = SearchSpec(backend="service", url=url, options={"max_batch": 8})
        with open_search(spec) as backend:
            assert len(backend.search(requests, 1)) == 20


def test_contents_come_over_the_wire_as_the_corpus_holds_them():
    passages = [Passage.from_contents(str(i), text) for i, text in enumerate(['""Heroes""\nx', "one line", "Bare\nx"])]
    body = json.dumps(encode_hits([[Hit(passage=passage, score=1.0) for passage in passages]], with_scores=True))
    hits = decode_hits(json.loads(body), num_requests=1, topk=3)[0]
    assert [hit.passage for hit in hits] == passages


def test_long_lists_are_asked_in_parts_and_come_back_in_order():
    requests = [SearchRequest(query=str(i), history=("h",) * (i % 2)) for i in range(20)]
    with serving(EchoBackend()) as url:
        found = RetrievalClient(url, max_batch=8).search(requests, 1)
        assert [hits[0].passage.text.rpartition("|")[2] for hits in found] == [str(i) for i in range(20)]
        assert found[3][0].passage.text == "None|('h',)|3"
        assert RetrievalClient(url).search([], 3) == []
        assert RetrievalClient(f"{url}/retrieve").health()["status"] == "ok"
        assert RetrievalClient(url).fingerprint() == "echo"
        with pytest.raises(SearchError, match="topk of at least 1"):
            RetrievalClient(url).search(requests, 0)


def test_a_service_without_health_is_known_by_its_address():
    others = [response(404, b"{}"), response(501, b""), response(200, b"<html>"), response(200, b'{"status": "ok"}')]
    with Misbehaving([*others, response(401, b"{}")]) as server:
        for _ in others:
            assert RetrievalClient(server.url).fingerprint() == server.url
        with pytest.raises(SearchRefusedError, match="HTTP 401") as refused:
            RetrievalClient(server.url).fingerprint()
        assert refused.value.status == 401


def test_deep_searches_go_out_in_smaller_requests():
    requests = [SearchRequest(query=str(number)) for number in range(300)]
    batches = RetrievalClient("http://127.0.0.1:1")._batches(requests, 1000)
    assert [len(batch) for batch in batches] == [65, 65, 65, 65, 40]


def _ask(client, answers):
    answers.put(client.search(ONE, 1)[0][0].passage.text)


def test_one_client_serves_several_loops_threads_and_processes():
    with serving(EchoBackend()) as url:
        client = RetrievalClient(url)
        texts = [client.search(ONE, 1)[0][0].passage.text]
        texts += [asyncio.run(client.asearch(ONE, 1))[0][0].passage.text for _ in range(2)]
        thread = threading.Thread(target=lambda: texts.append(asyncio.run(client.asearch(ONE, 1))[0][0].passage.text))
        thread.start()
        thread.join()
        texts.append(pickle.loads(pickle.dumps(client)).search(ONE, 1)[0][0].passage.text)
        context = multiprocessing.get_context("fork")
        answers = context.Queue()
        child = context.Process(target=_ask, args=(client, answers))
        child.start()
        texts.append(answers.get(timeout=20))
        child.join()
        texts.append(client.search(ONE, 1)[0][0].passage.text)
        client.close()
        assert texts == ["None|()|q"] * 7


@pytest.mark.parametrize(
    ("url", "settings"),
    [("127.0.0.1:8000", {}), ("http://", {}), ("", {}), ("http://x:y", {}), ("http://x", {"retries": -1})],
)
def test_impossible_settings_are_refused(url, settings):
    with pytest.raises(ConfigError):
        RetrievalClient(url, **settings)
