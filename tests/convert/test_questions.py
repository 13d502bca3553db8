"""`agentic-r convert questions`, and the rules that hold for every conversion."""

from __future__ import annotations

import json

import pytest

from agentic_r_plugin import cli
from agentic_r_plugin.questions import read_questions


@pytest.fixture
def search_r1(tmp_path):
    file = tmp_path / "search_r1.jsonl"
    row = {
        "data_source": "nq",
        "prompt": [{"role": "user", "content": "Search. Question: Who wrote Emma?\n"}],
        "reward_model": {"style": "rule", "ground_truth": {"target": ["Jane Austen"]}},
        "extra_info": {"split": "train", "index": 0},
    }
    file.write_text(json.dumps(row) + "\n")
    return file


def convert(*arguments):
    return cli.main(["convert", *map(str, arguments)])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_questions_of_another_form_become_flashrag_s(search_r1, tmp_path, suffix):
    out = tmp_path / f"questions{suffix}"
    assert convert("questions", f"in={search_r1}", f"out={out}") == 0
    (question,) = read_questions(out)
    assert (question.id, question.question, question.golden_answers) == (
        "nq/train/0", "Who wrote Emma?", ("Jane Austen",)
    )  # fmt: skip


def test_an_output_is_written_once(search_r1, tmp_path, capsys):
    out = tmp_path / "questions.jsonl"
    assert convert("questions", f"in={search_r1}", f"out={out}") == 0
    before = out.stat().st_mtime_ns
    assert convert("questions", f"in={search_r1}", f"out={out}") == 1
    assert "already exists" in capsys.readouterr().err
    assert convert("questions", f"in={search_r1}", f"out={out}", "--resume") == 0
    assert out.stat().st_mtime_ns == before
    search_r1.write_text(search_r1.read_text().replace("Emma", "Persuasion"))
    assert convert("questions", f"in={search_r1}", f"out={out}", "--resume") == 1
    assert "input in was" in capsys.readouterr().err


def test_help_lists_the_kinds_and_their_flags(capsys):
    for arguments, expected in ((["--help"], "questions"), (["questions", "--help"], "--in")):
        with pytest.raises(SystemExit) as stop:
            convert(*arguments)
        assert stop.value.code == 0 and expected in capsys.readouterr().out
    for wrong in ([], ["nonsense"]):
        with pytest.raises(SystemExit) as stop:
            convert(*wrong)
        assert stop.value.code == 2 and "KIND" in capsys.readouterr().err
