"""Contexts of HotpotQA, 2WikiMultihopQA and MuSiQue: a corpus, and questions whose gold documents are in it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from agentic_r_plugin import cli
from agentic_r_plugin.records import Question, text_id
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.coverage import Coverage
from agentic_r_plugin.store import read_json, read_records

ANN, OSLO = ["Ann", ["Ann was born in Oslo.", " She sings."]], ["Oslo", ["Oslo is a city."]]
LONG = ["Bob &amp; Co", [f"Bob sold {'many ' * 150}boats.", " He died in Ås."]]
HOTPOT = [
    {"_id": "a", "question": "Where was Ann born?", "answer": "Oslo", "type": "bridge", "level": "hard",
     "supporting_facts": [["Ann", 0], ["Ann", 1], ["Oslo", 0]], "context": [ANN, ["Eva", ["Eva paints."]], OSLO]},
    {"_id": "b", "question": "Where did Bob die?", "answer": "Ås", "type": "bridge", "level": "easy",
     "supporting_facts": [["Bob &amp; Co", 1]], "context": [LONG, ANN]},
]  # fmt: skip


def lists(row: dict) -> dict:
    """A row as the hub stores it: pairs as an object of two lists."""
    (facts, numbers), (titles, sentences) = (zip(*row[name], strict=True) for name in ("supporting_facts", "context"))
    return row | {
        "supporting_facts": {"title": list(facts), "sent_id": list(numbers)},
        "context": {"title": list(titles), "sentences": list(sentences)},
    }


def musique(row: dict) -> dict:
    supporting = {title for title, _ in row["supporting_facts"]}
    paragraphs = [
        {"idx": number, "title": title, "paragraph_text": " ".join(text.strip() for text in sentences),
         "is_supporting": title in supporting}
        for number, (title, sentences) in enumerate(row["context"])
    ]  # fmt: skip
    # another paragraph of a supporting article
    paragraphs.append({"idx": 9, "title": "Ann", "paragraph_text": "Ann retired.", "is_supporting": False})
    return {
        "id": row["_id"], "question": row["question"], "answer": row["answer"], "answer_aliases": [],
        "answerable": True, "paragraphs": paragraphs, "question_decomposition": [],
    }  # fmt: skip


def write(folder: Path, form: str) -> Path:
    if form == "original":
        (folder / "hotpot_dev.json").write_text(json.dumps(HOTPOT))
        return folder / "hotpot_dev.json"
    if form == "hub":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([lists(row) for row in HOTPOT]), folder / "dev.parquet")
        return folder / "dev.parquet"
    (folder / "musique.jsonl").write_text("".join(json.dumps(musique(row)) + "\n" for row in HOTPOT))
    return folder / "musique.jsonl"


def run(*arguments: object) -> None:
    assert cli.main(list(map(str, arguments))) == 0


@pytest.mark.parametrize("form", ["original", "hub", "musique"])
def test_a_set_converted_both_ways_is_covered_completely(tmp_path, form):
    file, corpus, questions = write(tmp_path, form), tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    run("convert", "corpus", f"in={file}", f"out={corpus}")
    expected = [("Ann", "Ann was born in Oslo. She sings."), ("Eva", "Eva paints."), ("Oslo", "Oslo is a city.")]
    expected += [("Ann", "Ann retired.")] if form == "musique" else []
    expected += [("Bob &amp; Co", f"Bob sold {'many ' * 150}boats. He died in Ås.")]
    with Corpus(corpus) as passages:
        assert [(passage.title, passage.text) for passage in passages] == expected
        assert all(passage.id == text_id(passage.contents) for passage in passages)
        by_title = {passage.title: passage.id for passage in passages if passage.text != "Ann retired."}
    run("convert", "questions", f"in={file}", f"corpus={corpus}", f"out={questions}")
    made = list(read_records(questions, Question))
    assert [item.metadata["gold_doc_ids"] for item in made] == [
        [by_title["Ann"], by_title["Oslo"]], [by_title["Bob &amp; Co"]]
    ]  # fmt: skip
    report = read_json(tmp_path / "questions.jsonl.report.json")
    assert report["gold_passages"] == {"by_id": 3, "by_text": 0, "not_found": 0} and report["gold_doc_ids"] == 2
    # by the questions as converted, and as they are, by title
    for name, given in (("ids", questions), ("titles", file)):
        out = tmp_path / f"{name}.jsonl"
        run("coverage", f"questions={given}", f"corpus={corpus}", f"out={out}", "search.backend=bm25", "topk=[3]")
        records = list(read_records(out, Coverage))
        assert [(item.gold, item.gold_in_corpus, item.answer_in_corpus) for item in records] == [
            (2, 2, True), (1, 1, True)
        ]  # fmt: skip
        assert read_json(tmp_path / f"{name}.jsonl.report.json")["shares"]["corpus"]["all_gold"] == 1.0


def test_the_paragraphs_are_found_in_another_corpus_by_text_and_a_missing_one_keeps_its_id(tmp_path):
    file, corpus, questions = write(tmp_path, "original"), tmp_path / "wiki.jsonl", tmp_path / "q.jsonl"
    rows = [("7", ANN), ("8", OSLO)]
    corpus.write_text("".join(
        json.dumps({"_id": name, "title": title, "text": "  ".join(text)}) + "\n" for name, (title, text) in rows
    ))  # fmt: skip
    run("convert", "questions", f"in={file}", f"corpus={corpus}", f"out={questions}")
    first, second = (item.metadata["gold_doc_ids"] for item in read_records(questions, Question))
    assert first == ["7", "8"]
    assert second == [text_id(f'"Bob &amp; Co"\nBob sold {"many " * 150}boats. He died in Ås.')]
    assert read_json(tmp_path / "q.jsonl.report.json")["gold_passages"] == {"by_id": 0, "by_text": 2, "not_found": 1}


def test_a_row_without_all_of_its_supporting_paragraphs_keeps_the_titles_alone(tmp_path):
    file, corpus, questions = tmp_path / "fullwiki.json", tmp_path / "c.jsonl", tmp_path / "q.jsonl"
    file.write_text(json.dumps([HOTPOT[0] | {"context": [ANN]}]))
    run("convert", "corpus", f"in={file}", f"out={corpus}")
    run("convert", "questions", f"in={file}", f"corpus={corpus}", f"out={questions}")
    (question,) = read_records(questions, Question)
    assert question.metadata == {"supporting_titles": ["Ann", "Oslo"], "type": "bridge", "level": "hard"}


def test_documents_of_browsecomp_plus_keep_their_ids(tmp_path):
    row = {"query_id": 7, "query": "Who?", "answer": "Ann", "gold_docs": [{"docid": 3, "text": "Ann."}],
           "evidence_docs": [{"docid": 3, "text": "Ann."}, {"docid": 4, "text": "---\ntitle: Eva\n---\nEva."}],
           "negative_docs": [{"docid": 5, "text": "Bob."}]}  # fmt: skip
    file, corpus = tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    file.write_text(json.dumps(row))
    run("convert", "corpus", f"in={file}", f"out={corpus}")
    with Corpus(corpus) as passages:
        assert [(item.id, item.title) for item in passages] == [("3", ""), ("4", "Eva"), ("5", "")]
        assert passages.by_id("4").text == "---\ntitle: Eva\n---\nEva."
