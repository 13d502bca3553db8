"""Hybrid search: BM25 and a dense retriever, or any two backends, fused by reciprocal rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agentic_r_plugin.backends import RerankSpec, SearchSpec, open_search, with_absolute_paths
from agentic_r_plugin.cli import main
from agentic_r_plugin.config import deciding
from agentic_r_plugin.errors import ConfigError, IndexMismatchError, SearchError
from agentic_r_plugin.search.backends import BM25Backend
from agentic_r_plugin.search.base import Hit, SearchRequest
from agentic_r_plugin.search.hybrid import HybridBackend, parts_of
from agentic_r_plugin.search.indexing.index import IndexConfig
from agentic_r_plugin.search.indexing.index import run as build_index
from agentic_r_plugin.search.service.server import share_of_machine
from agentic_r_plugin.store import read_json
from tests.search.tiny_retriever import make_reranker

REQUESTS = [SearchRequest(query="p3 p4", question="q3 q4"), SearchRequest(query="p7 q7 p1"), SearchRequest(query="zzz")]


@pytest.fixture
def spec(corpus_file: Path, index_folder: Path) -> SearchSpec:
    return SearchSpec(backend="hybrid", index=str(index_folder), corpus=str(corpus_file), device="cpu")


def ids(rows: Sequence[Sequence[Hit]]) -> list[list[str]]:
    return [[hit.passage.id for hit in row] for row in rows]


def fused_by_hand(lists: Sequence[Sequence[str]], k: float, weights: Sequence[float]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for weight, names in zip(weights, lists, strict=True):
        for rank, name in enumerate(names, start=1):
            scores[name] = scores.get(name, 0.0) + weight / (k + rank)
    return scores


@pytest.mark.parametrize(("k", "weights"), [(60.0, [1.0, 1.0]), (1.0, [0.5, 2.0])])
def test_scores_are_the_weighted_sums_of_reciprocal_ranks(spec: SearchSpec, k: float, weights: list[float]) -> None:
    found = []
    for backend in ("bm25", "faiss"):
        with open_search(replace(spec, backend=backend)) as part:
            found.append(ids(part.search(REQUESTS, 10)))
    with open_search(replace(spec, options={"k": k, "depth": 10, "weights": weights})) as hybrid:
        rows = hybrid.search(REQUESTS, 40)
        assert hybrid.search([], 3) == []
        with pytest.raises(SearchError, match="topk of at least 1"):
            hybrid.search(REQUESTS, 0)
        first = ids(hybrid.search(REQUESTS, 10))
    assert not found[0][2] and len(rows[2]) == 40  # no word in common: the dense part alone
    for number in range(3):
        wanted = fused_by_hand([found[0][number], found[1][number]], k, weights)
        order = sorted(wanted, key=lambda name: -wanted[name])
        assert first[number] == order[:10] and len({hit.passage.id for hit in rows[number]}) == len(rows[number])
    with open_search(replace(spec, options={"k": k, "depth": 40, "weights": weights})) as hybrid:
        [deep] = hybrid.search(REQUESTS[:1], 40)
        [shallow] = hybrid.search(REQUESTS[:1], 5)
    assert shallow == deep[:5] and [hit.score for hit in deep] == sorted((hit.score for hit in deep), reverse=True)


def test_each_part_gets_the_request_and_uses_its_own_formulation(
    spec: SearchSpec, model_folder: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "index")
    own = IndexConfig(
        corpus=spec.corpus, retriever=model_folder, out=out, precision="float32", formulation="question_reasoning_query"
    )
    build_index(own)
    plain = SearchRequest(query="p3 p4")
    asked = [plain, replace(plain, question="q9 q11"), replace(plain, question="q9 q11", reasoning="p1 p2")]
    with open_search(replace(spec, index=out)) as hybrid, open_search(spec) as other:
        assert isinstance(hybrid, HybridBackend) and hybrid.reads_reasoning and not other.reads_reasoning
        bm25, dense = (ids(part.search(asked, 40)) for part in hybrid.parts)
        assert bm25[0] == bm25[1] == bm25[2] and dense[0] != dense[1] != dense[2] != dense[0]
        for row, lists in zip(hybrid.search(asked, 40), zip(bm25, dense, strict=True), strict=True):
            assert {hit.passage.id: hit.score for hit in row} == pytest.approx(fused_by_hand(lists, 60, [1, 1]))


def write_corpus(file: Path, **passages: str) -> str:
    rows = [{"id": name, "contents": f'"{name}"\n{text}'} for name, text in passages.items()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_ties_go_to_the_part_that_is_named_first(tmp_path: Path) -> None:
    parts = [
        {"backend": "bm25", "corpus": write_corpus(tmp_path / f"{name}.jsonl", **{name: "A river."})} for name in "ba"
    ]
    for order in (parts, parts[::-1]):
        with open_search(SearchSpec(backend="hybrid", options={"parts": order})) as hybrid:
            [row] = hybrid.search([SearchRequest(query="river")], 5)
            assert [hit.passage.id for hit in row] == [Path(part["corpus"]).stem for part in order]
            assert row[0].score == row[1].score == 1 / 61
            assert [p and p.id for p in hybrid.documents(["a", "b", "c", "a"])] == ["a", "b", None, "a"]


def test_one_id_with_two_texts_is_an_error_and_not_one_passage(tmp_path: Path) -> None:
    files = [write_corpus(tmp_path / f"{n}.jsonl", same=f"A river {n}.") for n in ("north", "south")]
    spec = SearchSpec(backend="hybrid", options={"parts": [{"backend": "bm25", "corpus": file} for file in files]})
    with open_search(spec) as hybrid, pytest.raises(SearchError, match=r"'same' has different texts.*same corpus"):
        hybrid.search([SearchRequest(query="river")], 5)


def test_a_failed_part_fails_the_search(spec: SearchSpec) -> None:
    dead = {"backend": "service", "url": "http://127.0.0.1:9", "max_retries": 0}
    with (
        open_search(SearchSpec(**dead)) as service,
        open_search(replace(spec, backend="bm25")) as bm25,
        pytest.raises(SearchError, match=r"127\.0\.0\.1:9"),
    ):
        HybridBackend([bm25, service]).search(REQUESTS, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": [{"backend": "faiss"}]}, "at least two parts, found 1"),
        ({"weights": [1.0]}, "expected 2 weights above 0, one per part"),
        ({"weights": [1.0, 0.0]}, "expected 2 weights above 0"),
        ({"k": 0}, "expected k above 0"),
        ({"depth": 0}, "depth of at least 1"),
        ({"rank": 60}, "has no option 'rank'; it has parts, k, depth, weights"),
        ({"parts": ["bm25", "faiss"]}, "part 1: expected settings of a search .* found 'bm25'"),
        ({"parts": [{"backend": "bm25"}, {"idx": "x"}]}, "part 2: .*'idx'"),
        ({"parts": [{"backend": "bm25"}, {"backend": "hybrid"}]}, "part 2: is a hybrid itself"),
        ({"parts": [{"backend": "bm25"}, {"index": "elsewhere"}]}, "no part searches index"),
    ],
)
def test_settings_that_cannot_work_are_errors(spec: SearchSpec, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message), open_search(replace(spec, options=options)):
        pass


def test_a_part_takes_over_what_it_does_not_name(spec: SearchSpec, corpus_file: Path, tmp_path: Path) -> None:
    bm25, dense = parts_of(replace(spec, corpus="", batch_size=7))
    assert (bm25.backend, bm25.corpus) == ("bm25", str(corpus_file)) and dense.index == spec.index
    assert bm25.batch_size == dense.batch_size == 7
    other = write_corpus(tmp_path / "other.jsonl", a="Another river.")
    with pytest.raises(IndexMismatchError), open_search(replace(spec, corpus=other)):
        pass


def test_the_fingerprint_covers_every_part_and_the_fusion(spec: SearchSpec, tmp_path: Path) -> None:
    def printed(**options: object) -> str:
        with open_search(replace(spec, options=options)) as hybrid:
            return hybrid.fingerprint()

    parts = [{"backend": "bm25"}, {"backend": "faiss"}]
    found = [printed(), printed(k=5), printed(depth=7), printed(weights=[1, 2]), printed(parts=parts[::-1])]
    found.append(printed(parts=[{"backend": "bm25", "options": {"b": 0.5}}, parts[1]]))
    assert len(set(found)) == len(found)
    assert printed(parts=parts, depth=100) == found[0]


def test_on_resume_only_what_decides_the_result_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compared(**part: object) -> dict:
        return deciding(SearchSpec(backend="hybrid", options={"parts": [{"backend": "bm25"}, part], "k": 60}))

    assert compared(index="a", batch_size=8) == compared(index="b", options={"mapped": True})
    assert compared(options={"nprobe": 8}) != compared(options={"nprobe": 9})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").mkdir()
    ranked = {"model": "kept", "depth": 5}
    part = {"backend": "bm25", "corpus": "kept", "options": {"folder": "kept", "k1": 1.0}, "rerank": ranked}
    moved = with_absolute_paths(SearchSpec(backend="hybrid", options={"parts": [part, "x"], "k": 5})).options
    whole = str(tmp_path / "kept")
    made = part | {"corpus": whole, "options": {"folder": whole, "k1": 1.0}, "rerank": ranked | {"model": whole}}
    assert moved == {"parts": [made, "x"], "k": 5}


def test_workers_of_a_service_map_the_index_of_a_part(spec: SearchSpec) -> None:
    shared = share_of_machine(spec, 0, 2)
    bm25, dense = parts_of(shared)
    assert dense.options == {"mapped": True} and bm25.options == {} and dense.index == spec.index
    with open_search(shared) as one, open_search(spec) as other:
        assert one.search(REQUESTS, 5) == other.search(REQUESTS, 5) and one.fingerprint() == other.fingerprint()


def test_what_a_hybrid_found_is_ranked_again_as_of_any_search(spec: SearchSpec, tmp_path: Path) -> None:
    rerank = RerankSpec(model=make_reranker(tmp_path), depth=10, options={"precision": "float32"})
    with open_search(spec) as plain, open_search(replace(spec, rerank=rerank)) as both:
        first, again = ids(plain.search(REQUESTS, 40)), ids(both.search(REQUESTS, 40))
        for before, after in zip(first, again, strict=True):
            assert before[10:] == after[10:] and sorted(before[:10]) == sorted(after[:10]) and before != after
    part = {"backend": "faiss", "rerank": {"model": rerank.model, "depth": 10}}
    assert parts_of(replace(spec, rerank=rerank, options={"parts": [{"backend": "bm25"}, part]}))[0].rerank.on is False
    with open_search(replace(spec, options={"parts": [{"backend": "bm25"}, part]})) as of_part:
        assert of_part.fingerprint() != plain.fingerprint()
        assert ids(of_part.search(REQUESTS, 40)) != first


def test_coverage_searches_with_it_and_compares_its_options_on_resume(
    spec: SearchSpec, corpus_file: Path, tmp_path: Path, capsys
) -> None:
    questions = [{"id": "1", "question": "p3 p4", "golden_answers": ["p3"], "metadata": {"gold_doc_ids": ["d1"]}}]
    (tmp_path / "q.jsonl").write_text(json.dumps(questions[0]) + "\n")
    line = ["coverage", "--questions", str(tmp_path / "q.jsonl"), "--index", spec.index, "search.backend=hybrid"]
    assert main([*line, "--out", str(tmp_path / "out.jsonl"), "topk=[1,5]", "search.device=cpu"]) == 0
    with BM25Backend(corpus_file).corpus as corpus:
        assert read_json(tmp_path / "out.jsonl.report.json")["shares"]["corpus"]["gold"] == float("d1" in corpus)
    assert main([*line, "--out", str(tmp_path / "out.jsonl"), "--resume", "search.options.k=5"]) == 1
    assert "options" in capsys.readouterr().err
