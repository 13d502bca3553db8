"""The backends as `open_search` opens them."""

from __future__ import annotations

import pytest

from agentic_r_plugin.backends import SearchSpec, open_search
from agentic_r_plugin.errors import ConfigError, IndexMismatchError, SearchError
from agentic_r_plugin.search.backends import BM25Backend
from agentic_r_plugin.search.base import SearchRequest


def test_bm25_stems_both_sides_and_ranks_by_shared_words(tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(
        '{"id": "a", "contents": "\\"Rivers\\"\\nThe river was running north."}\n'
        '{"id": "b", "contents": "\\"Trains\\"\\nThe trains ran late."}\n'
        '{"id": "c", "contents": "\\"Bread\\"\\nBaking bread."}\n'
    )
    with open_search(SearchSpec(backend="bm25", corpus=str(corpus))) as backend:
        hits = backend.search([SearchRequest(query="run rivers"), SearchRequest(query="bake")], 2)
        assert [found[0].passage.id for found in hits] == ["a", "c"]
        assert hits[0][0].score > hits[0][1].score == 0.0
        no_words, unknown = backend.search([SearchRequest(query="the !"), SearchRequest(query="zebra")], 9)
        assert {hit.passage.id for hit in no_words} == {hit.passage.id for hit in unknown} == {"a", "b", "c"}
        assert all(hit.score == 0 for hit in no_words + unknown)
        assert backend.search([], 3) == []
        with pytest.raises(SearchError, match="topk of at least 1"):
            backend.search([SearchRequest(query="x")], 0)


def test_a_kept_bm25_index_is_mapped_and_finds_the_same(corpus_file, tmp_path, monkeypatch):
    spec = SearchSpec(backend="bm25", corpus=str(corpus_file), options={"folder": str(tmp_path / "bm25")})
    requests = [SearchRequest(query="p1 p2"), SearchRequest(query="p7 title 3"), SearchRequest(query="unknown")]
    with open_search(spec) as backend:
        expected = backend.search(requests, 5)
    monkeypatch.setattr(BM25Backend, "_tokens", _only_queries(BM25Backend._tokens))
    with open_search(spec) as backend:
        assert backend.search(requests, 5) == expected
    with (
        pytest.raises(IndexMismatchError, match="does not belong to corpus"),
        open_search(
            SearchSpec(backend="bm25", corpus=str(corpus_file), options={"folder": str(tmp_path / "bm25"), "k1": 1.2})
        ),
    ):
        pass


def _only_queries(tokens):
    def checked(self, texts):
        assert len(texts) == 3, "the corpus was read again"
        return tokens(self, texts)

    return checked


def test_faiss_opens_by_its_folder_alone(index_folder):
    with open_search(SearchSpec(index=str(index_folder), options={"precision": "float32"})) as backend:
        hits = backend.search([SearchRequest(query="p1 p2 p3")] * 2, 3)
        assert hits[0] == hits[1] and len(hits[0]) == 3
        assert backend.search([], 3) == []
        backend.close()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SearchSpec(), "needs 'index'"),
        (SearchSpec(backend="bm25"), "needs 'corpus'"),
        (SearchSpec(backend="service"), "needs 'url'"),
        (SearchSpec(index="x", options={"k1": 1}), "has no option 'k1'; it has precision, mapped, nprobe, ef_search"),
        (SearchSpec(backend="service", url="ftp://x"), "expected an address such as"),
        (SearchSpec(backend="service", url="http://x", options={"token_env": "NO_TOKEN"}), "NO_TOKEN is not set"),
        (SearchSpec(backend="sparse"), "'sparse'; registered: bm25, faiss, faiss_gpu, service, torch"),
    ],
)  # fmt: skip
def test_incomplete_settings_are_explained(spec, message):
    with pytest.raises(ConfigError, match=message), open_search(spec):
        pass
