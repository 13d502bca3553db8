"""Reading questions, for every command.

`.jsonl` and `.json` (JSON Lines or one JSON list), also packed (gzip, zstd), `.parquet` and folders of them are checked
in the same way and give the same questions; `forms` defines which fields are read. The questions of a BEIR data set are
read from its `qrels/SPLIT.tsv`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.forms import has_question_id, place, question_form
from agentic_r_plugin.records import Question
from agentic_r_plugin.store import beir_queries, read_lines, shards
from agentic_r_plugin.trec import read_grades

FORMAT: Mapping[str, Any] = {
    "help": "form of the questions, or their columns: question=NAME,answers=NAME,id=NAME; empty: found by their fields"
}
"""Metadata of the setting `format` of every command that reads questions."""

Rows = Iterable[tuple[Path, int, Any]]
"""(file, line or row from 1, row) of every question."""


def read_questions(path: str | Path, *, labelled: bool = False, format: str = "") -> Iterator[Question]:
    """Questions in order, one at a time.

    Args:
        labelled: whether every question must have a gold answer.
        format: name of the rows' format or their columns, as `forms.question_form` reads it.

    Raises:
        RecordError: as `read_rows`.
        ConfigError: an unknown format.
    """
    return (question for question, _ in read_rows(path, labelled=labelled, format=format))


def read_rows(
    path: str | Path, *, labelled: bool = False, format: str = ""
) -> Iterator[tuple[Question, Mapping[str, Any]]]:
    """Each question with the row that it was read from.

    Args:
        path: file or folder; `qrels/SPLIT.tsv` of a BEIR data set gives those of its questions that it names, with gold
            documents.

    Raises:
        RecordError: as `questions_in`, or no such file, or a broken line.
        ConfigError: an unknown format.
    """
    queries = beir_queries(Path(path))
    rows = questions_in(
        lambda: ((shard, number, row) for shard in shards(queries or path) for number, row in read_lines(shard)),
        labelled=labelled,
        format=format,
    )
    return relevant_only(rows, read_qrels(path)) if queries else rows


def read_qrels(path: str | Path) -> dict[str, list[str]]:
    """Question id -> ids of its relevant documents (a grade above 0), in the order of the file.

    Raises:
        RecordError: as `trec.read_grades`.
    """
    relevant = defaultdict[str, list[str]](list)
    for question, document, grade in read_grades(path):
        if grade > 0:
            relevant[question].append(document)
    return dict(relevant)


def relevant_only(
    rows: Iterable[tuple[Question, Mapping[str, Any]]], relevant: Mapping[str, list[str]]
) -> Iterator[tuple[Question, Mapping[str, Any]]]:
    """The questions that have a relevant document, which becomes a gold document."""
    for question, row in rows:
        if gold := relevant.get(question.id):
            yield replace(question, metadata=question.metadata | {"gold_doc_ids": gold}), row


def questions_in(
    rows: Callable[[], Rows], *, labelled: bool = False, format: str = ""
) -> Iterator[tuple[Question, Mapping[str, Any]]]:
    """Each question with its row, where `rows` reads the rows from the start.

    Search-R1 concatenates data sets whose ids start over. If ids repeat in rows with `data_source`, each question is
    identified by `data_source/split/index`, or by `data_source/id` if it has no index. Rows without an id whose columns
    are given in `format` are numbered: `FILE_0`, `FILE_1`, ... where FILE is the file's name.

    Raises:
        RecordError: a broken row, a missing or duplicate id, or a question without gold answers if `labelled`; names
            file and line (Parquet: row).
        ConfigError: an unknown format.
    """
    form, by_place = question_form(format), _ids_begin_again(rows())
    seen: set[str] = set()
    for shard, number, row in rows():
        try:
            if by_place:
                row = {**row, "id": place(row)}
            elif form is not None and form.numbered and isinstance(row, Mapping) and not has_question_id(row):
                row = {**row, "id": f"{shard.name.partition('.')[0]}_{number - 1}"}
            question = Question.from_dict(row, form)
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


def _ids_begin_again(rows: Rows) -> bool:
    """Whether rows of several data sets share ids; only checked if the first row has both `id` and `data_source`."""
    seen: dict[str, Any] = {}
    for number, (_, _, row) in enumerate(rows):
        row = row if isinstance(row, Mapping) else {}
        if not number and not {"data_source", "id"} <= row.keys():
            return False
        source = row.get("data_source")
        if source is not None and seen.setdefault(str(row.get("id")), source) != source:
            return True
    return False
