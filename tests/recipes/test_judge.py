"""The small judge: its pairs are labelled by the facts, and it is trained, measured and applied once."""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from agentic_r_plugin.errors import ManifestMismatchError
from agentic_r_plugin.store import read_json
from tests.search.tiny_retriever import make_model

RECIPE = Path(__file__).parents[2] / "recipes" / "judge" / "train.py"
WORLD = ["people=40", "works=20", "companies=8", "schools=8", "prizes=6", "towns=12", "rivers=6", "newspapers=0",
         "talk_passages=0", "misleading=1", "homonyms=0.5"]  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("judge_recipe", RECIPE)
    module = sys.modules["judge_recipe"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_passage_that_states_the_fact_is_a_candidate_next_to_those_that_mislead(recipe, tmp_path: Path) -> None:
    args = Namespace(out=tmp_path, questions=30, candidates=6, world=WORLD)
    judged = list(recipe.judged_queries(args, 7))
    assert len(judged) == 30
    misleading = 0
    for one in judged:
        ids = [passage.id for passage in one.task.passages]
        assert one.gold in ids and len(set(ids)) == len(ids) == 6
        assert ids == [passage.id for passage in one.task.query.passages]
        gold = next(passage for passage in one.task.passages if passage.id == one.gold)
        misleading += any(gold.title in passage.title for passage in one.task.passages if passage.id != one.gold)
    assert misleading == 30
    assert len({ids.index(one.gold) for one in judged if (ids := [p.id for p in one.task.passages])}) > 3


def test_a_judge_is_trained_measured_and_left_as_it_is(recipe, tmp_path: Path, monkeypatch, capsys) -> None:
    command = [
        "train.py", "--out", str(tmp_path / "judge"), "--base", make_model(tmp_path / "base"), "--worlds", "1",
        "--questions", "6", "--candidates", "3", "--batch-size", "9", "--max-length", "64", "--device", "cpu",
        "--world", *WORLD,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", command)
    recipe.main()
    found = read_json(tmp_path / "judge" / "judge.json")
    assert (found["queries"], found["candidates"]) == (6, 3)
    assert all(0 <= found[name] <= 1 for name in found if name not in ("queries", "candidates"))
    weights = tmp_path / "judge" / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    recipe.main()
    assert weights.stat().st_mtime_ns == before
    monkeypatch.setattr("sys.argv", [*command, "--seed", "1"])
    with pytest.raises(ManifestMismatchError, match="begun with other settings"):
        recipe.main()


def test_one_seed_gives_one_judge(recipe, tmp_path: Path, monkeypatch) -> None:
    base, weights = make_model(tmp_path / "base"), []
    for number in range(2):
        torch.manual_seed(number)  # whatever happened before in this process
        out = tmp_path / str(number)
        command = [
            "train.py", "--out", str(out), "--base", base, "--worlds", "1", "--questions", "4", "--candidates", "2",
            "--max-length", "64", "--device", "cpu", "--world", *WORLD,
        ]  # fmt: skip
        monkeypatch.setattr("sys.argv", command)
        recipe.main()
        weights.append((out / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("flag", "value"), [("--candidates", "1"), ("--questions", "0"), ("--worlds", "0")])
def test_numbers_that_leave_nothing_to_measure_are_refused_before_training(
    recipe, tmp_path: Path, monkeypatch, capsys, flag: str, value: str
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--out", str(tmp_path / "judge"), flag, value])
    with pytest.raises(SystemExit):
        recipe.main()
    assert f"{flag}: expected at least" in capsys.readouterr().err
    assert not (tmp_path / "judge").exists()


def test_a_judge_that_finds_no_positive_is_named(recipe, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "judge" / "model").mkdir(parents=True)  # trained already
    monkeypatch.setattr(recipe, "quality", lambda args: {"queries": 9, "gold_possible_positive": 0.0})
    monkeypatch.setattr("sys.argv", ["train.py", "--out", str(tmp_path / "judge")])
    recipe.main()
    assert "few gold passages (0%) reach 60" in capsys.readouterr().err
