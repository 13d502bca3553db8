"""An index in Milvus, with the tiny retriever: milvus-lite in this process, and a Milvus server in another one."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from agentic_r_plugin import cli
from agentic_r_plugin.backends import SearchSpec, open_search
from agentic_r_plugin.config import fingerprint
from agentic_r_plugin.errors import (
    ConfigError,
    IndexMismatchError,
    ManifestMismatchError,
    SearchError,
    SearchUnavailableError,
    UpstreamError,
)
from agentic_r_plugin.records import Candidates, StopReason, Trajectory, Turn
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.search.dense import FaissBackend, TorchBackend
from agentic_r_plugin.search.indexing.index import IndexConfig, read_manifest
from agentic_r_plugin.search.indexing.index import run as build_index
from agentic_r_plugin.search.indexing.milvus import Collection, MilvusSettings
from agentic_r_plugin.search.milvus_backend import MilvusBackend
from agentic_r_plugin.search.service.server import ServeConfig, running_service
from agentic_r_plugin.storage.fingerprints import path_fingerprint
from agentic_r_plugin.store import read_json, read_records, write_records

pytest.importorskip("milvus_lite", reason="needs milvus-lite (pip install agentic-r-plugin[milvus-lite])")

REQUESTS = [SearchRequest(query=f"p{n} p{n + 1}") for n in range(12)]
FLOAT32 = {"precision": "float32"}
SECRET = "root:5ecretMilvus"


def prefix_of(out):
    """Prefix of the collection of `out`: tests that build the same index on one server do not share a collection."""
    return f"p{fingerprint(str(out))}"


def config_for(out, corpus, retriever, *, kind="Flat", adopt=(), **settings):
    return IndexConfig(
        corpus=str(corpus), retriever=str(retriever), out=str(out), precision="float32", shard_size=16, kind=kind,
        adopt=list(map(str, adopt)), milvus=MilvusSettings(**{"uri": "lite", "prefix": prefix_of(out)} | settings),
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Milvus 2.3.5, standalone: the package `milvus` holds its binary."""
    package = pytest.importorskip("milvus", reason="needs a Milvus server (pip install milvus; Linux on x86_64)")
    server = package.MilvusServer()
    server.set_base_dir(str(tmp_path_factory.mktemp("server")))
    server.start()
    server.config.resolve = lambda: None  # if it starts again, then at the same ports
    yield server
    server.stop()


@pytest.fixture(scope="module", params=["lite", "server"])
def uri(request):
    if request.param == "lite":
        return "lite"
    return f"http://127.0.0.1:{request.getfixturevalue('server').listen_port}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, corpus_file):
    """The corpus with metadata: whether its number is odd, and one that is too long for Milvus."""
    lines = [json.loads(line) for line in corpus_file.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["metadata"] = {"odd": number % 2 == 1} | ({"long": "x" * 70_000} if number == 3 else {})
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def flat(tmp_path_factory, corpus, model_folder, uri):
    out = tmp_path_factory.mktemp("milvus") / "flat"
    build_index(config_for(out, corpus, model_folder, uri=uri, fields=["id", "title", "metadata"]))
    return out


@pytest.fixture(scope="module")
def graph(tmp_path_factory, corpus, model_folder, index_folder, uri):
    return build_graph(tmp_path_factory.mktemp("milvus") / "graph", corpus, model_folder, index_folder, uri)


def build_graph(out, corpus, retriever, faiss_index, uri):
    """HNSW, from the vectors of the faiss index."""
    adopted, params = [faiss_index / "agentic_r_Flat.index"], {"M": 8, "efConstruction": 64}
    build_index(config_for(out, corpus, retriever, kind="hnsw", adopt=adopted, params=params, uri=uri))
    return out


def found(index, topk=7, **options):
    with open_search(SearchSpec(index=str(index), device="cpu", options=FLOAT32 | options)) as backend:
        return backend.search(REQUESTS, topk)


def ids(results):
    return [[hit.passage.id for hit in hits] for hits in results]


def test_an_index_in_milvus_is_searched_like_one_of_faiss(flat, index_folder):
    before = path_fingerprint(str(flat))
    ours, exact = found(flat), found(index_folder)
    assert [[hit.passage for hit in hits] for hits in ours] == [[hit.passage for hit in hits] for hits in exact]
    scores = [[[hit.score for hit in hits] for hits in results] for results in (ours, exact)]
    np.testing.assert_allclose(*scores, atol=1e-5)
    assert [len(hits) for hits in found(flat, topk=1000)] == [40] * 12
    manifest = read_manifest(flat)
    assert (manifest.kind, manifest.index_bytes, manifest.milvus["recall"]) == ("FLAT", None, 1.0)
    assert manifest.fingerprint() != replace(manifest, milvus=None, kind="Flat").fingerprint()
    assert [read_json(folder / "manifest.json")["schema"] for folder in (flat, index_folder)] == ["index/2", "index/1"]
    assert path_fingerprint(str(flat)) == before
    assert not (flat / ".work").exists() and not list(flat.glob("*.index"))


def test_the_vectors_of_a_faiss_index_are_taken_over_as_another_kind(graph, index_folder):
    assert ids(found(graph)) == ids(found(index_folder)) == ids(found(graph, params={"ef": 8}))
    manifest = read_manifest(graph)
    assert (manifest.kind, manifest.milvus["recall"]) == ("HNSW", 1.0) and manifest.adopted


def test_a_filter_leaves_only_passages_that_satisfy_it(flat):
    title = found(flat, topk=40, filter='title == "title 3"')[0]
    assert title and {hit.passage.title for hit in title} == {"title 3"}
    assert [sorted(hits) for hits in ids(found(flat, filter="id in ['d7', 'd9']"))] == [["d7", "d9"]] * 12
    odd = ids(found(flat, topk=40, filter='metadata["odd"] == true'))[0]
    assert sorted(odd) == sorted({f"d{number}" for number in range(1, 40, 2)} - {"d3"})  # its metadata is too long
    assert found(flat, filter="row < 0") == [[]] * 12
    whole, part = (SearchSpec(index=str(flat), options=FLOAT32 | given) for given in ({}, {"filter": "row < 9"}))
    with open_search(whole) as backend, open_search(part) as filtered:
        assert backend.fingerprint() == read_manifest(flat).fingerprint() != filtered.fingerprint()
    with pytest.raises(SearchError, match=r"Milvus at (/|http).*, collection p\w+: .*nonsense"):
        found(flat, filter="nonsense == 1")


KILLED = """
import os, signal, sys
from agentic_r_plugin import cli
from agentic_r_plugin.search.indexing.milvus import Collection

write, done = Collection.write, []

def write_and_die(self, rows, *, again):
    write(self, rows, again=again)
    done.append(rows)
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Collection.write = write_and_die
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_load_that_was_killed_goes_on_and_stores_no_row_twice(tmp_path, corpus, model_folder, flat, uri, monkeypatch):
    out = tmp_path / "index"
    given = ["index", "--corpus", corpus, "--retriever", model_folder, "--out", out, "--precision", "float32"]
    given += ["--shard-size", "16", f"milvus.uri={uri}", "milvus.fields=[title]", f"milvus.prefix={prefix_of(out)}"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, given)], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    note = read_json(out / ".manifest.json")["milvus"]
    assert (note["rows"], note["again"]) == (16, False)  # the second block was stored, but not noted
    written, write = [], Collection.write
    monkeypatch.setattr(
        Collection,
        "write",
        lambda self, rows, again: (written.append((len(rows), again)), write(self, rows, again=again)),
    )
    build_index(config_for(out, corpus, model_folder, uri=uri, fields=["title"]), resume=True)
    assert written == [(16, True), (8, True)]
    manifest = read_manifest(out)
    with Collection(manifest, out) as collection:
        assert collection.count() == 40
    assert ids(found(out)) == ids(found(flat)) and manifest.index_sample == read_manifest(flat).index_sample
    build_index(config_for(out, corpus, model_folder, uri=uri, fields=["title"]), resume=True)  # nothing is left to do
    assert len(written) == 2


def test_rows_that_a_server_lost_are_an_error_and_written_again(tmp_path, corpus, model_folder, uri, monkeypatch):
    out, write = tmp_path / "index", Collection.write
    monkeypatch.setattr(Collection, "write", lambda self, rows, again: write(self, rows[1:], again=again))
    with pytest.raises(SearchError, match="holds 37 rows, expected 40; --resume writes all of them again"):
        build_index(config_for(out, corpus, model_folder, uri=uri))
    monkeypatch.setattr(Collection, "write", write)
    build_index(config_for(out, corpus, model_folder, uri=uri), resume=True)
    assert read_manifest(out).milvus["recall"] == 1.0


def test_an_exact_kind_that_does_not_find_the_exact_top_is_an_error(tmp_path, corpus, model_folder, uri, monkeypatch):
    write = Collection.write

    def turned(self, rows, again):
        write(self, [row | {"vector": -row["vector"]} for row in rows], again=again)

    monkeypatch.setattr(Collection, "write", turned)
    with pytest.raises(UpstreamError, match=r"kind FLAT finds .* of what exact search finds"):
        build_index(config_for(tmp_path / "index", corpus, model_folder, uri=uri))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dim": 31}, r"expected dimensions \[31\], found \[32\]"),
        ({"rows": 41}, "expected rows 41, found 40"),
        ({"kind": "HNSW"}, "expected kind HNSW, found (FLAT|BRUTE_FORCE)"),
        ({"index_sample": "0" * 16}, r"expected vectors 0{16}, found \w+"),
    ],
)
def test_a_collection_that_is_not_the_indexs_own_is_refused(flat, changes, expected):
    with (
        Collection(replace(read_manifest(flat), **changes), flat) as collection,
        pytest.raises(IndexMismatchError, match=f"collection p.*: {expected}: it was changed or replaced"),
    ):
        collection.check()


def test_a_collection_with_another_metric_or_none_at_all_is_refused(tmp_path, corpus, model_folder, index_folder, uri):
    out = build_graph(tmp_path / "index", corpus, model_folder, index_folder, uri)
    with Collection(read_manifest(out), out) as collection:
        client = collection._client
        client.release_collection(collection.name)
        client.drop_index(collection.name, "vector")
        index = client.prepare_index_params()
        index.add_index("vector", index_type="HNSW", metric_type="L2", params={"M": 8, "efConstruction": 64})
        client.create_index(collection.name, index)
        with pytest.raises(IndexMismatchError, match="expected metric IP, found L2"):
            collection.check()
        client.drop_collection(collection.name)
    with pytest.raises(IndexMismatchError, match="no such collection; build the index again"):
        found(out)


def test_a_collection_of_somebody_else_is_not_written_to(tmp_path, corpus, model_folder, uri, flat):
    out = tmp_path / "index"
    out.mkdir()
    if uri == "lite":
        shutil.copytree(flat / "milvus.db", out / "milvus.db")
    (out / ".manifest.json").write_text((flat / ".manifest.json").read_text())
    note = read_json(out / ".manifest.json")
    del note["milvus"]
    (out / ".manifest.json").write_text(json.dumps(note))
    (out / ".work").mkdir()
    with pytest.raises(
        ManifestMismatchError, match=r"exists, and .* did not begin it; drop it, or choose another milvus.prefix"
    ):
        build_index(
            config_for(out, corpus, model_folder, uri=uri, prefix=prefix_of(flat), fields=["id", "title", "metadata"]),
            resume=True,
        )


def test_a_kind_that_the_server_does_not_know_is_refused_before_anything_is_encoded(
    tmp_path, corpus, model_folder, uri
):
    out = tmp_path / "index"
    expected = ": milvus-lite has FLAT, HNSW" if uri == "lite" else r", \{\}: Milvus at http.*invalid index type"
    with pytest.raises(ConfigError, match=f"index kind IVF_NONE{expected}"):
        build_index(config_for(out, corpus, model_folder, kind="IVF_NONE", uri=uri))
    assert not out.exists()


def test_a_collection_that_somebody_released_is_loaded_again(flat, index_folder):
    with closing(MilvusBackend(flat, **FLOAT32)) as backend:
        backend._collection._client.release_collection(backend._collection.name)
        assert ids(backend.search(REQUESTS, 7)) == ids(found(index_folder))


@pytest.mark.parametrize("uri", ["lite"], indirect=True)
def test_one_process_at_a_time_opens_milvus_lite(flat):
    with (flat / "milvus.db" / "LOCK").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ConfigError, match=r"another process has it open .* milvus-lite server --data-dir"):
            found(flat)
    assert len(found(flat)) == 12


def test_only_the_backend_milvus_opens_an_index_in_milvus(flat, index_folder, tmp_path):
    for backend in (FaissBackend, TorchBackend):
        with pytest.raises(
            IndexMismatchError, match=r"its vectors are in Milvus, not in a file; use search\.backend=milvus"
        ):
            backend(flat)
    with pytest.raises(ConfigError, match=r"its vectors are not in Milvus; leave search\.backend out"):
        MilvusBackend(index_folder)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"uri": "milvus.db"}, "expected an address such as http://HOST:19530, or lite"),
        ({"uri": f"http://{SECRET}@host:19530"}, "the address holds a password"),
        ({"uri": "lite", "token_env": SECRET}, "is not set"),
        ({"uri": "lite", "prefix": "a-b"}, "expected letters, digits and _"),
        ({"uri": "lite", "fields": ["text"]}, "'text': expected some of id, title, metadata"),
    ],
)
def test_settings_that_cannot_work_or_hold_a_secret_are_refused(settings, expected):
    with pytest.raises(ConfigError, match=expected) as raised:
        MilvusSettings(**settings)
    assert "5ecret" not in str(raised.value)


@pytest.fixture
def refusing_server():
    """A server that refuses every call, and says which token it was sent."""
    import base64

    import grpc

    class Refuse(grpc.GenericRpcHandler):
        def service(self, details):
            sent = dict(details.invocation_metadata).get("authorization", "")

            def refuse(request, context):
                token = base64.b64decode(sent).decode()
                context.abort(grpc.StatusCode.UNAUTHENTICATED, f"auth check failure, please check api key {token}")

            return grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Refuse()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop(None)


def test_the_token_comes_from_the_environment_and_is_in_no_file_or_message(
    flat, tmp_path, corpus, model_folder, refusing_server, monkeypatch, capsys
):
    monkeypatch.setenv("MILVUS_TOKEN", SECRET)
    options = {"uri": refusing_server, "token_env": "MILVUS_TOKEN"}
    with pytest.raises(
        ConfigError, match=r"the server refuses the token: .*UNAUTHENTICATED: auth check failure.*\*\*\*"
    ) as raised:
        found(flat, **options)
    assert "5ecret" not in str(raised.value) and raised.value.__cause__ is None
    with pytest.raises(ConfigError, match="refuses requests without a token"):
        found(flat, uri=refusing_server)
    with pytest.raises(ConfigError, match="NO_TOKEN is not set"):
        found(flat, token_env="NO_TOKEN")
    given = ["index", "--corpus", str(corpus), "--retriever", model_folder, "--out", str(tmp_path / "index")]
    assert cli.main([*given, f"milvus.uri={refusing_server}", "milvus.token_env=MILVUS_TOKEN"]) == 1
    assert not (tmp_path / "index").exists()
    build_index(config_for(tmp_path / "lite", corpus, model_folder, token_env="MILVUS_TOKEN"))
    for file in (tmp_path / "lite").rglob("*"):
        assert not file.is_file() or b"5ecret" not in file.read_bytes()
    shown = capsys.readouterr()
    assert "refuses the token" in shown.err and "5ecret" not in shown.err + shown.out


def test_a_server_that_is_down_is_said_to_be(flat):
    with pytest.raises(
        SearchUnavailableError, match=r"Milvus at http://127\.0\.0\.1:9, collection .*: no answer within 1 s"
    ):
        found(flat, uri="http://127.0.0.1:9", timeout_s=1.0)


def test_the_service_serves_it_and_switches_to_another_and_to_faiss(flat, graph, index_folder, uri):
    exact = ids(found(index_folder))
    workers = 1 if uri == "lite" else 2  # of a server, every worker has its own connection
    with running_service(
        ServeConfig(index=str(flat), port=0, allow_reload=True, options=FLOAT32, workers=workers)
    ) as url:
        client = RetrievalClient(url)
        assert (
            ids(client.search(REQUESTS, 7)) == exact
            and client.health()["fingerprint"] == read_manifest(flat).fingerprint()
        )
        for index in (graph, flat, flat, index_folder):
            assert client.reload(str(index)) == read_manifest(index).fingerprint()
            assert ids(client.search(REQUESTS, 7)) == exact
        assert client.documents(["d7", "none"])[0].title.startswith("title")


def test_candidates_and_coverage_take_the_index_folder(flat, index_folder, tmp_path):
    text = "<think>a</think><search> p1 p2 </search>"
    turn = Turn(turn=1, reasoning="a", query="p1 p2", passages=())
    trajectory = Trajectory(
        id="q", question="Which?", golden_answers=("p3",), turns=(turn,), answer=None, text=text, em=0, f1=0.0,
        stop_reason=StopReason.MAX_TURNS,
    )  # fmt: skip
    write_records(tmp_path / "t.jsonl", [trajectory])
    (tmp_path / "q.jsonl").write_text('{"id": "q", "question": "p1 p2", "golden_answers": ["p3"]}\n')
    for name, index in (("milvus", flat), ("faiss", index_folder)):
        command = ["candidates", "--in", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / f"{name}.jsonl"), "topk=9"]
        assert cli.main([*command, f"search.index={index}", "search.options.precision=float32"]) == 0
        asked = ["coverage", "--questions", str(tmp_path / "q.jsonl"), "--index", str(index), "topk=[5]"]
        assert cli.main([*asked, "--out", str(tmp_path / f"{name}-coverage.jsonl")]) == 0
    ours, theirs = (next(iter(read_records(tmp_path / f"{name}.jsonl", Candidates))) for name in ("milvus", "faiss"))
    assert [item.id for item in ours.passages] == [item.id for item in theirs.passages] and len(ours.passages) == 9
    same = [(tmp_path / f"{name}-coverage.jsonl").read_text() for name in ("milvus", "faiss")]
    assert same[0] == same[1]


@pytest.mark.parametrize("uri", ["server"], indirect=True)
def test_a_server_that_died_is_an_error_and_is_used_again_when_it_is_back(server, flat, index_folder):
    exact = ids(found(index_folder))
    with open_search(SearchSpec(index=str(flat), device="cpu", options=FLOAT32 | {"timeout_s": 30.0})) as backend:
        assert ids(backend.search(REQUESTS, 7)) == exact
        server.server_proc.kill()
        server.stop()
        with pytest.raises(SearchUnavailableError, match=r"collection p\w+: no answer within 30 s"):
            backend.search(REQUESTS, 7)
        server.start()
        assert ids(backend.search(REQUESTS, 7)) == exact
    assert ids(found(flat)) == exact
