"""Reading questions, for every command.

`.jsonl` and `.json` (JSON Lines or one JSON list), also packed (gzip, zstd), `.parquet` and folders of them are checked
in the same way and give the same questions; `forms` defines which fields are read. The questions of a BEIR data set are
read from its `qrels/SPLIT.tsv`.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from agentic_r_plugin.errors import RecordError, located
from agentic_r_plugin.forms import has_question_id, place, question_form
from agentic_r_plugin.records import Question
from agentic_r_plugin.storage.lookup import HashSet, key_hash
from agentic_r_plugin.store import beir_queries, read_lines, shards, without_suffixes
from agentic_r_plugin.trec import read_grades

log = logging.getLogger(__name__)

FORMAT: Mapping[str, Any] = {
    "help": "format of the questions, or their columns: question=NAME,answers=NAME,id=NAME; empty: detected by fields"
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
    return relevant_only(rows, path) if queries else rows


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
    rows: Iterable[tuple[Question, Mapping[str, Any]]], qrels: str | Path, counts: dict[str, int] | None = None
) -> Iterator[tuple[Question, Mapping[str, Any]]]:
    """The questions that have a relevant document, which becomes a gold document.

    Warns, after the last of them, if the qrels name questions that are not among the rows.

    Args:
        counts: takes the number of questions `without_relevant_document`, and of those `only_in_qrels`.
    """
    relevant = read_qrels(qrels)
    left, without = set(relevant), 0
    for question, row in rows:
        if gold := relevant.get(question.id):
            left.discard(question.id)
            yield replace(question, metadata=question.metadata | {"gold_doc_ids": gold}), row
        else:
            without += 1
    if counts is not None:
        counts |= {"without_relevant_document": without, "only_in_qrels": len(left)}
    if left:
        _warn_once(
            f"{qrels}: {len(left)} of {len(relevant)} questions with a relevant document are not among the questions "
            f"and are left out, such as {min(left)!r}"
        )


@cache
def _warn_once(message: str) -> None:
    """Commands read their questions more than once."""
    log.warning("%s", message)


def questions_in(
    rows: Callable[[], Rows], *, labelled: bool = False, format: str = ""
) -> Iterator[tuple[Question, Mapping[str, Any]]]:
    """Each question with its row, where `rows` reads the rows from the start.

    Search-R1 concatenates data sets whose ids start over. If ids repeat in rows with `data_source`, each question is
    identified by `data_source/split/index`, or by `data_source/id` if it has no index. Rows without an id whose columns
    are given in `format` are numbered: `FILE_0`, `FILE_1`, ... where FILE is the file's name without `.jsonl` and the
    like.

    Raises:
        RecordError: a broken row, a missing or duplicate id, or a question without gold answers if `labelled`; names
            file and line (Parquet: row).
        ConfigError: an unknown format.
    """
    form, by_place = question_form(format), _ids_begin_again(rows())

    def read(shard: Path, number: int, row: Any) -> Question:
        if by_place:
            row = {**row, "id": place(row)}
        elif form is not None and form.numbered and isinstance(row, Mapping) and not has_question_id(row):
            row = {**row, "id": f"{without_suffixes(shard.name)}_{number - 1}"}
        try:
            return Question.from_dict(row, form)
        except RecursionError as error:
            raise RecordError("nested too deeply") from error

    seen = HashSet()
    for shard, number, row in rows():
        with located(shard, number):
            question = read(shard, number, row)
            if labelled:
                question.require_label()
            if not seen.add(key_hash(question.id)):
                first = next(f"{file}:{at}" for file, at, other in rows() if read(file, at, other).id == question.id)
                raise RecordError(
                    f"question id {question.id!r} occurs twice, the first is at {first}; every question needs its own"
                )
        yield question, row


def _ids_begin_again(rows: Rows) -> bool:
    """Whether rows of several data sets share ids; only checked if the first row has both `id` and `data_source`."""
    ids, sourced = HashSet(), HashSet()
    for number, (_, _, row) in enumerate(rows):
        row = row if isinstance(row, Mapping) else {}
        if not number and not {"data_source", "id"} <= row.keys():
            return False
        source, name = row.get("data_source"), str(row.get("id"))
        if source is None:
            continue
        is_new, other_source = ids.add(key_hash(name)), sourced.add(key_hash(f"{source}/{name}"))
        # The same id from another source: data sets were joined. From the same source it is a duplicate.
        if other_source and not is_new:
            return True
    return False
