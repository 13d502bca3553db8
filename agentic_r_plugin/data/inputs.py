"""Inputs of the stages that work on queries: the candidates in order, and records of other files by key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from agentic_r_plugin.data.stages.stage import Unit, record_units
from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.records import Candidates, Correctness, Group, Passage, Question, Relevance, SubAnswer, Trajectory
from agentic_r_plugin.storage.lookup import KeyedRecords


def query_key(record: Candidates | SubAnswer | Relevance | Correctness | Group) -> str:
    """Key of a query in files and work tables."""
    return f"{record.id}/{record.turn}"


def query_units(path: str | Path) -> Iterator[Unit[Candidates]]:
    """Units of the stages that work on queries."""
    return record_units(path, Candidates, query_key)


class PassageStore(Protocol):
    """Passages by id (`search.corpus.Corpus`)."""

    def by_id(self, identifier: str) -> Passage:
        """The passage; raises RecordError if there is none."""


def _id(record: Question | Trajectory) -> str:
    return record.id


_FILES: Mapping[str, tuple[type, Callable[[Any], str], bool]] = {
    "questions": (Question, _id, False),
    "trajectories": (Trajectory, _id, False),
    "sub_answers": (SubAnswer, query_key, False),
    "relevance": (Relevance, query_key, False),
    "correctness": (Correctness, query_key, True),
    "groups": (Group, query_key, True),
}
"""File -> its records, their key, and whether several may have the same."""


class QueryFiles:
    """The other files of an iteration's data, looked up query by query. A file that is not given holds nothing.

    Args:
        folder: for temporary files.
        format: form of the questions (`forms.question_form`).
        paths: of `questions`, `trajectories`, `sub_answers`, `relevance`, `correctness`, `groups`; empty: not given.
    """

    def __init__(self, folder: Path, *, format: str = "", **paths: str | Path) -> None:
        self._files: dict[str, KeyedRecords[Any]] = {}
        for name, path in paths.items():
            record, key, many = _FILES[name]
            reader = partial(read_questions, format=format) if record is Question else None
            if path:
                role = name.replace("_", "-")
                self._files[role] = KeyedRecords(path, record, key, many=many, folder=folder, reader=reader)

    @property
    def paths(self) -> dict[str, Path]:
        """Role -> path of the given files."""
        return {role: file.path for role, file in self._files.items()}

    @property
    def opened(self) -> list[KeyedRecords[Any]]:
        """The given files, for `Stage.sides`."""
        return list(self._files.values())

    def close(self) -> None:
        """Close the files; safe to call twice."""
        for file in self._files.values():
            file.close()

    def question(self, query: Candidates) -> Question | None:
        """The benchmark's record of the query's question."""
        return next(iter(self._find("questions", query.id)), None)

    def trajectory(self, query: Candidates) -> Trajectory | None:
        """The trajectory that the query is from."""
        return next(iter(self._find("trajectories", query.id)), None)

    def sub_answer(self, query: Candidates) -> str | None:
        """The sub-answer of the query; None if the judge was not sure or no file was given."""
        return next((found.sub_answer for found in self._find("sub-answers", query_key(query))), None)

    def relevance(self, query: Candidates) -> dict[str, int] | None:
        """Passage id -> 0..100 of the query's candidates."""
        return next((found.scores for found in self._find("relevance", query_key(query))), None)

    def correctness(self, query: Candidates) -> dict[str, int] | None:
        """Passage id -> 0 or 1 of those candidates that were rolled out; None if none was.

        Raises:
            RecordError: a candidate occurs twice.
        """
        known: dict[str, int] = {}
        for record in self._find("correctness", query_key(query)):
            if record.passage_id in known:
                path = self._files["correctness"].path
                raise RecordError(f"query {query.key}: passage {record.passage_id!r} occurs twice", path=path)
            known[record.passage_id] = record.em
        return known or None

    def groups(self, query: Candidates) -> list[Group]:
        """The query's training groups."""
        return self._find("groups", query_key(query))

    def _find(self, role: str, key: str) -> list[Any]:
        return self._files[role].find(key) if role in self._files else []
