"""Retrieval metrics of `coverage` on qrels, and the run that they are computed from: ranx itself, on tiny data."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from agentic_r_plugin.cli import main
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.search import ranked
from agentic_r_plugin.search.coverage import AnswerFinder, CoverageConfig
from agentic_r_plugin.store import read_json

pytest.importorskip("ranx", reason="needs the extra ranx")

DOCUMENTS = {
    "11": "---\ntitle: Ulm\n---\nThe river Danube runs through Ulm, Ulm, Ulm.",
    "12": "---\ntitle: Passau\n---\nThe river Danube and the Inn meet in Passau.",
    "13": "---\ntitle: Bread\n---\nBread is baked by bakers.",
    "14": "The river Nile.",
}
QUESTIONS = [
    ("q1", "Which river runs through Ulm?", "Danube", ["11"], ["11", "12"]),
    ("q2", "Who bakes bread?", "bakers", ["13"], ["13"]),
    ("q3", "xyzzy?", "Nile", ["14"], ["14", "11"]),
]


@pytest.fixture
def line(tmp_path: Path) -> list[str]:
    """BrowseComp-Plus' files: decrypted questions, corpus, and TREC qrels of evidence and of gold documents."""
    rows = [
        {"query_id": name, "query": query, "answer": answer,
         "gold_docs": [{"docid": d, "text": DOCUMENTS[d]} for d in gold],
         "evidence_docs": [{"docid": d, "text": DOCUMENTS[d]} for d in evidence], "negative_docs": []}
        for name, query, answer, gold, evidence in QUESTIONS
    ]  # fmt: skip
    corpus = [{"docid": name, "text": text, "url": f"https://{name}"} for name, text in DOCUMENTS.items()]
    for file, lines in (("decrypted", rows), ("corpus", corpus)):
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evidence = "q1 Q0 11 2\nq1 Q0 12 1\nq1 Q0 14 0\nq2 Q0 13 1\nq3 Q0 14 1\nq3 Q0 11 1\nq9 Q0 11 1\n"
    (tmp_path / "qrel_evidence.txt").write_text(evidence)
    (tmp_path / "qrel_golds.txt").write_text("q1 Q0 11 1\nq2 Q0 13 1\nq3 Q0 14 0\n")
    files = ["--questions", str(tmp_path / "decrypted.jsonl"), "--corpus", str(tmp_path / "corpus.jsonl")]
    return ["coverage", *files, "--out", str(tmp_path / "out.jsonl"), "search.backend=bm25", "topk=[1]"]


def test_metrics_are_those_of_the_formulas_over_the_judged_questions(line: list[str], tmp_path: Path, capsys) -> None:
    qrels = [f"qrels.{name}={tmp_path}/qrel_{name}{s}.txt" for name, s in (("evidence", ""), ("gold", "s"))]
    assert main([*line, *qrels, "metrics=[recall@1,recall@1000,ndcg@10]"]) == 0
    ranking = [row.split() for row in (tmp_path / "out.jsonl.run.trec").read_text().splitlines()]
    assert [(row[0], row[2], row[3], row[5]) for row in ranking] == [
        ("q1", "11", "1", "bm25"), ("q1", "14", "2", "bm25"), ("q1", "12", "3", "bm25"), ("q2", "13", "1", "bm25"),
    ]  # fmt: skip
    scores = read_json(tmp_path / "out.jsonl.scores.json")
    assert scores["id"] == ["q1", "q2", "q3"]
    assert scores["evidence recall@1"] == [0.5, 1.0, 0.0] and scores["evidence recall@1000"] == [1.0, 1.0, 0.0]
    assert scores["gold recall@1"] == [1.0, 1.0, None]  # q3 has no relevant document there
    ndcg = (2 + 1 / 2) / (2 + 1 / math.log2(3))
    assert scores["evidence ndcg@10"] == pytest.approx([ndcg, 1.0, 0.0])
    means = read_json(tmp_path / "out.jsonl.report.json")["retrieval"]
    assert means["gold"] == {"questions": 2, "recall@1": 1.0, "recall@1000": 1.0, "ndcg@10": 1.0}
    wanted = {"questions": 3, "recall@1": 0.5, "recall@1000": 2 / 3, "ndcg@10": (ndcg + 1) / 3}
    assert means["evidence"] == pytest.approx(wanted)
    text = capsys.readouterr().out
    assert "| qrels | questions | recall@1 | recall@1000 | ndcg@10 |" in text
    assert "| evidence | 3 | 50.0 % | 66.7 % | 65.0 % |" in text and "| gold | 2 | 100.0 % |" in text


def test_ndcg_is_that_of_the_ranking_with_linear_gains() -> None:
    qrels = {"b": {"x": 3, "y": 1, "z": 2}, "a": {"y": 1}, "empty": {"x": 1}}
    rankings = {"a": ["w", "x", "y"], "b": ["z", "w", "x"], "empty": []}
    found = ranked.scores(["ndcg@10", "recall@2"], qrels, rankings)
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert found["ndcg@10"] == pytest.approx([(2 + 3 / 2) / ideal, 1 / 2, 0.0])
    assert found["recall@2"] == pytest.approx([1 / 3, 0.0, 0.0])
    assert ranked.scores(["mrr"], {}, {}) == {"mrr": []}


def test_without_qrels_the_documents_that_the_questions_name_are_relevant(line: list[str], tmp_path: Path) -> None:
    assert main([*line, "metrics=[recall@2]"]) == 0
    means = read_json(tmp_path / "out.jsonl.report.json")["retrieval"]
    assert means == {"gold": {"questions": 3, "recall@2": pytest.approx(2 / 3)},
                     "evidence": {"questions": 3, "recall@2": 0.5}}  # fmt: skip


def test_the_search_is_as_deep_as_the_metrics_and_off_it_writes_what_it_always_wrote(
    line: list[str], tmp_path: Path
) -> None:
    files = {"questions": "q", "out": "o"}
    assert CoverageConfig(**files, topk=[3]).depth() == 3 and not CoverageConfig(**files).measured()
    assert CoverageConfig(**files, topk=[3], qrels={"gold": "g"}).depth() == 1000
    assert CoverageConfig(**files, topk=[30], metrics=["ndcg@10", "mrr"]).depth() == 30
    assert main(line) == 0
    assert sorted(path.name for path in tmp_path.glob("out*")) == [
        "out.jsonl", "out.jsonl.manifest.json", "out.jsonl.report.json", "out.jsonl.report.md",
    ]  # fmt: skip
    assert set(read_json(tmp_path / "out.jsonl.report.json")) == {"questions", "shares", "refused"}
    assert not {"qrels", "metrics"} & set(read_json(tmp_path / "out.jsonl.manifest.json")["made_from"])


def test_an_interrupted_run_goes_on_and_refuses_other_qrels(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    qrels = [f"qrels.gold={tmp_path}/qrel_golds.txt", "metrics=[recall@2]"]
    with monkeypatch.context() as patch:
        patch.setattr(ranked, "score_table", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*line, *qrels]) == 130
    assert main([*line, f"qrels.gold={tmp_path}/qrel_evidence.txt", "metrics=[recall@2]", "--resume"]) == 1
    assert "qrels gold was" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFinder, "find", lambda *_: pytest.fail("read the corpus again"))
        assert main([*line, *qrels, "--resume"]) == 0


def test_unknown_metrics_and_qrels_of_other_questions_are_errors_before_any_search(
    line: list[str], tmp_path: Path, capsys
) -> None:
    with pytest.raises(ConfigError, match="such as ndcg@10, found 'recal@5'"):
        ranked.check_metrics(["mrr", "recal@5"])
    (tmp_path / "other.txt").write_text("q9 0 11 1\n")
    assert main([*line, f"qrels.gold={tmp_path}/other.txt"]) == 1
    assert "other.txt: no question of" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
