"""Indexing: FlashRAG reads it as its own, it goes on where it stopped, it belongs to one corpus and one retriever."""

from __future__ import annotations

import json
import shutil

import faiss
import numpy as np
import pytest
import torch

from agentic_r_plugin.errors import (
    ConfigError,
    IndexMismatchError,
    ManifestMismatchError,
    OutputExistsError,
    RecordError,
)
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.dense import FaissBackend
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.search.indexing import faiss_files
from agentic_r_plugin.search.indexing import index as indexes
from agentic_r_plugin.search.indexing.faiss_files import open_index
from agentic_r_plugin.search.indexing.index import IndexConfig, read_manifest
from agentic_r_plugin.search.indexing.index import run as build_index
from tests.search.tiny_retriever import make_model, passage_numbers, write_corpus


def test_two_packages_of_faiss_in_one_folder_are_named_with_the_way_out(monkeypatch):
    def installed(*names: str):
        monkeypatch.setattr(faiss_files, "distributions", lambda name: [found for found in names if found == name])

    installed("faiss-gpu-cu12", "numpy")
    faiss_files.require_one_faiss()
    installed("faiss-cpu", "numpy", "faiss-gpu-cu12")
    with pytest.raises(ConfigError, match=r"faiss-cpu and faiss-gpu-cu12 .* pip uninstall faiss-cpu faiss-gpu-cu12"):
        faiss_files.require_one_faiss()


def config_for(out, corpus, retriever, **settings):
    return IndexConfig(
        corpus=str(corpus), retriever=str(retriever), out=str(out), precision="float32", shard_size=16, **settings
    )


def test_the_file_is_byte_for_byte_what_faiss_would_write(index_folder, corpus_file, model_folder, tmp_path):
    vectors = Retriever.load(model_folder, precision="float32").encode_passages(list(Corpus(corpus_file)))
    found = faiss.read_index(str(index_folder / "agentic_r_Flat.index"))
    assert (found.ntotal, found.d, found.metric_type) == (40, 32, faiss.METRIC_INNER_PRODUCT)
    np.testing.assert_allclose(found.reconstruct_n(0, 40), vectors, atol=1e-6)
    expected = faiss.IndexFlatIP(32)
    expected.add(found.reconstruct_n(0, 40))
    faiss.write_index(expected, str(tmp_path / "expected.index"))
    assert (tmp_path / "expected.index").read_bytes() == (index_folder / "agentic_r_Flat.index").read_bytes()


def test_a_finished_folder_holds_only_what_belongs_there(index_folder):
    assert sorted(path.name for path in index_folder.iterdir()) == [
        ".manifest.json",
        "agentic_r_Flat.index",
        "config.yaml",
        "corpus.json",
        "corpus_rows.npy",
        "manifest.json",
    ]
    manifest = read_manifest(index_folder)
    assert (manifest.rows, manifest.dim, manifest.metric) == (40, 32, "inner_product")
    assert manifest.retriever_record["formulation"] == "query"


def test_flashrags_own_retriever_finds_the_same_passages_in_our_index(index_folder, corpus_file, model_folder):
    from flashrag.retriever.retriever import DenseRetriever

    settings = {
        "retrieval_method": "agentic_r",
        "retrieval_topk": 5,
        "index_path": str(index_folder / "agentic_r_Flat.index"),
        "corpus_path": str(corpus_file),
        "save_retrieval_cache": False,
        "use_retrieval_cache": False,
        "retrieval_cache_path": None,
        "use_reranker": False,
        "retrieval_query_max_length": 64,
        "retrieval_pooling_method": "mean",
        "retrieval_use_fp16": False,
        "retrieval_batch_size": 8,
        "instruction": "",
        "retrieval_model_path": model_folder,
        "use_sentence_transformer": True,
        "faiss_gpu": False,
        "silent_retrieval": True,
    }
    queries = ["q1 q2 q3", "p4 p5"]
    theirs, their_scores = DenseRetriever(settings).batch_search(queries, num=5, return_score=True)
    ours = FaissBackend(index_folder, precision="float32").search([SearchRequest(query=q) for q in queries], 5)
    assert [[hit.passage.id for hit in hits] for hits in ours] == [[doc["id"] for doc in docs] for docs in theirs]
    np.testing.assert_allclose([[h.score for h in hits] for hits in ours], np.array(their_scores), atol=1e-5)


def test_an_interrupted_index_keeps_its_shards(tmp_path, corpus_file, model_folder, index_folder, monkeypatch):
    config = config_for(tmp_path / "index", corpus_file, model_folder)
    encode, calls = Retriever.encode_passages, []

    def fails_at_the_third(self, passages, **settings):
        calls.append(len(passages))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, passages, **settings)

    monkeypatch.setattr(Retriever, "encode_passages", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build_index(config)
    with pytest.raises(ConfigError, match="an unfinished index; go on with --resume"):
        FaissBackend(tmp_path / "index")
    with pytest.raises(OutputExistsError, match="pass --resume"):
        build_index(config)
    build_index(config, resume=True)
    assert calls == [16, 16, 8, 8]
    name = "agentic_r_Flat.index"
    assert (tmp_path / "index" / name).read_bytes() == (index_folder / name).read_bytes()
    build_index(config, resume=True)
    assert calls == [16, 16, 8, 8]


def test_unfinished_work_of_another_corpus_is_not_mixed_in(tmp_path, corpus_file, model_folder, monkeypatch):
    out = tmp_path / "index"
    monkeypatch.setattr(indexes, "write_index", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build_index(config_for(out, corpus_file, model_folder))
    other = write_corpus(tmp_path / "other.jsonl", seed=1)
    with pytest.raises(ManifestMismatchError, match="begun from something else: corpus was"):
        build_index(config_for(out, other, model_folder), resume=True)
    shutil.rmtree(out)
    monkeypatch.undo()
    build_index(config_for(out, corpus_file, model_folder))
    with pytest.raises(ManifestMismatchError, match="begun from something else: corpus was"):
        build_index(config_for(out, other, model_folder), resume=True)


def test_an_index_opens_only_with_its_own_corpus_and_retriever(index_folder, tmp_path, corpus_file):
    other_corpus = write_corpus(tmp_path / "other.jsonl", seed=1)
    with pytest.raises(IndexMismatchError, match=r"from corpus .*corpus\.jsonl .* not belong to corpus .*other\.jsonl"):
        FaissBackend(index_folder, corpus=other_corpus)
    other = make_model(tmp_path / "other", dim=32)
    changed = Retriever.load(other)
    with torch.no_grad():
        next(changed.model.parameters())[5] += 1
    changed.save(tmp_path / "changed")
    with pytest.raises(IndexMismatchError, match=r"built with retriever .* does not belong to retriever .*changed"):
        FaissBackend(index_folder, str(tmp_path / "changed"))
    with pytest.raises(IndexMismatchError, match="does not belong to retriever"):
        FaissBackend(index_folder, changed)
    same = FaissBackend(index_folder, other, corpus_file)
    assert same.fingerprint() == read_manifest(index_folder).fingerprint()


def test_a_retriever_of_another_formulation_is_another_retriever(index_folder, model_folder):
    retriever = Retriever.load(model_folder, formulation="question_query")
    with pytest.raises(IndexMismatchError, match=r"formulation query\) does not .*formulation question_query\)"):
        FaissBackend(index_folder, retriever)


def test_nothing_is_written_for_a_broken_corpus(tmp_path, model_folder):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": "a", "contents": "x"}\n{"id"\n')
    with pytest.raises(RecordError, match=r"broken\.jsonl:2"):
        build_index(config_for(tmp_path / "index", broken, model_folder))
    assert not (tmp_path / "index").exists()


def test_a_cut_index_file_is_an_error_and_not_a_crash(index_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(index_folder, copy)
    file = copy / "agentic_r_Flat.index"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(IndexMismatchError, match=r"expected 5165 bytes, found 5065; the index file was cut"):
        FaissBackend(copy)
    with pytest.raises(IndexMismatchError, match="faiss cannot read this index"):
        open_index(file, mapped=False)
    file.unlink()
    with pytest.raises(IndexMismatchError, match="the index file is missing"):
        FaissBackend(copy)
    (copy / "manifest.json").write_text(json.dumps({"schema": "index/1"}))
    with pytest.raises(RecordError, match=r"manifest\.json: missing field 'method'"):
        FaissBackend(copy)


def test_an_index_file_of_the_same_size_from_elsewhere_is_refused(index_folder, tmp_path, corpus_file):
    other = build_index(config_for(tmp_path / "other", corpus_file, make_model(tmp_path / "model", seed=3)))
    assert other.index_bytes == read_manifest(index_folder).index_bytes
    copy = tmp_path / "copy"
    shutil.copytree(index_folder, copy)
    shutil.copy(tmp_path / "other" / other.index_file, copy)
    with pytest.raises(IndexMismatchError, match="the index file was replaced"):
        FaissBackend(copy)


def test_a_retriever_that_pools_otherwise_is_another_retriever(index_folder, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*_Pooling/config.json")
    file.write_text(file.read_text().replace('"mean"', '"cls"'))
    with pytest.raises(IndexMismatchError, match="does not belong to retriever"):
        FaissBackend(index_folder, str(tmp_path / "model"))


def test_a_mapped_index_finds_the_same_as_one_in_memory(index_folder):
    requests = [SearchRequest(query=f"p{n}") for n in range(10)]
    mapped = FaissBackend(index_folder, mapped=True, precision="float32").search(requests, 4)
    assert mapped == FaissBackend(index_folder, precision="float32").search(requests, 4)


def test_more_passages_than_there_are_gives_each_once(index_folder):
    hits = FaissBackend(index_folder).search([SearchRequest(query="p1")], 1000)[0]
    assert sorted(hit.passage.id for hit in hits) == sorted(f"d{i}" for i in range(len(passage_numbers(40))))
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
