"""Which questions the agent answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentic_r_plugin.data.trajectories import TrajectoriesConfig, chosen_questions
from agentic_r_plugin.records import Question
from agentic_r_plugin.store import write_records


@pytest.fixture
def file(tmp_path: Path) -> str:
    questions = [Question(id=str(i), question=f"{i}?", golden_answers=("a",)) for i in range(40)]
    write_records(tmp_path / "questions.jsonl", questions)
    return str(tmp_path / "questions.jsonl")


def chosen(file: str, **settings) -> list[int]:
    return [int(question.id) for question in chosen_questions(TrajectoriesConfig(in_=file, out="out", **settings))]


def test_all_of_them_or_the_first_ones(file: str):
    assert chosen(file) == list(range(40))
    assert chosen(file, num_questions=3) == [0, 1, 2]


def test_a_random_sample_keeps_the_order_of_the_file_and_follows_the_seed(file: str):
    sample = chosen(file, num_questions=20, random_sample=True, seed=1)
    assert len(sample) == 20 and sample == sorted(sample) != list(range(20))
    assert sample == chosen(file, num_questions=20, random_sample=True, seed=1)
    assert sample != chosen(file, num_questions=20, random_sample=True, seed=2)
    assert chosen(file, num_questions=99, random_sample=True) == list(range(40))
