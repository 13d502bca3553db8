"""Reading questions, for every command.

`.jsonl` and `.json` (JSON Lines or one JSON list), also gzipped, `.parquet` and folders of them are checked in the same
way and give the same questions; `forms` defines which fields are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.forms import place
from agentic_r_plugin.records import Question
from agentic_r_plugin.store import read_lines, shards


def read_questions(path: str | Path, *, labelled: bool = False) -> Iterator[Question]:
    """Questions in order, one at a time.

    Args:
        labelled: whether every question must have a gold answer.

    Raises:
        RecordError: as `read_rows`.
    """
    return (question for question, _ in read_rows(path, labelled=labelled))


def read_rows(path: str | Path, *, labelled: bool = False) -> Iterator[tuple[Question, Mapping[str, Any]]]:
    """Each question with the row that it was read from.

    Search-R1 concatenates data sets whose ids start over. If ids repeat in a file with `data_source`, each question is
    identified by `data_source/split/index`, or by `data_source/id` if it has no index.

    Raises:
        RecordError: no such file, a broken row, a missing or duplicate id, or a question without gold answers if
            `labelled`; names file and line (Parquet: row).
    """
    by_place = _ids_begin_again(path)
    seen: set[str] = set()
    for shard, number, row in _rows(path):
        try:
            if by_place:
                row = {**row, "id": place(row)}
            question = Question.from_dict(row)
            if labelled:
                question.require_label()
            if question.id in seen:
                raise RecordError(f"question id {question.id!r} occurs twice; every question needs its own")
        except RecursionError as error:
            raise RecordError("nested too deeply", path=shard, line=number) from error
        except RecordError as error:
            raise RecordError(str(error), path=shard, line=number) from error
        seen.add(question.id)
        yield question, row


def _rows(path: str | Path) -> Iterator[tuple[Path, int, Any]]:
    return ((shard, number, row) for shard in shards(path) for number, row in read_lines(shard))


def _ids_begin_again(path: str | Path) -> bool:
    """Whether rows of several data sets share ids; only checked if the first row has both `id` and `data_source`."""
    first = next(islice(_rows(path), 1), None)
    if first is None or not isinstance(first[2], Mapping) or not {"data_source", "id"} <= first[2].keys():
        return False
    seen: dict[str, Any] = {}
    for _, _, row in _rows(path):
        source = (row if isinstance(row, Mapping) else {}).get("data_source")
        if source is not None and seen.setdefault(str(row.get("id")), source) != source:
            return True
    return False
