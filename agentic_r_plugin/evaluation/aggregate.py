"""`agentic-r aggregate`: merge the matrices of several seeds, with intervals over seeds and questions.

All runs must hold the same cells on the same questions, each trained with its own seed. The result is a matrix of the
same form (`matrix.json`, `.md`, `.csv`, `.tex`). It holds the metrics that all runs have, with the mean of each seed.
The intervals come from `statistics.seeds_interval`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentic_r_plugin.config import setting, to_dict
from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.evaluation.evaluate import check_statistics
from agentic_r_plugin.evaluation.matrix import (
    COMPARED,
    Result,
    cell_name,
    compared_pairs,
    matrix_folder,
    pair_names,
    write_tables,
)
from agentic_r_plugin.evaluation.provenance import provenance
from agentic_r_plugin.evaluation.statistics import seeds_interval
from agentic_r_plugin.storage.claim import require_new
from agentic_r_plugin.store import read_json, write_json

METHOD = "half-widths of Student's t over the seeds' means and over the questions' means, added in quadrature"
_KEPT = ("agent", "retriever", "benchmark", "split", "num_questions", "sample", "seed", "protocol", "limits", "topk")
"""Fields of a cell that must be the same for all seeds."""

_OF_A_SEED = frozenset(
    {
        "agent", "agent_url", "tokenizer", "retriever", "search_retriever", "part_rerankers", "sampling_seed",
        "level", "resamples", "metrics",
    }
)  # fmt: skip
"""Entries of `made_from` that may differ between seeds, or that do not affect the score of a question."""

Scores = dict[str, list[float | None]]


@dataclass(frozen=True, kw_only=True)
class AggregateConfig:
    """Put the matrices of runs with several seeds together."""

    out: str = setting("folder for the matrix")
    runs: list[str] = setting("run folders of iterate, experiment or evaluate, one per seed", default_factory=list)
    level: float = setting("of the intervals", default=0.95)

    def __post_init__(self) -> None:
        if len(self.runs) < 2 or len({Path(run).resolve() for run in self.runs}) < len(self.runs):
            raise ConfigError(f"runs: expected at least two different folders, found {', '.join(self.runs) or 'none'}")
        check_statistics(self.level)


@dataclass(frozen=True, kw_only=True)
class _Run:
    folder: Path
    cells: dict[str, Result]

    def scores(self, name: str) -> Scores:
        found: Scores = read_json(self.folder / name / "scores.json")
        return found


def run(config: AggregateConfig, *, resume: bool = False) -> None:
    """Run the command `aggregate`. With `resume`, an earlier result is replaced.

    Raises:
        OutputExistsError: there is a matrix already and `resume` is off.
        RecordError: a run has no matrix, or the runs do not hold the same cells on the same questions.
    """
    out = Path(config.out)
    if not resume:
        require_new(out / "matrix.json")
    runs = [_read(Path(folder)) for folder in config.runs]
    _check_same(runs)
    cells = [_cell(runs, name, config.level) for name in runs[0].cells]
    out.mkdir(parents=True, exist_ok=True)
    table = write_tables(cells, out)
    matrix = {
        "schema": "evaluation_matrix/1",
        "cells": cells,
        "comparisons": [_comparison(runs, *pair, config.level) for pair in compared_pairs(cells)],
        "config": to_dict(config),
        "num_seeds": len(runs),
        "method": METHOD,
        "runs": [read_json(each.folder / "matrix.json")["config"] for each in runs],
        **provenance(),
    }
    write_json(out / "matrix.json", matrix)
    print(table, flush=True)


def _read(folder: Path) -> _Run:
    home = matrix_folder(folder)
    if home is None:
        raise RecordError("no matrix.json here nor in evaluation/; run agentic-r evaluate first", path=folder)
    cells = {cell_name(cell): cell for cell in read_json(home / "matrix.json")["cells"]}
    return _Run(folder=home, cells=cells)


def _check_same(runs: Sequence[_Run]) -> None:
    first = runs[0]
    made_by: dict[tuple[Any, ...], Path] = {}
    for other in runs:
        if missing := first.cells.keys() ^ other.cells.keys():
            raise RecordError(
                f"expected the cells of {first.folder}; not in both: {sorted(missing)[0]}", path=other.folder
            )
        for name in first.cells:
            if _questions(first, name) != _questions(other, name):
                raise RecordError(f"{name}: other questions than in {first.folder}", path=other.folder)
            differing = [key for key in _KEPT if first.cells[name][key] != other.cells[name][key]]
            before, now = (_of_all_seeds(run.cells[name].get("made_from", {})) for run in (first, other))
            shared = before.keys() & now.keys()
            if differing := differing or sorted(key for key in shared if before[key] != now[key]):
                raise RecordError(f"{name}: another {', '.join(differing)} than in {first.folder}", path=other.folder)
        prints = ("agent_fingerprint", "search_fingerprint")
        # The same models in two folders would count as two seeds and narrow the intervals.
        of_run = tuple(other.cells[name][key] for name in first.cells for key in prints)
        if (same := made_by.setdefault(of_run, other.folder)) is not other.folder:
            raise RecordError(f"the agents and retrievers are those of {same}: not another seed", path=other.folder)


def _of_all_seeds(made_from: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that must be the same for all seeds. A reranker, like a retriever, may be trained with each seed."""
    kept = {key: value for key, value in made_from.items() if key not in _OF_A_SEED}
    if "rerank" in kept:
        kept["rerank"] = {key: value for key, value in kept["rerank"].items() if key != "model"}
    return kept


def _questions(run: _Run, name: str) -> tuple[Any, Any]:
    """Ids and file of a cell's questions. The ids alone are not enough: different worlds use the same ones."""
    return run.scores(name)["id"], run.cells[name].get("made_from", {}).get("questions")


def _cell(runs: Sequence[_Run], name: str, level: float) -> dict[str, Any]:
    first, scores = runs[0].cells[name], [each.scores(name) for each in runs]
    metrics: dict[str, Any] = {}
    for metric, entry in first["metrics"].items():
        if any(metric not in each.cells[name]["metrics"] for each in runs):
            continue
        means = [each.cells[name]["metrics"][metric]["mean"] for each in runs]
        # A metric without an interval is not a mean over questions; it gets the seeds' values and their mean.
        found = _interval([each[metric] for each in scores], level) if "low" in entry else None
        if found is not None:
            # Student's t does not know the bounds of a score: EM would pass 0 where almost nothing is answered.
            known = [value for each in scores for value in each[metric] if value is not None]
            metrics[metric] = {key: value for key, value in found.items() if key != "p_value"}
            metrics[metric] |= {"low": max(found["low"], min(known)), "high": min(found["high"], max(known))}
        else:
            mean = sum(means) / len(means) if None not in means else None
            metrics[metric] = {"mean": mean, "per_seed": means}
    kept = [*_KEPT, *(["protocol_options"] if "protocol_options" in first else [])]
    return {key: first[key] for key in kept} | {"num_seeds": len(runs), "metrics": metrics}


def _comparison(runs: Sequence[_Run], first: Result, second: Result, level: float) -> dict[str, Any]:
    before, after = ([each.scores(cell_name(side)) for each in runs] for side in (first, second))
    metrics = {}
    for metric in COMPARED:
        if any(metric not in scores for scores in (*before, *after)):
            continue
        pairs = [list(zip(a[metric], b[metric], strict=True)) for a, b in zip(before, after, strict=True)]
        # Paired within each seed, so the difficulty of a question cancels out.
        differences = [[None if None in (x, y) else y - x for x, y in row] for row in pairs]  # type: ignore[operator]
        if (found := _interval(differences, level)) is None:
            continue
        beyond = (found["low"] > 0 or found["high"] < 0) and found["p_value"] < 1 - level
        metrics[metric] = {"difference": found.pop("mean"), **found, "level": level, "beyond_chance": beyond}
    return {**pair_names(first, second), "metrics": metrics}


def _interval(rows: Sequence[Sequence[float | None]], level: float) -> dict[str, Any] | None:
    """Interval over the questions that have a score for every seed; None if there are fewer than two."""
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    whole = [column for column in columns if len(column) == len(rows)]
    return asdict(seeds_interval(list(zip(*whole, strict=True)), level=level)) if len(whole) > 1 else None
