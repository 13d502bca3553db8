"""Benchmarks in FlashRAG layout, `{data_dir}/{name}/{split}.jsonl`, checked before anything expensive begins."""

from __future__ import annotations

from pathlib import Path

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.questions import read_questions

QUESTION_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz")
"""FlashRAG's order of preference; the last one FlashRAG does not read itself."""


def split_file(folder: Path, split: str) -> Path:
    """The question file of a split.

    Raises:
        ConfigError: there is none (FlashRAG gives None for that split); the message lists what is there.
    """
    for suffix in QUESTION_SUFFIXES:
        if (file := folder / f"{split}{suffix}").is_file():
            return file
    there = sorted(path.name for path in folder.glob("*.*")) if folder.is_dir() else []
    found = f"{folder} holds {', '.join(there)}" if there else f"there is no data set at {folder}"
    raise ConfigError(f"split {split!r}: no {folder / split}.jsonl; {found}")


def check_questions(file: Path, num_questions: int | None) -> None:
    """Read a question file from end to end.

    Raises:
        RecordError: as `questions.read_questions`.
        ConfigError: no question, or fewer than asked for.
    """
    check_number(file, sum(1 for _ in read_questions(file)), num_questions)


def check_number(file: Path, found: int, num_questions: int | None) -> None:
    """ConfigError where a file holds no question, or fewer than asked for."""
    if not found:
        raise ConfigError(f"{file}: expected at least one question, found none")
    if num_questions is not None and int(num_questions) > found:
        raise ConfigError(f"{file}: {num_questions} questions were asked for, it holds {found}")
