"""The report's questions as compact JSON: which flip between two cells, with the trajectories of both.

Outcomes of all questions come from the cells' `scores.json`. Trajectories are large, so the page contains only those
of questions that some cell answers right and another wrong, spread evenly over the benchmark up to a budget. The page
says how many there are. Repeated lines of text are stored once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentic_r_plugin.errors import UnknownComponentError
from agentic_r_plugin.protocol import AgentProtocol, load_protocol
from agentic_r_plugin.records import Trajectory
from agentic_r_plugin.report.results import Cell, by_benchmark, label
from agentic_r_plugin.report.run_folder import RunFolder
from agentic_r_plugin.tags import search_r1 as fallback_protocol

Outcomes = Mapping[str, bool]
"""Question id -> whether it was answered right."""


@dataclass(kw_only=True)
class UniqueLines:
    """Lines of text without duplicates."""

    lines: list[str] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def places(self, text: str) -> list[int]:
        """Add the lines of a text and return their positions.

        >>> lines = UniqueLines()
        >>> lines.places("a b"), lines.places("c d"), lines.lines
        ([0], [1], ['a b', 'c d'])
        >>> lines.places("c d")
        [1]
        """
        found = []
        for line in text.split("\n"):
            if line not in self._places:
                self._places[line] = len(self.lines)
                self.lines.append(line)
            found.append(self._places[line])
        return found


def read_answers(run: RunFolder, *, num_trajectories: int) -> dict[str, Any]:
    """Data for the page's script: the cells of each benchmark, how many questions flip, and trajectories.

    Args:
        num_trajectories: maximum number of trajectories in the page.
    """
    groups, lines, benchmarks = by_benchmark(run.cells), UniqueLines(), []
    for name, cells in groups.items():
        outcomes = [run.outcomes(cell) for cell in cells]
        # Each benchmark gets an equal share of the budget, and a question takes one trajectory per cell.
        chosen = _spread(_split(outcomes), num_trajectories // len(groups) // len(cells))
        questions: dict[str, dict[str, Any]] = {}
        for place, cell in enumerate(cells):
            protocol = _protocol(str(cell.get("protocol", "")), cell.get("protocol_options", {}))
            for record in run.trajectories(cell):
                if record.id in chosen:
                    question = questions.setdefault(record.id, _question(record, len(cells)))
                    question["sides"][place] = _side(record, protocol, lines)
        benchmarks.append(
            {
                "name": name,
                "cells": [label(cell) for cell in cells],
                "flips": _flips(outcomes),
                "asked": [len(cell) for cell in outcomes],
                "right": [sum(cell.values()) for cell in outcomes],
                "first": _first_pair(cells),
                "questions": [questions[key] for key in chosen if key in questions],
            }
        )
    return {"benchmarks": [item for item in benchmarks if item["questions"]], "lines": lines.lines}


def embed(payload: Mapping[str, Any]) -> str:
    """JSON that can be put into a `<script>` element: no text in it can close the element.

    >>> embed({"question": "</script><b>"})
    '{"question":"\\\\u003c/script>\\\\u003cb>"}'
    """
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


# --- Outcomes ---------------------------------------------------------------------------------------------------------


def _split(outcomes: Sequence[Outcomes]) -> list[str]:
    """Questions that some cell answers right and another wrong; all questions if there is a single cell."""
    ids = list(dict.fromkeys(key for cell in outcomes for key in cell))
    if len(outcomes) == 1:
        return ids
    return [key for key in ids if len({cell[key] for cell in outcomes if key in cell}) > 1]


def _spread(ids: Sequence[str], room: int) -> dict[str, None]:
    """At most `room` of the ids, evenly spread.

    >>> list(_spread(["a", "b", "c", "d", "e"], 2)), list(_spread(["a"], 2))
    (['a', 'c'], ['a'])
    """
    if len(ids) <= room:
        return dict.fromkeys(ids)
    return dict.fromkeys(ids[i * len(ids) // room] for i in range(room))


def _flips(outcomes: Sequence[Outcomes]) -> list[list[int]]:
    """[row][column]: number of questions that the row's cell answers wrong and the column's cell right.

    >>> _flips([{"a": True, "b": False}, {"a": True, "b": True, "c": True}])
    [[0, 1], [0, 0]]
    """
    return [
        [sum(not right and second.get(key, False) for key, right in first.items()) for second in outcomes]
        for first in outcomes
    ]


def _first_pair(cells: Sequence[Cell]) -> list[int]:
    """Indices of the two cells that the page compares first: the last agent's first and last retriever."""
    agents = [cell["agent"] for cell in cells]
    first = agents.index(agents[-1])
    return [first if first != len(cells) - 1 else 0, len(cells) - 1]


# --- Trajectories -----------------------------------------------------------------------------------------------------


def _question(record: Trajectory, num_cells: int) -> dict[str, Any]:
    sides: list[dict[str, Any] | None] = [None] * num_cells
    return {"id": record.id, "question": record.question, "gold": list(record.golden_answers), "sides": sides}


def _side(record: Trajectory, protocol: AgentProtocol, lines: UniqueLines) -> dict[str, Any]:
    return {
        "right": bool(record.em),
        "answer": record.answer,
        "stop": record.stop_reason.value.replace("_", " "),
        "searches": len(record.turns),
        "pieces": [[piece.kind, *lines.places(piece.text)] for piece in protocol.pieces(record)],
    }


def _protocol(name: str, options: Mapping[str, Any]) -> AgentProtocol:
    """The cell's protocol, or Search-R1's if it belongs to a package that is not installed."""
    try:
        return load_protocol(name, options)
    except UnknownComponentError:
        return fallback_protocol
