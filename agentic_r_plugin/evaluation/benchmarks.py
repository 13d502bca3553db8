"""Benchmarks in FlashRAG layout, `{data_dir}/{name}/{split}.jsonl`, checked before anything expensive is begun."""

from __future__ import annotations

from pathlib import Path

from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.records import Question
from agentic_r_plugin.store import read_records

QUESTION_SUFFIXES = ("jsonl", "json", "parquet")
"""FlashRAG's order of preference."""


def split_file(folder: Path, split: str) -> Path:
    """The file that FlashRAG reads for a split.

    Raises:
        ConfigError: there is none (FlashRAG gives None for that split); the message lists what is there.
    """
    for suffix in QUESTION_SUFFIXES:
        if (file := folder / f"{split}.{suffix}").is_file():
            return file
    there = sorted(path.name for path in folder.glob("*.*")) if folder.is_dir() else []
    found = f"{folder} holds {', '.join(there)}" if there else f"there is no data set at {folder}"
    raise ConfigError(f"split {split!r}: no {folder / split}.jsonl; {found}")


def check_questions(file: Path, num_questions: int | None) -> None:
    """Read a question file whole, as far as it is JSON Lines.

    Raises:
        RecordError: a broken line, a question without gold answers, an id that occurs twice; file and line.
        ConfigError: fewer questions than asked for.
    """
    if file.suffix != ".jsonl":
        return
    seen: set[str] = set()
    for question in read_records(file, Question):
        if question.id in seen:
            raise RecordError(f"question id {question.id!r} occurs twice; every question needs its own", path=file)
        seen.add(question.id)
    if num_questions is not None and num_questions > len(seen):
        raise ConfigError(f"{file}: {num_questions} questions were asked for, it holds {len(seen)}")
