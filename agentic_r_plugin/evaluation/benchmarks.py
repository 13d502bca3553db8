"""Benchmarks in FlashRAG layout, `{data_dir}/{name}/{split}.jsonl`, or BEIR's, checked before any expensive work."""

from __future__ import annotations

from pathlib import Path

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.store import beir_queries

QUESTION_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".jsonl.zst")
"""Question files in FlashRAG's order of preference. FlashRAG itself does not read the last two."""


def split_file(folder: Path, split: str) -> Path:
    """Find the question file of a split.

    Raises:
        ConfigError: there is none, where FlashRAG would return None; the message lists the files that exist.
    """
    for suffix in QUESTION_SUFFIXES:
        if (file := folder / f"{split}{suffix}").is_file():
            return file
    if beir_queries(file := folder / "qrels" / f"{split}.tsv") and file.is_file():
        return file
    there = sorted(path.name for path in folder.glob("*.*")) if folder.is_dir() else []
    found = f"{folder} holds {', '.join(there)}" if there else f"there is no data set at {folder}"
    raise ConfigError(f"split {split!r}: no {folder / split}.jsonl; {found}")


def check_questions(file: Path, num_questions: int | None, format: str = "") -> None:
    """Check every line of a question file.

    Raises:
        RecordError: as `questions.read_questions`.
        ConfigError: an unknown format, or the file holds no question, or fewer than `num_questions`.
    """
    check_number(file, sum(1 for _ in read_questions(file, format=format)), num_questions)


def check_number(file: Path, found: int, num_questions: int | None) -> None:
    """Raise ConfigError if a file holds no question, or fewer than `num_questions`."""
    if not found:
        raise ConfigError(f"{file}: expected at least one question, found none")
    if num_questions is not None and int(num_questions) > found:
        raise ConfigError(f"{file}: {num_questions} questions were asked for, it holds {found}")
