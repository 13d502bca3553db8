"""The report on constructed data, and the forecast's arithmetic, against counts made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agentic_r_plugin import cost
from agentic_r_plugin.cli import main
from agentic_r_plugin.data.report import Tally
from agentic_r_plugin.records import Candidates, Correctness, Group, Relevance, ScoredPassage
from agentic_r_plugin.store import read_json, write_json, write_records


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four queries: a positive at the first level, a positive at the second, none relevant, none correct."""
    base = Candidates(
        id="", turn=1, question="Q", golden_answers=("x",), query="q", history=(), prefix="",
        passages=tuple(ScoredPassage(id=key, score=1.0) for key in "abc"),
    )  # fmt: skip
    turns = {"q0": 1, "q1": 1, "q2": 1, "q3": 2}
    scores = {"q0": (90, 30, 0), "q1": (90, 70, 0), "q2": (50, 40, 20), "q3": (61, 61, 60)}
    outcomes = {"q0": {"a": 1}, "q1": {"a": 0, "b": 1}, "q2": {}, "q3": {"a": 0, "b": 0, "c": 0}}
    write_records(tmp_path / "candidates.jsonl", [replace(base, id=key, turn=turn) for key, turn in turns.items()])
    write_records(
        tmp_path / "relevance.jsonl",
        [Relevance(id=key, turn=turns[key], scores=dict(zip("abc", of, strict=True))) for key, of in scores.items()],
    )
    write_records(
        tmp_path / "correctness.jsonl",
        [
            Correctness(id=key, turn=turns[key], passage_id=passage, em=em, answer=None, searches=0)
            for key, of in outcomes.items()
            for passage, em in of.items()
        ],
    )
    group = Group(id="q0", turn=1, question="Q", query="q", history=(), positive="a", negatives=("b",))
    write_records(tmp_path / "groups.jsonl", [group, replace(group, id="q1", positive="b", negatives=("c",))])
    write_json(
        tmp_path / "correctness.jsonl.report.json",
        {"dropped": {"relevance_below_threshold": 1}, "rollouts": 6, "pruned": 6, "seconds": 1.5},
    )
    write_json(tmp_path / "groups.jsonl.report.json", {"dropped": {"no_correct_candidate": 1}, "seconds": 0.5})
    return tmp_path


def test_a_level_whose_first_candidate_is_correct_counts_although_the_rest_was_pruned():
    tally = Tally()
    tied = {"a": 90, "b": 90, "c": 0}
    for correct in ({"a": 1}, {"a": 0}, {"a": 0, "b": 0}, {"a": 0, "b": 1}):
        tally.add(1, tied, correct, 0, 60)
    assert tally.first_level == {True: 2, False: 1}


def test_shares_distributions_agreement_and_drops_are_counted(data: Path, capsys: pytest.CaptureFixture):
    assert main(["data-report", "--data", str(data)]) == 0
    report = read_json(data / "data_report.json")
    assert (report["queries"], report["groups"], report["share_with_positive"]) == (4, 2, 0.5)
    assert report["share_with_positive_by_turn"] == {"1": 0.6667, "2": 0.0}
    assert report["best_relevance"] == {"0-20": 0, "21-40": 0, "41-60": 1, "61-80": 1, "81-100": 2}
    assert report["candidates"]["81-100"] == {"candidates": 2, "rolled_out": 2, "correct": 1, "share_correct": 0.5}
    assert report["candidates"]["61-80"] == {"candidates": 3, "rolled_out": 3, "correct": 1, "share_correct": 0.3333}
    assert report["candidates"]["0-20"] == {"candidates": 3, "rolled_out": 0, "correct": 0, "share_correct": None}
    assert report["agreement"] == {
        "most_relevant_is_correct": 0.3333, "of_queries": 3, "phi": None, "every_candidate_rolled_out": False,
    }  # fmt: skip
    assert report["dropped"] == {
        "correctness": {"relevance_below_threshold": 1}, "groups": {"no_correct_candidate": 1},
    }  # fmt: skip
    assert (report["cost"]["rollouts"], report["cost"]["seconds"], report["cost"]["per_query"]["pruned"]) == (6, 2, 1.5)
    text = (data / "data_report.md").read_text()
    assert "costs and dropped units are unknown: candidates, relevance." in text
    assert "50.0 % of the queries have a positive" in text and "over the candidates that pruning left" in text
    assert text.strip() == capsys.readouterr().out.strip()


def test_a_report_is_not_overwritten_and_candidates_must_be_there(data: Path, tmp_path: Path, capsys):
    assert main(["data-report", "--data", str(data)]) == 0
    assert main(["data-report", "--data", str(data)]) == 1
    assert "already exists" in capsys.readouterr().err
    assert main(["data-report", "--data", str(data), "--resume"]) == 0
    assert main(["data-report", "--data", str(tmp_path / "none")]) == 1
    assert "candidates.jsonl does not exist" in capsys.readouterr().err


def test_a_forecast_is_the_samples_mean_with_an_interval_over_its_batches():
    made = cost.forecast([(10, {"rollouts": 20, "seconds": 1.0}), (10, {"rollouts": 40, "seconds": 1.0})], 2000)
    assert made["expected"] == {"rollouts": 6000.0, "seconds": 200.0}
    spread = 1.96 * (2 * 2 * 10**2) ** 0.5 / 20 * 2000
    assert made["low"]["rollouts"] == pytest.approx(6000 - spread, abs=0.1)
    assert made["high"] == {"rollouts": pytest.approx(6000 + spread, abs=0.1), "seconds": 200.0}


def test_shares_are_given_where_their_counts_are():
    found = cost.summary({"cached_tokens": 30, "prompt_tokens": 120, "pruned": 5, "candidates": 20}, 10)
    assert (found["prefix_hit_rate"], found["pruned_share"], found["per_unit"]["prompt_tokens"]) == (0.25, 0.25, 12.0)
    assert "judge_prefix_hit_rate" not in found


def test_a_hit_rate_is_unknown_and_not_0_if_the_server_reports_no_cached_tokens():
    nothing = {"cached_tokens": 0, "prompt_tokens": 120, "cache_unknown_tokens": 120}
    assert cost.summary(nothing, 10)["prefix_hit_rate"] is None
    assert cost.summary(nothing | {"cache_unknown_tokens": 0}, 10)["prefix_hit_rate"] == 0.0
    assert cost.summary({"cached_tokens": 0, "prompt_tokens": 120}, 10)["prefix_hit_rate"] == 0.0  # earlier counts
    # vLLM leaves the count out where it is 0
    assert cost.summary(nothing | {"cached_tokens": 30, "cache_unknown_tokens": 90}, 10)["prefix_hit_rate"] == 0.25
    judged = {"judge_cached_tokens": 0, "judge_prompt_tokens": 9, "judge_cache_unknown_tokens": 9}
    assert cost.summary(judged, 1)["judge_prefix_hit_rate"] is None
