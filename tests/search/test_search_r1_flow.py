"""Search-R1's and FlashRAG's own files through our commands, and what we write through FlashRAG."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import faiss
import httpx
import numpy as np
import pytest
from flashrag.dataset import Dataset
from flashrag.retriever.index_builder import Index_Builder
from flashrag.retriever.retriever import DenseRetriever

from agentic_r_plugin import cli
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.records import Candidates, Trajectory
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.search.dense import FaissBackend
from agentic_r_plugin.search.indexing.index import read_manifest
from agentic_r_plugin.store import read_records
from tests.search.test_faults import service
from tests.search.tiny_retriever import write_corpus

ROWS = 400
QUERIES = ["p1 p2 p3", "p4 p5", "p7 p21"]
QUESTIONS = ["Where was the painter Mara Venn born?", "In which town was Ada Brook born?", "Who wrote Emma?"]
E5 = ["--passage-prompt", "passage: ", "--query-prompt", "query: ", "precision=float32", "device=cpu"]
AGENT = Path(__file__).parents[2] / "recipes" / "quickstart" / "agent"


def run(*arguments: object) -> None:
    assert cli.main(list(map(str, arguments))) == 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Search-R1's corpus: `id` and `contents`."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", count=ROWS)


@pytest.fixture(scope="module")
def built(corpus, model_folder, tmp_path_factory):
    """Kind -> the index file that FlashRAG's builder writes, as for E5."""
    files = {}
    for kind in ("Flat", "HNSW16"):
        out = tmp_path_factory.mktemp("flashrag")
        Index_Builder("e5", model_folder, str(corpus), str(out), 64, 64, False, pooling_method="mean",
                      faiss_type=kind).build_index()  # fmt: skip
        files[kind] = out / f"e5_{kind}.index"
    # FlashRAG cannot build an HNSW over vectors that are stored elsewhere; plain faiss does
    index = faiss.read_index(str(files["Flat"]))
    graph = faiss.IndexHNSWFlat(index.d, 16, faiss.METRIC_INNER_PRODUCT)
    graph.add(index.reconstruct_n(0, ROWS))
    files["HNSW of faiss"] = tmp_path_factory.mktemp("faiss") / "e5_HNSW16.index"
    faiss.write_index(graph, str(files["HNSW of faiss"]))
    return files


@pytest.fixture(scope="module")
def ours(corpus, model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("ours") / "index"
    run("index", f"corpus={corpus}", f"retriever={model_folder}", f"out={out}", *E5)
    return out


@pytest.fixture(scope="module")
def adopted(built, corpus, model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adopted")
    for kind, file in built.items():
        given = [f"corpus={corpus}", f"retriever={model_folder}", f"out={folder / kind}", *E5]
        run("index", "--adopt", file, *given)
    return folder


@pytest.mark.parametrize("kind", ["Flat", "HNSW16", "HNSW of faiss"])
def test_an_index_of_flashrags_builder_answers_as_our_own(kind, adopted, ours, built):
    found, expected = (
        FaissBackend(folder, precision="float32").search([SearchRequest(query=query) for query in QUERIES], 5)
        for folder in (adopted / kind, ours)
    )
    for one, other in zip(found, expected, strict=True):
        assert [hit.passage.id for hit in one] == [hit.passage.id for hit in other]
        np.testing.assert_allclose([hit.score for hit in one], [hit.score for hit in other], atol=1e-5)
    manifest = read_manifest(adopted / kind)
    assert (adopted / kind / manifest.index_file).resolve() == built[kind].resolve()


def test_flashrags_index_without_its_prefix_is_refused_and_the_prefix_named(
    built, corpus, model_folder, tmp_path, capsys
):
    given = [f"corpus={corpus}", f"retriever={model_folder}", f"out={tmp_path / 'out'}", "precision=float32"]
    assert cli.main(["index", "--adopt", str(built["Flat"]), *given]) == 1
    assert "all of them agree with passage_prompt='passage: '" in capsys.readouterr().err


@pytest.fixture
def train(tmp_path):
    """Questions as Search-R1's scripts write them, by `datasets`."""
    rows = [
        {
            "data_source": "nq",
            "prompt": [{"role": "user", "content": f"Answer the given question. Question: {question}\n"}],
            "ability": "fact-reasoning",
            "reward_model": {"style": "rule", "ground_truth": {"target": [question.split()[-1]]}},
            "extra_info": {"split": "train", "index": number},
        }
        for number, question in enumerate(QUESTIONS)
    ]
    (tmp_path / "toy").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "toy" / "test.parquet")
    return tmp_path / "toy" / "test.parquet"


def test_data_stages_and_evaluation_are_those_of_our_own_index(train, adopted, ours, tmp_path):
    for name, index in (("theirs", adopted / "Flat"), ("ours", ours)):
        log, given = tmp_path / f"{name}.json", ["protocol=compact", f"search.index={index}", "search.device=cpu"]
        search = {"role": "assistant", "tool_calls": [{"function": {"name": "s", "arguments": '{"query": "p4 p5"}'}}]}
        shown = {"role": "tool", "content": '[{"id": "d0"}]'}
        messages = [{"role": "user", "content": QUESTIONS[0]}, search, shown]
        log.write_text(json.dumps({"messages": [*messages, {"role": "assistant", "content": "p1"}]}))
        records = tmp_path / f"{name}.jsonl"
        run("convert", "trajectories", f"in={log}", f"out={records}", f"corpus={read_manifest(index).corpus}",
            f"questions={train}", "protocol=compact")  # fmt: skip
        run("candidates", f"in={records}", f"out={tmp_path / name}-candidates.jsonl", "topk=10", *given)
        run("evaluate", f"out={tmp_path / name}", f"data_dir={tmp_path}", "benchmarks=[toy]", f"agents.small={AGENT}",
            f"searches.index={index}", "resamples=10", "settings.agent.device=cpu",
            "settings.protocol=compact")  # fmt: skip
    (record,) = read_records(tmp_path / "theirs.jsonl", Trajectory)
    (query,) = read_records(tmp_path / "theirs-candidates.jsonl", Candidates)
    (other,) = read_records(tmp_path / "ours-candidates.jsonl", Candidates)
    assert record.id == "nq/train/0" and record.turns[0].passages[0].id == "d0" and len(query.passages) == 10
    assert [passage.id for passage in query.passages] == [passage.id for passage in other.passages]
    theirs, own = (
        list(read_records(tmp_path / name / "small-index-toy" / "per_question.jsonl", Trajectory))
        for name in ("theirs", "ours")
    )
    assert [item.id for item in theirs] == [f"nq/train/{number}" for number in range(3)]
    assert [item.text for item in theirs] == [item.text for item in own]
    assert any(passage for item in theirs for turn in item.turns for passage in turn.passages)


def test_search_r1s_own_request_gets_flashrags_passages_and_a_reload_switches(
    adopted, ours, built, corpus, model_folder, tmp_path
):
    settings = {
        "retrieval_method": "e5", "retrieval_topk": 3, "index_path": str(built["Flat"]), "corpus_path": str(corpus),
        "save_retrieval_cache": False, "use_retrieval_cache": False, "retrieval_cache_path": None,
        "use_reranker": False, "retrieval_query_max_length": 64, "retrieval_pooling_method": "mean",
        "retrieval_use_fp16": False, "retrieval_batch_size": 8, "instruction": None,
        "retrieval_model_path": str(Path(model_folder).parent / "transformer"), "use_sentence_transformer": False,
        "faiss_gpu": False, "silent_retrieval": True,
    }  # fmt: skip
    theirs, scores = DenseRetriever(settings).batch_search(QUERIES, num=3, return_score=True)
    with service(adopted / "Flat", tmp_path) as (url, _):
        payload = {"queries": QUERIES, "topk": 3, "return_scores": True}
        result = httpx.post(f"{url}/retrieve", json=payload, timeout=60).json()["result"]
        contents = [[item["document"]["contents"] for item in one] for one in result]
        assert contents == [[document["contents"] for document in one] for one in theirs]
        np.testing.assert_allclose([[item["score"] for item in one] for one in result], scores, atol=1e-2)
        client = RetrievalClient(url, retries=0)
        fingerprint = client.health()["fingerprint"]
        assert client.reload(str(ours)) != fingerprint == client.reload(str(adopted / "Flat"))


def test_questions_pass_between_flashrag_and_us(train, tmp_path):
    run("convert", "questions", f"in={train}", f"out={tmp_path / 'test.jsonl'}")
    read = Dataset(dataset_path=str(tmp_path / "test.jsonl"))
    assert [(item.id, item.question, item.golden_answers) for item in read] == [
        (f"nq/train/{number}", question, [question.split()[-1]]) for number, question in enumerate(QUESTIONS)
    ]
    read.update_output("pred", ["p1"] * 3)
    read.save(str(tmp_path / "intermediate_data.json"))
    assert list(read_questions(tmp_path / "intermediate_data.json")) == list(read_questions(train))
