"""The backends as `open_search` opens them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from agentic_r_plugin.answers import tokens
from agentic_r_plugin.backends import SearchSpec, open_search
from agentic_r_plugin.config import fingerprint
from agentic_r_plugin.errors import ConfigError, IndexMismatchError, RecordError, SearchError
from agentic_r_plugin.search.backends import BM25Backend, cut_runs
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.store import write_json


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
        assert [len(found) for found in hits] == [1, 1] and hits[0][0].score > 0
        assert backend.search([SearchRequest(query=query) for query in ("the !", "zebra", "C", "")], 9) == [[]] * 4
        assert backend.search([], 3) == []
        with pytest.raises(SearchError, match="topk of at least 1"):
            backend.search([SearchRequest(query="x")], 0)


PASSAGES = {
    "libai": '"李白"\n李白是唐代诗人，出生于碎叶城。',
    "beijing": '"北京"\n北京是中国的首都。',
    "tokyo": '"東京"\n東京タワーは日本の首都にある。',
    "bangkok": '"กรุงเทพ"\nกรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย',
    "seoul": '"서울"\n서울은 대한민국의 수도이다.',
    "delhi": '"दिल्ली"\nदिल्ली भारत की राजधानी है।',
    "lhasa": '"ལྷ་ས།"\nལྷ་ས་ནི་བོད་ཀྱི་རྒྱལ་ས་ཡིན།',
    "london": '"London"\nThe capital of England.',
}


@pytest.mark.parametrize(
    ("query", "best", "found"),
    [
        ("李白出生在哪里？", "libai", 1),
        ("中国的首都是哪里？", "beijing", 2),
        ("東京タワーはどこですか", "tokyo", 1),
        ("เมืองหลวง", "bangkok", 1),
        ("서울에서", "seoul", 1),
        ("दिल्ली", "delhi", 1),
        ("བོད", "lhasa", 1),
        ("唐", "libai", 1),
        ("LONDON 在哪里", "london", 1),
        ("茶道", None, 0),
        ("it", None, 0),
    ],
)
def test_bm25_finds_words_of_scripts_without_spaces(tmp_path, query, best, found):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"id": key, "contents": text}) + "\n" for key, text in PASSAGES.items()))
    backend = BM25Backend(corpus)
    [hits] = backend.search([SearchRequest(query=query)], 8)
    assert (hits[0].passage.id if hits else None, len(hits)) == (best, found)
    assert all(hit.score > 0 for hit in hits)


def test_bm25_scores_of_text_with_spaces_are_those_of_bm25s_own_words(corpus_file):
    import bm25s
    import Stemmer

    corpus, stem = Corpus(corpus_file), Stemmer.Stemmer("english")
    plain = bm25s.BM25(k1=0.9, b=0.4)
    options = {"stopwords": "en", "stemmer": stem, "return_ids": False, "show_progress": False}
    plain.index(bm25s.tokenize([passage.contents for passage in corpus], **options), show_progress=False)
    queries = ["p1 p2", "p7 title 3", "the passage of p4"]
    rows, scores = plain.retrieve(bm25s.tokenize(queries, **options), k=len(corpus), show_progress=False)
    hits = BM25Backend(corpus_file).search([SearchRequest(query=query) for query in queries], len(corpus))
    assert [[(hit.passage.id, hit.score) for hit in found] for found in hits] == [
        [(corpus[row].id, score) for row, score in zip(*pair, strict=True) if score > 0]
        for pair in zip(rows.tolist(), scores.tolist(), strict=True)
    ]
    assert any(hits)


def test_a_bm25_index_of_other_rules_for_words_is_refused_and_a_corpus_without_words_too(corpus_file, tmp_path):
    folder = tmp_path / "bm25"
    BM25Backend(corpus_file, folder=str(folder)).close()
    write_json(folder / "bm25.json", fingerprint("bm25", Corpus(corpus_file).fingerprint(), 0.9, 0.4))
    with pytest.raises(IndexMismatchError, match="an earlier version built it with other rules for words; remove it"):
        BM25Backend(corpus_file, folder=str(folder))
    (tmp_path / "c.jsonl").write_text('{"id": "a", "contents": "it !"}\n')
    with pytest.raises(RecordError, match="no passage holds a word"):
        BM25Backend(tmp_path / "c.jsonl")


def test_a_vector_that_is_no_number_is_a_failed_search_and_not_an_empty_result(index_folder, monkeypatch):
    with open_search(SearchSpec(index=str(index_folder), options={"precision": "float32"})) as backend:
        broken = np.full((1, backend.manifest.dim), np.nan, np.float32)
        monkeypatch.setattr(backend.retriever, "encode_queries", lambda *_, **__: broken)
        with pytest.raises(SearchError, match="not a finite number"):
            backend.search([SearchRequest(query="x")], 3)


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
        (SearchSpec(backend="sparse"), "'sparse'; registered: bm25, faiss, faiss_gpu, hybrid, milvus, service, torch"),
    ],
)  # fmt: skip
def test_incomplete_settings_are_explained(spec, message):
    with pytest.raises(ConfigError, match=message), open_search(spec):
        pass


@pytest.mark.parametrize(
    "character", [*"\u0e01\u0e81\u0f40\u1000\u1050\u1780\u1100\u3131\uac00\u3042\u30a2\uff71\u3005\u6f22"]
)
def test_bm25_pairs_the_characters_that_answers_are_compared_by(character):
    assert cut_runs(character * 3) == f" {character * 2} {character * 2} "
    assert tokens(character * 3) == [character] * 3
