"""What the stages on queries read: the candidates in order, and by key what other files hold about each query."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from agentic_r_plugin.answers import normalize
from agentic_r_plugin.data.stages.stage import Unit, record_units
from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.records import Candidates, Correctness, Group, Passage, Question, Relevance, SubAnswer, Trajectory
from agentic_r_plugin.storage.lookup import HashIndex, KeyedRecords, key_hash


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


class QueryFiles:
    """The other files of an iteration's data, looked up query by query. A file that is not given holds nothing.

    Args:
        folder: for temporary files.
        format: form of the questions (`forms.question_form`).
        questions, trajectories, sub_answers, relevance, correctness, groups: paths; empty: not given.
    """

    def __init__(
        self,
        folder: Path,
        *,
        format: str = "",
        questions: str | Path = "",
        trajectories: str | Path = "",
        sub_answers: str | Path = "",
        relevance: str | Path = "",
        correctness: str | Path = "",
        groups: str | Path = "",
    ) -> None:
        read = partial(read_questions, format=format)
        of_question: dict[str, Any] = {"key": lambda record: record.id}
        of_query: dict[str, Any] = {"key": query_key}
        known: dict[str, tuple[str | Path, type, dict[str, Any]]] = {
            "questions": (questions, Question, of_question | {"reader": read}),
            "trajectories": (trajectories, Trajectory, of_question),
            "sub-answers": (sub_answers, SubAnswer, of_query),
            "relevance": (relevance, Relevance, of_query),
            "correctness": (correctness, Correctness, of_query | {"many": True}),
            "groups": (groups, Group, of_query | {"many": True}),
        }
        self._files: dict[str, KeyedRecords[Any]] = {
            role: KeyedRecords(path, record, folder=folder, **options)
            for role, (path, record, options) in known.items()
            if path
        }

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
        """What the query was after, if the judge is sure."""
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


class FirstQueries:
    """Which query of a file is the first with its question and words, ignoring case and white space.

    The index is on disk, so memory does not grow with the file.
    """

    def __init__(self, path: str | Path, folder: Path) -> None:
        self._first = HashIndex(folder)
        for unit in query_units(path):
            self._first.add(_words_hash(unit.item), key_hash(unit.key))
        self._first.finish()

    def repeats(self, query: Candidates) -> bool:
        """Whether an earlier query of the file has the same question and words."""
        return self._first.find(_words_hash(query))[0] != key_hash(query_key(query))

    def close(self) -> None:
        """Delete the index."""
        self._first.close()


def _words_hash(query: Candidates) -> int:
    return key_hash(f"{normalize(query.question)}\n{normalize(query.query)}")
