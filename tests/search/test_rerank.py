"""Reranking: what is scored, in which order it comes back, and that every search has it from the same place."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from agentic_r_plugin.backends import RerankSpec, SearchSpec, open_search, with_absolute_paths
from agentic_r_plugin.config import deciding, load_config
from agentic_r_plugin.errors import ConfigError, RecordError, SearchError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.base import Hit, SearchRequest
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.search.coverage import CoverageConfig
from agentic_r_plugin.search.cross_encoder import CrossEncoderReranker
from agentic_r_plugin.search.rerank import RerankedSearch
from agentic_r_plugin.search.service.server import ServeConfig, running_service
from agentic_r_plugin.store import read_json
from tests.search.loopback import LIMITS, EchoBackend, serving
from tests.search.tiny_retriever import make_model, make_reranker, query

REQUESTS = [SearchRequest(query=query((n, n + 1)), question=query((n + 2,))) for n in range(5)]


@pytest.fixture(scope="module")
def reranker_folder(tmp_path_factory) -> str:
    return make_reranker(tmp_path_factory.mktemp("reranker"), formulation="question_query")


def spec(index_folder: Path, **values: object) -> SearchSpec:
    given = {"index": str(index_folder), "device": "cpu", "options": {"precision": "float32"}}
    return load_config(SearchSpec, values=given | values)


def rerank(model: str, depth: int = 12) -> dict[str, object]:
    return {"model": model, "depth": depth, "options": {"precision": "float32"}}


class Backwards:
    """Scores the passages of `EchoBackend` by their number; equal scores for pairs of them where asked."""

    reads_reasoning = False

    def __init__(self, ties: bool = False) -> None:
        self.ties, self.asked, self.closed = ties, list[list[int]](), False

    def score(self, requests: Sequence[SearchRequest], passages: Sequence[Sequence[Passage]]) -> list[list[float]]:
        self.asked.append([len(row) for row in passages])
        return [[float(int(passage.id) // (1 + self.ties)) for passage in row] for row in passages]

    def fingerprint(self) -> str:
        return f"backwards {self.ties}"

    def close(self) -> None:
        self.closed = True


def ids(hits: Sequence[Hit]) -> str:
    return "".join(hit.passage.id for hit in hits)


def test_the_best_passages_are_ranked_again_and_the_others_follow():
    search = RerankedSearch(EchoBackend(), Backwards(), 4)
    asked = [SearchRequest(query="q")]
    assert [ids(search.search(asked, topk)[0]) for topk in (1, 3, 4, 7)] == ["3", "321", "3210", "3210456"]
    (hits,) = search.search(asked, 7)
    assert [hit.score for hit in hits] == pytest.approx([3, 2, 1, 0, -0.1, -0.2, -0.3])
    assert search.reranker.asked == [[4]] * 5
    assert ids(search.search(asked, 3, depth=6)[0]) == "543" and ids(search.search(asked, 20)[0]) == "3210456789"
    assert search.search([], 3) == []


def test_ties_keep_the_order_of_the_retriever():
    search = RerankedSearch(EchoBackend(), Backwards(ties=True), 6)
    assert ids(search.search([SearchRequest(query="q")], 6)[0]) == "452301"


def test_a_reranked_search_passes_on_what_its_parts_are():
    backend, other = EchoBackend(), Backwards()
    search = RerankedSearch(backend, other, 4)
    assert search.reads_reasoning and not search.depth_changes_order
    backend.reads_reasoning = False
    assert not RerankedSearch(backend, other, 4).reads_reasoning
    assert [found and found.text for found in search.documents(["7", "gone"])] == ["all of 7", None]
    prints = {
        RerankedSearch(backend, one, depth).fingerprint() for one in (other, Backwards(ties=True)) for depth in (4, 5)
    }
    assert len(prints) == 4 and backend.fingerprint() not in prints
    search.close()
    assert other.closed


@pytest.mark.parametrize(
    ("scores", "message"), [([1.0, float("nan")], "not a finite number"), ([1.0], "1 scores for 2")]
)
def test_a_reranker_without_a_score_for_every_passage_is_an_error(scores, message):
    broken = Backwards()
    broken.score = lambda requests, passages: [scores for _ in requests]
    with pytest.raises(SearchError, match=message):
        RerankedSearch(EchoBackend(), broken, 2).search([SearchRequest(query="q")], 1)
    with pytest.raises(SearchError, match="topk of at least 1, found 0"):
        RerankedSearch(EchoBackend(), Backwards(), 2).search([SearchRequest(query="q")], 0)


def test_without_a_reranker_a_search_is_the_backend_itself_and_its_settings_are_those_of_before(index_folder):
    plain = spec(index_folder)
    assert deciding(plain) == {"backend": "faiss", "options": {"precision": "float32"}}
    with open_search(plain) as search:
        assert type(search).__name__ == "FaissBackend"
    assert "rerank" not in deciding(spec(index_folder, rerank={"depth": 50}))
    on = deciding(spec(index_folder, rerank=rerank("m")))
    assert on["rerank"] == {"reranker": "cross_encoder", "depth": 12, "options": {"precision": "float32"}}


def test_a_cross_encoder_scores_its_own_text_of_a_pair_by_its_logits(index_folder, reranker_folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with open_search(spec(index_folder)) as search:
        retrieved = search.search(REQUESTS, 12)
    with open_search(spec(index_folder, rerank=rerank(reranker_folder))) as search:
        found = search.search(REQUESTS, 12)
        again = [search.search([request], 3)[0] for request in REQUESTS]
    tokenizer = AutoTokenizer.from_pretrained(reranker_folder)
    model = AutoModelForSequenceClassification.from_pretrained(reranker_folder).eval()
    moved = 0
    for request, before, after, alone in zip(REQUESTS, retrieved, found, again, strict=True):
        logits = {}
        for hit in before:
            text = f"{hit.passage.title}\n{hit.passage.text}"
            with torch.no_grad():
                pair = tokenizer(f"{request.question} [SEP] {request.query}", text, return_tensors="pt")
                logits[hit.passage.id] = float(model(**pair).logits)
        assert {hit.passage.id: hit.score for hit in after} == pytest.approx(logits, abs=1e-5)
        assert [hit.score for hit in after] == sorted((hit.score for hit in after), reverse=True)
        assert [hit.passage.id for hit in alone] == [hit.passage.id for hit in after[:3]]
        moved += [hit.passage.id for hit in before] != [hit.passage.id for hit in after]
    assert moved == len(REQUESTS)


def test_equal_passages_tie_exactly_and_long_texts_are_cut(reranker_folder):
    reranker = CrossEncoderReranker.load(reranker_folder, device="cpu", precision="float32", batch_size=2)
    same = [Passage(id=str(n), title="title", text="p1 p2 " * (1 if n < 5 else 9_000)) for n in range(7)]
    (scores,) = reranker.score(REQUESTS[:1], [same])
    assert len(set(scores[:5])) == 1 and len(set(scores[5:])) == 1
    assert len(reranker.passage_text(same[6])) == 16 * 64
    assert len(reranker.query_text(SearchRequest(query="q1 " * 9_000))) == 16 * 64
    assert reranker.score([], []) == [] and reranker.score(REQUESTS[:1], [[]]) == [[]]


def test_a_long_reasoning_costs_neither_the_query_nor_half_of_the_passage(reranker_folder):
    reranker = CrossEncoderReranker.load(reranker_folder, formulation="reasoning_query", device="cpu")
    text = reranker.query_text(SearchRequest(query="q1 q2", question="q3", reasoning="p1 p2 p3 " * 300))
    passage = reranker.passage_text(Passage(id="0", title="title", text="p4 " * 300))
    tokenizer = reranker.model.tokenizer
    pair = tokenizer(text, passage, truncation="longest_first", max_length=64)["input_ids"]
    words = tokenizer.convert_ids_to_tokens(pair)
    read = words[: words.index("[SEP]")]
    assert read[-2:] == ["q1", "q2"] and read.count("p1") + read.count("p2") + read.count("p3") > 20
    assert 28 < words.count("p4") <= 31


def test_a_reranker_reads_what_its_checkpoint_records_unless_options_say_otherwise(tmp_path, reranker_folder):
    def opened(model: str, **options: object) -> CrossEncoderReranker:
        values = {"device": "cpu", "rerank": {"model": model, "options": options}}
        return CrossEncoderReranker.from_spec(load_config(SearchSpec, values=values))

    recorded, plain = opened(reranker_folder), opened(make_reranker(tmp_path))
    assert recorded.query_text(REQUESTS[0]) == "q2 [SEP] q0 q1" and plain.query_text(REQUESTS[0]) == "q0 q1"
    assert (recorded.record.max_length, recorded.reads_reasoning) == (64, False)
    other = opened(reranker_folder, formulation="reasoning_query", max_length=20)
    assert other.reads_reasoning and other.record.max_length == 20
    assert len({one.fingerprint() for one in (recorded, plain, other)}) == 3
    for options, message in (
        ({"formulation": "questoin"}, "unknown query_formulation 'questoin'"),
        ({"modle": 1}, "reranker cross_encoder: .*modle"),
        ({"precision": "float8"}, "precision 'float8'"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened(reranker_folder, **options)


def test_what_is_no_reranker_is_refused_when_the_search_is_opened(tmp_path, index_folder, model_folder):
    with pytest.raises(ConfigError, match=r"is no cross-encoder \(SentenceTransformer\)"):
        open_search(spec(index_folder, rerank=rerank(model_folder))).__enter__()
    bare = Path(make_model(tmp_path / "bare")).parent / "transformer"
    with pytest.raises(ConfigError, match=r"is no cross-encoder \(BertModel\)"):
        open_search(spec(index_folder, rerank=rerank(str(bare)))).__enter__()
    with pytest.raises(ConfigError, match="unknown reranker 'theirs'; registered: cross_encoder"):
        open_search(spec(index_folder, rerank={"reranker": "theirs"})).__enter__()
    with pytest.raises(ConfigError, match=r"rerank\.depth: expected at least 1, found 0"):
        RerankSpec(model="m", depth=0)
    broken = Path(make_reranker(tmp_path / "broken"))
    (broken / "agentic_r.json").write_text('{"schema": "retriever/1"}')
    with pytest.raises(RecordError, match=r"agentic_r\.json: expected schema 'reranker/1', found 'retriever/1'"):
        open_search(spec(index_folder, rerank=rerank(str(broken)))).__enter__()


def test_paths_of_rerankers_are_made_absolute_and_coverage_keeps_them(tmp_path, monkeypatch):
    (tmp_path / "reranker").mkdir()
    monkeypatch.chdir(tmp_path)
    given = load_config(SearchSpec, values={"rerank": {"model": "reranker", "depth": 9}})
    assert with_absolute_paths(given).rerank == RerankSpec(model=str(tmp_path / "reranker"), depth=9)
    asked = CoverageConfig(questions="q", out="o", index="i", search=given).spec()
    assert (asked.index, asked.rerank) == ("i", given.rerank)


# --- the service


@pytest.fixture(scope="module")
def url():
    with serving(RerankedSearch(EchoBackend(), Backwards(), 6)) as address:
        yield address


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"topk": 3}, "543"),
        ({}, "54"),
        ({"topk_retrieval": 4, "topk_rerank": 3}, "321"),
        ({"topk_retrieval": 4}, "32"),
        ({"topk_rerank": 1, "topk": 9}, "5"),
        ({"topk_retrieval": 2, "topk_rerank": 5}, "10"),
        ({"topk_retrieval": 0, "topk_rerank": 3}, "543"),
        ({"topk_retrieval": None, "topk_rerank": None, "topk": 1}, "5"),
    ],
)
def test_search_r1s_rerank_requests_are_answered(url, fields, found):
    for _ in range(2):  # the second answer comes from the cache
        answer = httpx.post(f"{url}/retrieve", json={"queries": ["q"], "return_scores": True} | fields)
        assert answer.status_code == 200, answer.text
        (hits,) = answer.json()["result"]
        assert "".join(hit["document"]["id"] for hit in hits) == found
        assert [hit["score"] for hit in hits] == [float(number) for number in found]
        assert hits[0]["document"]["contents"] == f'"T{found[0]}"\nNone|()|q'
    bare = httpx.post(f"{url}/retrieve", json={"queries": ["q"]} | fields).json()["result"]
    assert "".join(document["id"] for document in bare[0]) == found


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ('{"queries": ["q"], "topk_retrieval": -1}', 400, "topk_retrieval: "),
        ('{"queries": ["q"], "topk_rerank": "3"}', 400, "topk_rerank: Input should be a valid integer, found str"),
        ('{"queries": ["q"], "topk_rerank": true}', 400, "topk_rerank"),
        ('{"queries": ["q"], "topk_rerank": [3]}', 400, "topk_rerank"),
        ('{"queries": ["q"], "topk_retrieval": 1.5}', 400, "topk_retrieval"),
        ('{"queries": ["q"], "topk_retrieval": 51}', 413, "topk_retrieval: Input should be less than or equal to 50"),
        (
            '{"queries": ["q"], "topk_rerank": 1' + "0" * 4000 + "}",
            413,
            "topk_rerank: Input should be less than or equal to 50",
        ),
        ('{"queries": ["a", "b", "c"], "topk_retrieval": 34}', 413, "3 queries of 34 passages"),
        ('{"topk_retrieval": 10, "topk_rerank": 3}', 400, "queries: Field required"),
    ],
)
def test_hostile_rerank_requests_get_typed_errors(url, body, status, message):
    answer = httpx.post(f"{url}/retrieve", content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == {400: "invalid_request", 413: "too_large"}[status] and message in error["message"]


def test_the_depth_of_the_service_counts_against_its_limit():
    with serving(RerankedSearch(EchoBackend(), Backwards(), 30), limits=replace(LIMITS, max_passages=100)) as url:
        answer = httpx.post(f"{url}/retrieve", json={"queries": list("abcd"), "topk": 1})
        assert (answer.status_code, answer.json()["error"]["type"]) == (413, "too_large")
        found = RetrievalClient(url, max_batch=3).search([SearchRequest(query=name) for name in "abcd"], 1)
    assert [ids(hits) for hits in found] == ["9"] * 4


def test_a_service_without_a_reranker_says_so():
    with serving(EchoBackend()) as url:
        answer = httpx.post(f"{url}/retrieve", json={"queries": ["q"], "topk_retrieval": 10, "topk_rerank": 3})
    assert answer.status_code == 400 and "this service has no reranker" in answer.json()["error"]["message"]


def test_serve_retrieves_reranks_and_shows(index_folder, reranker_folder, tmp_path):
    with open_search(spec(index_folder, rerank=rerank(reranker_folder))) as search:
        expected, own = search.search(REQUESTS, 3), search.fingerprint()
    values = {"index": str(index_folder), "port": 0, "device": "cpu", "options": {"precision": "float32"}}
    config = load_config(
        ServeConfig, values=values | {"allow_reload": True}, overrides=[
            f"rerank.model={reranker_folder}", "rerank.depth=12", "rerank.options.precision=float32",
        ],
    )  # fmt: skip
    with running_service(config) as url:
        client = RetrievalClient(url)
        found = client.search(REQUESTS, 3)
        body = {
            "queries": [request.query for request in REQUESTS],
            "questions": [request.question for request in REQUESTS],
            "topk_retrieval": 12,
            "topk_rerank": 3,
            "return_scores": True,
        }
        theirs = httpx.post(f"{url}/retrieve", json=body, timeout=30).json()["result"]
        assert client.health()["fingerprint"] == own
        assert client.reload(str(index_folder)) == own
        reloaded = client.search(REQUESTS, 3)
    for ours, again, wire, wanted in zip(found, reloaded, theirs, expected, strict=True):
        assert ids(ours) == ids(wanted) == ids(again) == "".join(hit["document"]["id"] for hit in wire)
        assert [hit.score for hit in ours] == pytest.approx([hit.score for hit in wanted], abs=1e-5)


def test_coverage_measures_what_the_reranker_ranks_first(index_folder, reranker_folder, corpus_file, tmp_path):
    from agentic_r_plugin.search import coverage

    questions = tmp_path / "questions.jsonl"
    lines = [
        {"id": str(n), "question": request.query, "golden_answers": ["x"], "metadata": {"gold_doc_ids": [f"d{n}"]}}
        for n, request in enumerate(REQUESTS)
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with open_search(spec(index_folder, rerank=rerank(reranker_folder))) as search:
        found = search.search([SearchRequest(query=request.query) for request in REQUESTS], 5)
    expected = [[hit.passage.id for hit in hits].index(f"d{n}") + 1 for n, hits in enumerate(found)
                if f"d{n}" in [hit.passage.id for hit in hits]]  # fmt: skip
    searching = load_config(SearchSpec, values={"index": str(index_folder), "device": "cpu",
                                                "options": {"precision": "float32"},
                                                "rerank": rerank(reranker_folder)})  # fmt: skip
    out = tmp_path / "coverage.jsonl"
    coverage.run(CoverageConfig(questions=str(questions), out=str(out), search=searching, topk=[5]))
    ranks = [rank for line in out.read_text().splitlines() for rank in json.loads(line)["gold_ranks"]]
    assert ranks == expected
    assert read_json(out.with_name("coverage.jsonl.report.json"))["questions"]["questions"] == len(REQUESTS)
