"""Coverage: what the corpus holds and what the retriever finds of it, counted over the right questions."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentic_r_plugin.answers import contains_answer
from agentic_r_plugin.cli import main
from agentic_r_plugin.errors import SearchRefusedError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search import coverage
from agentic_r_plugin.search.base import Hit
from agentic_r_plugin.search.coverage import AnswerFinder
from agentic_r_plugin.store import read_json, read_records

CORPUS = [
    {"id": "nile", "contents": '"Nile"\nThe Nile is a river in Africa.'},
    {"id": "amazon", "contents": '"Amazon"\nThe Amazon is a river in Brazil.'},
    {"id": "bread", "contents": '"Bread"\nBread is baked by bakers.'},
]
QUESTIONS = [
    ("1", "Which river is in Africa?", ["Nile"], {"gold_doc_ids": ["nile"]}),
    ("2", "Which river is in Asia?", ["Ganges"], {"gold_doc_ids": ["ganges", "amazon"]}),
    ("3", "Is bread baked?", ["yes"], {"supporting_titles": ["Bread", "Cake"]}),
    ("4", "Which baked food is Brazilian, like the Amazon river?", ["bread"], {}),
]


@pytest.fixture
def arguments(tmp_path):
    rows = [{"id": i, "question": q, "golden_answers": a, "metadata": m} for i, q, a, m in QUESTIONS]
    for name, lines in (("corpus", CORPUS), ("questions", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--questions", str(tmp_path / "questions.jsonl"), "--corpus", str(tmp_path / "corpus.jsonl")]
    return ["coverage", *files, "--out", str(tmp_path / "out.jsonl"), "search.backend=bm25", "topk=[1,2]"]


def test_shares_are_counted_over_the_questions_they_say_something_about(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    records = list(read_records(tmp_path / "out.jsonl", coverage.Coverage))
    assert [item.answer_in_corpus for item in records] == [True, False, None, True]
    assert [(item.gold, item.gold_in_corpus) for item in records] == [(1, 1), (2, 1), (2, 1), (0, 0)]
    assert [item.answer_rank for item in records] == [1, None, None, 2]
    report = read_json(tmp_path / "out.jsonl.report.json")
    assert report["questions"] == {"questions": 4, "answer": 3, "gold": 3}
    assert report["shares"]["corpus"] == pytest.approx({"answer": 2 / 3, "gold": 2 / 3, "all_gold": 1 / 3})
    assert report["shares"]["top 1"]["answer"] == pytest.approx(1 / 3)
    assert report["shares"]["top 2"]["answer"] == pytest.approx(2 / 3)
    assert "| corpus | 66.7 % | 66.7 % | 33.3 % |" in capsys.readouterr().out
    assert not (tmp_path / "out.jsonl.work").exists()


def test_an_interrupted_run_goes_on_with_what_it_had_and_only_with_the_same_inputs(
    arguments, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(coverage, "find_ranks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(arguments) == 130
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFinder, "find", lambda *_: pytest.fail("read the corpus again"))
        assert main([*arguments, "topk=[5]", "--resume"]) == 1
        assert "begun from something else" in capsys.readouterr().err
        assert main([*arguments, "--resume"]) == 0
    assert main(arguments) == 1
    assert "already exists" in capsys.readouterr().err


def test_what_was_begun_on_fewer_questions_is_not_taken_for_all(arguments, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(coverage, "find_ranks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*arguments, "max_questions=1"]) == 130
    assert main([*arguments, "--resume"]) == 1
    assert "begun from something else" in capsys.readouterr().err


def test_a_service_does_not_say_where_its_corpus_lies(arguments, capsys):
    cut = [item for item in arguments if "corpus" not in item]
    assert main([*cut, "search.backend=service", "search.url=http://127.0.0.1:9"]) == 1
    assert "search backend 'service' names no corpus; set 'corpus'" in capsys.readouterr().err


WORDS = st.lists(st.sampled_from(["a", "the", "New", "York", "york.", "X-ray", "1", "City", "-", ""]), max_size=8)


@given(WORDS, st.lists(WORDS, max_size=3))
def test_the_finder_agrees_with_the_rule_of_answer_recall(text, answers):
    text, golden = " ".join(text), [" ".join(answer) for answer in answers]
    assert bool(AnswerFinder([golden]).find(text)) == contains_answer(text, golden)


class Refusing:
    """Finds the Nile; refuses batches with a question about what."""

    what = "bread"

    def search(self, requests, topk):
        if any(self.what in request.query for request in requests):
            raise SearchRefusedError("HTTP 413: too long", status=413)
        return [[Hit(passage=Passage.from_contents(**CORPUS[0]), score=1.0)] for _ in requests]

    def fingerprint(self):
        return "refusing"


def test_a_question_that_the_retriever_refuses_counts_as_not_found_and_is_named(
    arguments, tmp_path, monkeypatch, capsys
):
    search = Refusing()
    monkeypatch.setattr(coverage, "open_search", lambda spec: nullcontext(search))
    search.what = ""
    assert main(arguments) == 1
    assert "refused all 4 questions; first, 1: HTTP 413: too long" in capsys.readouterr().err
    search.what = "bread"
    assert main([*arguments, "--resume"]) == 0
    records = list(read_records(tmp_path / "out.jsonl", coverage.Coverage))
    assert [(item.answer_rank, item.gold_ranks) for item in records] == [(1, (1,)), (None, ()), (None, ()), (None, ())]
    assert read_json(tmp_path / "out.jsonl.report.json")["refused"] == {"3": "HTTP 413: too long"}
    text = (tmp_path / "out.jsonl.report.md").read_text()
    assert "1 questions were refused and count as not found: 3.\nFirst, 3: HTTP 413: too long" in text
    assert text in capsys.readouterr().out
