"""Adopted indexes: same answers as an index of ours, nothing copied that can be linked, and what differs is refused."""

from __future__ import annotations

import json
import pickle
import shutil

import faiss
import numpy as np
import pytest
from safetensors.numpy import save_file

from agentic_r_plugin.cli import main
from agentic_r_plugin.errors import AgenticRError, ConfigError, IndexMismatchError
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.dense import FaissBackend, TorchBackend
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.search.indexing.adopt import FaissSource
from agentic_r_plugin.search.indexing.index import IndexConfig, read_manifest
from agentic_r_plugin.search.indexing.index import run as build_index
from tests.search.tiny_retriever import make_model, write_corpus

ROWS = 400
REQUESTS = [SearchRequest(query=f"p{n} p{n + 7}") for n in range(12)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", count=ROWS)


@pytest.fixture(scope="module")
def vectors(corpus, model_folder):
    return Retriever.load(model_folder, precision="float32").encode_passages(list(Corpus(corpus)))


@pytest.fixture(scope="module")
def ours(corpus, model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("ours") / "index"
    build_index(config(out, corpus, model_folder))
    return FaissBackend(out, precision="float32").search(REQUESTS, 5)


def config(out, corpus, retriever, *adopt, **settings):
    return IndexConfig(
        corpus=str(corpus),
        retriever=str(retriever),
        out=str(out),
        precision="float32",
        adopt=list(map(str, adopt)),
        **settings,
    )


def faiss_file(path, vectors, kind="Flat", metric=faiss.METRIC_INNER_PRODUCT):
    index = faiss.index_factory(vectors.shape[1], kind, metric)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(path))
    return path


def same(found, ours, atol=1e-5):
    assert [[hit.passage.id for hit in hits] for hits in found] == [[hit.passage.id for hit in hits] for hits in ours]
    scores = [[[hit.score for hit in hits] for hits in side] for side in (found, ours)]
    np.testing.assert_allclose(*scores, atol=atol)


@pytest.mark.parametrize("metric", [faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2])
@pytest.mark.parametrize("kind", ["Flat", "HNSW16", "IVF4,Flat"])
def test_an_index_of_faiss_is_linked_and_answers_as_our_own(
    kind, metric, vectors, corpus, model_folder, ours, tmp_path
):
    file = faiss_file(tmp_path / "theirs.index", vectors, kind, metric)
    manifest = build_index(config(tmp_path / "out", corpus, model_folder, file))
    assert (manifest.kind, manifest.rows, manifest.precision) == (kind, ROWS, None)
    linked = tmp_path / "out" / f"agentic_r_{kind}.index"
    assert linked.is_symlink() and linked.resolve() == file
    for mapped in (False, True):
        same(FaissBackend(tmp_path / "out", precision="float32", mapped=mapped).search(REQUESTS, 5), ours)
    if kind == "Flat":
        same(TorchBackend(tmp_path / "out", precision="float32", device="cpu").search(REQUESTS, 5), ours)
    again = build_index(config(tmp_path / "out", corpus, model_folder, file), resume=True)
    assert again == manifest == read_manifest(tmp_path / "out")


@pytest.mark.parametrize("kind", ["SQ8", "PQ8x4", "IVF4,PQ8x4", "OPQ8,IVF4,PQ8x4", "HNSW16,SQ8"])
def test_codes_of_few_bits_are_compared_with_the_codes_of_the_right_vectors(
    kind, vectors, corpus, model_folder, tmp_path
):
    build_index(config(tmp_path / "a", corpus, model_folder, faiss_file(tmp_path / "f", vectors, kind)))
    with pytest.raises(IndexMismatchError, match="sampled vectors are not those of their passages"):
        build_index(
            config(tmp_path / "b", corpus, model_folder, faiss_file(tmp_path / "g", vectors[::-1].copy(), kind))
        )


def test_parts_of_every_form_become_one_index(vectors, corpus, model_folder, ours, tmp_path):
    whole = faiss_file(tmp_path / "whole.index", vectors).read_bytes()
    for number, name in enumerate(("part_aa", "part_ab", "part_ac")):
        (tmp_path / name).write_bytes(whole[number * 20_000 : (number + 1) * 20_000])
    for number in range(12):  # part 10 follows part 9
        part = vectors[number * 40 : (number + 1) * 40]
        np.save(tmp_path / f"v{number}.npy", part.astype(np.float16))
        save_file({"vectors": part}, tmp_path / f"v{number}.safetensors")
        if len(part):
            faiss_file(tmp_path / f"f{number}.index", part)
    for number in range(10, 12):
        for suffix in ("npy", "safetensors"):
            (tmp_path / f"v{number}.{suffix}").unlink()
    trained = faiss.index_factory(32, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
    trained.train(vectors)
    for number in range(2):
        index = faiss.clone_index(trained)
        index.add(vectors[number * 200 : (number + 1) * 200])
        faiss.write_index(index, str(tmp_path / f"ivf{number}.index"))
    given = {
        "bytes": "part_*",
        "npy": "v*.npy",
        "safetensors": "v*.safetensors",
        "flat": "f*.index",
        "ivf": "ivf*.index",
    }
    for name, pattern in given.items():
        build_index(config(tmp_path / name, corpus, model_folder, tmp_path / pattern))
        found = FaissBackend(tmp_path / name, precision="float32").search(REQUESTS, 5)
        same(found, ours, 2e-3 if name == "npy" else 1e-5)
    for name in ("bytes", "safetensors", "flat"):
        assert (tmp_path / name / "agentic_r_Flat.index").read_bytes() == whole
    assert not (tmp_path / "bytes" / ".work").exists()


def test_a_matrix_becomes_the_kind_that_is_asked_for(vectors, corpus, model_folder, ours, tmp_path):
    np.save(tmp_path / "v.npy", vectors)
    manifest = build_index(config(tmp_path / "out", corpus, model_folder, tmp_path / "v.npy", kind="HNSW16"))
    assert manifest.kind == "HNSW16"
    same(FaissBackend(tmp_path / "out", precision="float32").search(REQUESTS, 5), ours)


def test_pickles_are_read_only_on_demand_and_in_the_order_of_their_ids(vectors, corpus, model_folder, ours, tmp_path):
    ids = [f"d{row}" for row in range(ROWS)]
    for number, rows in enumerate((range(399, 199, -1), range(200))):
        with (tmp_path / f"corpus.{number}.pkl").open("wb") as stream:
            pickle.dump((vectors[list(rows)], [ids[row] for row in rows]), stream)
    given = config(tmp_path / "out", corpus, model_folder, tmp_path / "corpus.*.pkl")
    with pytest.raises(ConfigError, match="runs code that it holds; allow_pickle=true"):
        build_index(given)
    build_index(config(tmp_path / "out", corpus, model_folder, tmp_path / "corpus.*.pkl", allow_pickle=True))
    same(FaissBackend(tmp_path / "out", precision="float32").search(REQUESTS, 5), ours)
    with pytest.raises(IndexMismatchError, match=r"expected a vector for each of the 400 passages .* found 200"):
        build_index(config(tmp_path / "b", corpus, model_folder, tmp_path / "corpus.0.pkl", allow_pickle=True))
    (tmp_path / "x.pkl").write_bytes(b"\x80nothing")
    with pytest.raises(IndexMismatchError, match=r"expected a pickle of \(vectors, ids\)"):
        build_index(config(tmp_path / "b", corpus, model_folder, tmp_path / "x.pkl", allow_pickle=True))


@pytest.mark.parametrize(
    "made_with",
    [
        {"passage_prompt": "passage: "},
        {"pooling": "cls"},
        {"title_form": "plain"},
        {"max_length": 5},
        {"passage_prompt": "passage: ", "pooling": "cls", "title_form": "text"},
    ],
    ids=str,
)
def test_settings_that_would_agree_are_named_and_then_accepted(made_with, corpus, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("agentic_r_plugin.search.indexing.adopt._LENGTHS", (5, 16, 64))
    build_index(config(tmp_path / "theirs", corpus, model_folder, **made_with))
    file = tmp_path / "theirs" / "agentic_r_Flat.index"
    with pytest.raises(IndexMismatchError, match="all of them agree with") as refused:
        build_index(config(tmp_path / "out", corpus, model_folder, file))
    named = str(refused.value).rpartition("agree with ")[2]
    assert named == " ".join(f"{key}={made_with[key]!r}" for key in sorted(made_with, key=ORDER.index))
    assert not (tmp_path / "out").exists()
    manifest = build_index(config(tmp_path / "out", corpus, model_folder, file, **made_with))
    assert manifest.title_form == made_with.get("title_form", "contents")
    FaissBackend(tmp_path / "out", precision="float32").close()


ORDER = ["title_form", "passage_prompt", "pooling", "max_length"]


def test_what_does_not_belong_is_refused_with_what_was_found(vectors, corpus, model_folder, tmp_path):
    def refused(file, match, *, retriever=model_folder, corpus=corpus, **settings):
        with pytest.raises(AgenticRError, match=match):
            build_index(config(tmp_path / "out", corpus, retriever, file, **settings))
        assert not (tmp_path / "out").exists()

    good = faiss_file(tmp_path / "good", vectors)
    refused(faiss_file(tmp_path / "rows", vectors[:-1]), "holds 399 vectors, and corpus .* 400 passages")
    wider = np.hstack([vectors, vectors])
    refused(faiss_file(tmp_path / "dim", wider), "vectors of 64 dimensions, and retriever .* 32: it was made with")
    refused(good, "another model or from another corpus", retriever=make_model(tmp_path / "other", seed=5))
    refused(good, "another corpus or order", corpus=write_corpus(tmp_path / "other.jsonl", ROWS, seed=3))
    shifted = faiss_file(tmp_path / "order", np.roll(vectors, 1, axis=0))
    refused(shifted, r"order of lines \(line 0 is nearest to row 1, .* counted from 0\)")
    refused(faiss_file(tmp_path / "long", 2 * vectors), "have 2.000 times the length that retriever")
    refused(faiss_file(tmp_path / "l1", vectors, metric=faiss.METRIC_L1), "found metric 2 of faiss")
    refused(faiss_file(tmp_path / "pqfs", vectors, "PQ8x4fs"), "expected a Flat, SQ or PQ index, .* IndexPQFastScan")
    refused(good, "which kind=HNSW16 cannot change", kind="HNSW16")
    cut = tmp_path / "cut"
    cut.write_bytes(good.read_bytes()[:-100])
    refused(cut, "faiss cannot read this index")
    (tmp_path / "part_a").write_bytes(good.read_bytes()[:9000])
    (tmp_path / "part_b").write_bytes(good.read_bytes()[9000:-100])
    refused(tmp_path / "part_*", r"part_a and 1 more, joined in this order: .*faiss cannot read this index")
    refused(faiss_file(tmp_path / "pca", vectors, "PCA16,HNSW16"), "faiss cannot encode for kind PCAMatrix,HNSW16")
    for number, part in enumerate((vectors[:200], wider[200:])):
        with (tmp_path / f"{number}.pkl").open("wb") as stream:
            pickle.dump((part, [f"d{row}" for row in range(200 * number, 200 * number + 200)]), stream)
    refused(tmp_path / "?.pkl", r"vectors of different dimensions: \[32, 64\]", allow_pickle=True)
    np.save(tmp_path / "flat.npy", vectors.ravel())
    refused(tmp_path / "flat.npy", r"expected a matrix of floats \(rows, dimension\), found shape \(12800,\)")
    save_file({"a": vectors, "b": vectors}, tmp_path / "two.safetensors")
    refused(tmp_path / "two.safetensors", "expected one matrix, found 2: a, b")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "flat.npy").read_bytes()[:200])
    refused(tmp_path / "cut.npy", "not a whole .npy file")
    refused(tmp_path / "nothing*", "no such file")
    refused(tmp_path, "is a folder; expected files of faiss")
    faiss_file(tmp_path / "h0", vectors[:200], "HNSW16"), faiss_file(tmp_path / "h1", vectors[200:], "HNSW16")
    refused(tmp_path / "h[01]", "graphs of several indexes cannot be joined")
    faiss_file(tmp_path / "i0", vectors[:200], "IVF4,Flat"), faiss_file(tmp_path / "i1", vectors[200:], "IVF4,Flat")
    refused(tmp_path / "i[01]", "their lists have different centroids")


def test_the_original_is_never_deleted(vectors, tmp_path):
    file = faiss_file(tmp_path / "agentic_r_Flat.index", vectors)
    before = file.read_bytes()
    FaissSource(faiss.read_index(str(file)), file, name="x").write(file, 1)
    assert file.read_bytes() == before and not file.is_symlink()


def test_a_moved_original_is_an_error_that_says_how_to_link_again(vectors, corpus, model_folder, tmp_path, capsys):
    file = faiss_file(tmp_path / "theirs.index", vectors)
    flags = ["--corpus", corpus, "--retriever", model_folder, "--out", tmp_path / "out", "--adopt", file]
    assert main(["index", *map(str, flags)]) == 0
    shutil.move(file, tmp_path / "moved.index")
    with pytest.raises(IndexMismatchError, match=r"theirs.index was moved or deleted; .* ln -sfn NEW"):
        FaissBackend(tmp_path / "out")
    link = tmp_path / "out" / "agentic_r_Flat.index"
    link.unlink()
    link.symlink_to(faiss_file(tmp_path / "wrong.index", vectors[::-1].copy()))
    with pytest.raises(IndexMismatchError, match="the index file was replaced"):
        FaissBackend(tmp_path / "out")
    link.unlink()
    link.symlink_to(tmp_path / "moved.index")
    FaissBackend(tmp_path / "out").close()


def test_an_adopted_index_has_the_fingerprint_of_its_vectors(vectors, corpus, model_folder, tmp_path):
    first = build_index(config(tmp_path / "a", corpus, model_folder, faiss_file(tmp_path / "f", vectors)))
    noisy = vectors + 1e-3 * np.random.default_rng(0).standard_normal(vectors.shape).astype(np.float32)
    second = build_index(config(tmp_path / "b", corpus, model_folder, faiss_file(tmp_path / "g", noisy)))
    own = build_index(config(tmp_path / "c", corpus, model_folder))
    assert len({item.fingerprint() for item in (first, second, own)}) == 3
    saved = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert saved["adopted"] == first.adopted and first.adopted != second.adopted
