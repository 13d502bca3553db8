"""Metrics: equal to FlashRAG's where it has them, exact on hand-made trajectories where it has not."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import pytest
from flashrag.dataset import Dataset
from flashrag.evaluator import Evaluator
from flashrag.evaluator.metrics import BaseMetric, ExactMatch

from agentic_r_plugin.answers import normalize
from agentic_r_plugin.evaluation.metrics import recall_by_turn
from agentic_r_plugin.evaluation.pipeline import StrictEvaluator
from tests.evaluation.evaluation_toy import METRIC_NAMES, METRICS, flashrag_config

WORDS = ["the", "a", "an", "yes", "no", "noanswer", "None", "Paris", "paris.", "café", "CAFÉ", "İstanbul", "ǅ", "ﬁn"]
WORDS += ["Übermut", "o'Neil", "3,000", "3000", "–", "A.D.", "\u00a0", "\u2028", "naïve", "naïve"]


def dataset(config: Any, rows: list[dict[str, Any]]) -> Dataset:
    return Dataset(config, data=[{"id": str(i), "question": "?"} | row for i, row in enumerate(rows)])


def calculate(config: Any, name: str, data: Dataset) -> tuple[dict[str, Any], list[Any]]:
    return METRICS[name](config).calculate_metric(data)


def random_text(rng: random.Random) -> str:
    if rng.random() < 0.2:
        alphabet = string.printable + "äöüßéñçøÅİıςΣ—“”"
        return "".join(rng.choice(alphabet) for _ in range(rng.randrange(12)))
    return rng.choice([" ", "  ", "\t"]).join(rng.choice(WORDS) for _ in range(rng.randrange(5)))


def test_flashrags_evaluator_and_ours_agree_on_ten_thousand_random_pairs(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [text for text in (random_text(rng) for _ in range(50_000)) if normalize(text)]
    rows = [
        {"golden_answers": rng.sample(texts, rng.randrange(1, 4)), "output": {"pred": rng.choice(texts)}}
        for _ in range(10_000)
    ]
    theirs, ours = ("em", "f1", "acc"), ("agentic_em", "agentic_f1", "agentic_sub_em")
    config = flashrag_config(tmp_path, metrics=list(theirs))
    data = dataset(config, rows)
    expected = Evaluator(config).evaluate(data)
    found = StrictEvaluator(flashrag_config(tmp_path, metrics=list(ours))).evaluate(data)
    assert [found[name] for name in ours] == [expected[name] for name in theirs]
    for item in data:
        scores = item.output["metric_score"]
        assert [scores[name] for name in ours] == [scores[name] for name in theirs], (item.pred, item.golden_answers)
    assert 0.01 < expected["em"] < expected["acc"] < 1 and 0.05 < expected["f1"] < 1


def test_a_missing_answer_scores_nothing_even_where_gold_is_none(tmp_path: Path) -> None:
    config = flashrag_config(tmp_path)
    data = dataset(config, [{"golden_answers": ["None"], "output": {"pred": pred}} for pred in (None, "None")])
    assert calculate(config, "agentic_em", data) == ({"agentic_em": 0.5}, [0.0, 1.0])
    assert calculate(config, "agentic_f1", data) == ({"agentic_f1": 0.5}, [0.0, 1.0])
    assert calculate(config, "agentic_sub_em", data) == ({"agentic_sub_em": 0.5}, [0.0, 1.0])
    with pytest.raises(AttributeError):
        ExactMatch(config).calculate_metric(data)


def test_flashrags_evaluator_finds_every_metric_and_no_name_is_taken(tmp_path: Path) -> None:
    config = flashrag_config(tmp_path, metrics=list(METRIC_NAMES))
    evaluator = Evaluator(config)
    assert {name: type(evaluator.metric_class[name]) for name in METRIC_NAMES} == METRICS
    theirs = {cls.metric_name for cls in BaseMetric.__subclasses__() if cls.__module__.startswith("flashrag")}
    assert not theirs & set(METRIC_NAMES)


def answered(turns: list[list[str]], texts: list[list[str]], **extra: Any) -> dict[str, Any]:
    """Output of a question whose searches showed passages with these ids and texts."""
    record = {
        "turns": [
            {"turn": i + 1, "passages": [{"id": name, "score": 1.0} for name in row]} for i, row in enumerate(turns)
        ],
        "answer": "x",
        "malformed_turns": 0,
        "stop_reason": "answered",
        "generated_tokens": 10,
    } | extra
    docs = {str(i): {"query": "q", "docs": [{"contents": text} for text in row]} for i, row in enumerate(texts)}
    retrieved = [{"ids": [*row, "deep"], "answer_rank": 4 if "deep" in row else None} for row in turns]
    return {"pred": "x", "trajectory": record, "retrieval_results": docs, "retrieved": retrieved}


def rows() -> list[dict[str, Any]]:
    return [
        {
            "golden_answers": ["Rome"],
            "metadata": {"gold_doc_ids": ["1", "2"]},
            "output": answered([["1", "7", "8"], ["2", "7", "9"]], [["no", "no", "no"], ["no", "In Rome.", "no"]]),
        },
        {
            "golden_answers": ["Oslo"],
            "metadata": {"gold_doc_ids": ["3", "deep"]},
            "output": answered(
                [["3", "4", "5"]], [["Romeo", "no", "no"]], answer=None, malformed_turns=3, stop_reason="malformed"
            ),
        },
        {
            "golden_answers": ["yes"],
            "output": answered([], [], answer=None, stop_reason="search_failed", generated_tokens=40),
        },
    ]


@pytest.mark.parametrize(
    ("name", "result", "scores"),
    [
        ("search_turns", {"search_turns": 1.0}, [2.0, 1.0, 0.0]),
        ("answer_recall_at_3", {"answer_recall_at_3": 0.5, "answer_recall_at_3_per_turn": 1 / 3}, [1.0, 0.0, None]),
        ("gold_document_recall", {"gold_document_recall": 0.75, "gold_documents_complete": 0.5}, [1.0, 0.5, None]),
        (
            "gold_document_recall_at_20",
            {"gold_document_recall_at_20": 1.0, "gold_documents_complete_at_20": 1.0},
            [1.0, 1.0, None],
        ),
        ("malformed_share", {"malformed_share": 3 / 8}, [0.0, 0.75, 0.0]),
        ("generated_tokens", {"generated_tokens": 20.0}, [10.0, 10.0, 40.0]),
    ],
)
def test_metrics_of_hand_made_trajectories_are_exact(
    tmp_path: Path, name: str, result: dict[str, float], scores: list[float | None]
) -> None:
    config = flashrag_config(tmp_path)
    assert calculate(config, name, dataset(config, rows())) == (result, scores)


def test_a_turn_that_asks_for_one_search_too_many_is_a_turn_of_the_agent(tmp_path: Path) -> None:
    config = flashrag_config(tmp_path)
    ended = answered([["1"]], [["no"]], answer=None, malformed_turns=1, stop_reason="max_turns")
    found = calculate(config, "malformed_share", dataset(config, [{"golden_answers": ["x"], "output": ended}]))
    assert found == ({"malformed_share": 1 / 3}, [1 / 3])


def test_a_turn_of_several_calls_and_one_that_only_opens_are_each_one_turn(tmp_path: Path) -> None:
    # The agent's turns: three searches at once, a document opened, nothing well-formed, the answer.
    ended = answered([["1"], ["2"], ["3"]], [["no"]] * 3, malformed_turns=1, runs=[9, 5, 9, 5, 9, 5, 9])
    found = calculate(
        flashrag_config(tmp_path), "malformed_share",
        dataset(flashrag_config(tmp_path), [{"golden_answers": ["x"], "output": ended}]),
    )  # fmt: skip
    assert found == ({"malformed_share": 1 / 4}, [1 / 4])


@pytest.mark.parametrize("depth", [0, 5])
@pytest.mark.parametrize("name", ["answer_recall_at_20", "gold_document_recall_at_20"])
def test_recall_at_20_is_none_where_nobody_looked_at_20(tmp_path: Path, name: str, depth: int) -> None:
    config = flashrag_config(tmp_path, agentic_r={"depth": depth})
    means, scores = calculate(config, name, dataset(config, rows()))
    assert set(means.values()) == {None} and len(means) == 2 and scores == [None] * 3


def test_recalls_count_no_more_passages_than_their_names_say(tmp_path: Path) -> None:
    config = flashrag_config(tmp_path, agentic_r={"depth": 30, "topk": 5})
    output = answered([["1", "7", "8", "2", "9"]], [["no", "no", "no", "In Rome.", "no"]])
    output["retrieved"] = [{"ids": [str(i) for i in range(1, 31)], "answer_rank": 21}]
    row = {"golden_answers": ["Rome"], "metadata": {"gold_doc_ids": ["1", "2", "20", "21"]}, "output": output}
    found = {
        name: calculate(config, name, dataset(config, [row]))[0][name]
        for name in ("answer_recall_at_3", "answer_recall_at_20", "gold_document_recall", "gold_document_recall_at_20")
    }
    assert list(found.values()) == [0.0, 0.0, 0.25, 0.75]


def test_a_metric_without_any_question_to_speak_of_is_none(tmp_path: Path) -> None:
    config = flashrag_config(tmp_path)
    assert calculate(config, "gold_document_recall", dataset(config, rows()[2:]))[0]["gold_document_recall"] is None


def test_recall_by_turn_is_that_of_each_search_and_of_all_so_far(tmp_path: Path) -> None:
    first, second = recall_by_turn(dataset(flashrag_config(tmp_path), rows()))
    assert first == {
        "turn": 1,
        "num_questions": 2,
        "answer_recall": 0.0,
        "gold_document_recall": 0.5,
        "answer_recall_so_far": 0.0,
    }
    assert second == {
        "turn": 2,
        "num_questions": 1,
        "answer_recall": 1.0,
        "gold_document_recall": 0.5,
        "answer_recall_so_far": 0.5,
    }
