"""Read a run folder for its report. Missing parts are noted.

The folder is the output of the loop (`iterate`) or of `evaluate`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentic_r_plugin.data.report import STAGES
from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.evaluation.matrix import cell_name, matrix_folder
from agentic_r_plugin.records import Trajectory
from agentic_r_plugin.store import StepLog, read_json, read_records


@dataclass(kw_only=True)
class Iteration:
    """Logs and stage reports of one iteration."""

    number: int
    agent_steps: list[dict[str, Any]] = field(default_factory=list)
    retriever_steps: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Stage -> stage report, in the order of the method."""
    positives_by_turn: dict[int, float] = field(default_factory=dict)
    """Turn -> share of its queries with a training group."""
    agreement: list[dict[str, Any]] = field(default_factory=list)
    """Per band of relevance, the number of candidates rolled out and the number that were correct."""


@dataclass(kw_only=True)
class RunFolder:
    """Everything that the report shows."""

    path: Path
    config: str | None = None
    """The resolved configuration, as YAML."""
    matrix: dict[str, Any] | None = None
    matrix_dir: Path | None = None
    costs: list[dict[str, Any]] = field(default_factory=list)
    iterations: list[Iteration] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is missing, one sentence each."""

    @property
    def cells(self) -> list[dict[str, Any]]:
        """Results of the matrix's cells; an empty list if there is no evaluation."""
        return list(self.matrix["cells"]) if self.matrix else []

    def outcomes(self, cell: Mapping[str, Any]) -> dict[str, bool]:
        """Id of each labelled question -> whether it was answered right; empty if the cell's scores are missing."""
        file = self._cell_folder(cell) / "scores.json"
        if not file.is_file():
            return {}
        scores = read_json(file)
        return {key: bool(em) for key, em in zip(scores["id"], scores["agentic_em"], strict=True) if em is not None}

    def trajectories(self, cell: Mapping[str, Any]) -> Iterator[Trajectory]:
        """Iterate over the trajectories of a cell; none if its file is missing."""
        file = self._cell_folder(cell) / "per_question.jsonl"
        return read_records(file, Trajectory) if file.is_file() else iter(())

    def _cell_folder(self, cell: Mapping[str, Any]) -> Path:
        assert self.matrix_dir is not None
        return self.matrix_dir / cell_name(cell)


def read_run(path: Path) -> RunFolder:
    """Read everything that a run folder holds.

    Raises:
        RecordError: the folder does not exist, holds nothing to report, or has a damaged file.
    """
    if not path.is_dir():
        raise RecordError("no such run folder", path=path)
    run = RunFolder(path=path)
    run.matrix_dir = matrix_folder(path)
    if run.matrix_dir is not None:
        run.matrix = read_json(run.matrix_dir / "matrix.json")
    else:
        run.notes.append("No evaluation yet (evaluation/matrix.json): no results, no comparison, no trajectories.")
    config = path / "config.yaml"
    run.config = config.read_text(encoding="utf-8") if config.is_file() else None
    run.costs = StepLog(path / "costs.jsonl").read()
    numbered = [
        (int(match[1]), folder) for folder in path.glob("iteration-*") if (match := re.search(r"-(\d+)$", folder.name))
    ]
    run.iterations = [iteration for number, folder in sorted(numbered) if (iteration := _iteration(number, folder))]
    if run.matrix is None and not run.iterations and not run.costs:
        raise RecordError("nothing to report: no matrix.json, iteration-* or costs.jsonl", path=path)
    _note_missing(run)
    return run


def _note_missing(run: RunFolder) -> None:
    if run.cells and not any(run.outcomes(cell) for cell in run.cells):
        run.notes.append(
            "No scores.json of any cell: which questions flip is left out (several seeds: see each one's)."
        )
    if not run.costs:
        run.notes.append("No costs.jsonl: the cost of the phases is left out.")
    if not run.iterations:
        run.notes.append("No iteration-* folders: training curves and data construction are left out.")
    for iteration in run.iterations:
        parts = (
            ("agent/metrics.jsonl", iteration.agent_steps),
            ("data/*.report.json", iteration.stages),
            ("retriever/metrics.jsonl", iteration.retriever_steps),
        )
        for name, content in parts:
            if not content:
                run.notes.append(f"Iteration {iteration.number}: no {name}.")


def _iteration(number: int, folder: Path) -> Iteration | None:
    """Read the folder of an iteration; None if nothing in it is shown (iteration 0 has only an index)."""
    file = folder / "data" / "data_report.json"
    data = read_json(file) if file.is_file() else {}
    bands = [(name.split("-"), row) for name, row in data.get("candidates", {}).items() if row["rolled_out"]]
    reports = {name: folder / "data" / f"{name}.jsonl.report.json" for name in STAGES}
    stages = {name: read_json(report) for name, report in reports.items() if report.is_file()}
    iteration = Iteration(
        number=number,
        agent_steps=StepLog(folder / "agent" / "metrics.jsonl").read(),
        retriever_steps=StepLog(folder / "retriever" / "metrics.jsonl").read(),
        stages=stages,
        positives_by_turn={int(turn): share for turn, share in data.get("share_with_positive_by_turn", {}).items()},
        agreement=[
            {"low": low, "high": high, "rollouts": row["rolled_out"], "correct": row["correct"]}
            for (low, high), row in reversed(bands)
        ],
    )
    return iteration if iteration.agent_steps or iteration.retriever_steps or stages else None
