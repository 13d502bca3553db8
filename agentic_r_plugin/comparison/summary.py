"""Summary of an experiment: each retriever's groups, what they cost, and its exact match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentic_r_plugin.comparison.retrievers import Retrievers
from agentic_r_plugin.config import to_dict
from agentic_r_plugin.evaluation.matrix import figure, markdown
from agentic_r_plugin.records import Group
from agentic_r_plugin.retriever import reranker
from agentic_r_plugin.storage.claim import companion
from agentic_r_plugin.store import atomic_path, read_json, read_records


def summarize(retrievers: Retrievers) -> dict[str, Any]:
    """Print and write the table of the retrievers in `experiment.md`; returns the content of `experiment.json`."""
    config, out = retrievers.config, retrievers.out
    cells = read_json(out / "evaluation" / "matrix.json")["cells"]
    rows = {name: groups_of(retrievers, name) for name in config.retrievers}
    rerankers = {name: read_json(retrievers.reranker_folder(name) / reranker.DONE) for name in retrievers.rerankers}
    text = markdown(_table(cells, rows))
    if rerankers:
        text += f"\n{markdown(_cost_of_reranking(cells, config.retrievers, rerankers))}"
    with atomic_path(out / "experiment.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text, flush=True)
    found = {"schema": "experiment/1", "retrievers": rows, "config": to_dict(config)}
    return found | ({"rerankers": rerankers} if rerankers else {})


def groups_of(retrievers: Retrievers, name: str) -> dict[str, Any]:
    """Number of groups and rollouts, and the share of queries with the same positive as in the run.

    The share is over the queries that have a positive here or in the run. All are None for a retriever whose groups
    are not known.
    """
    plan, run = retrievers.config.retrievers[name], retrievers.run
    if plan.ready and plan.of_run != f"retriever-{run.iteration}":
        return {"groups": None, "same_positive": None, "rollouts": None}
    made = retrievers.trained(name)
    positives, wanted = _positives(made.file("groups")), _positives(run.data("groups"))
    queries = positives.keys() | wanted.keys()
    rollouts = 0
    if "correctness" in made.reads:
        correctness = made.file("correctness")
        rollouts = read_json(companion(correctness, ".report.json"))["rollouts"]
    return {
        "groups": sum(map(len, positives.values())),
        "same_positive": sum(positives.get(key) == wanted.get(key) for key in queries) / max(len(queries), 1),
        "rollouts": rollouts,
    }


def _table(cells: Sequence[Mapping[str, Any]], rows: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    table = [["retriever", "groups", "same positive", "rollouts", "agent", "benchmark", "EM", "searches"]]
    for cell in cells:
        made, metrics = rows[cell["retriever"]], cell["metrics"]
        same = made["same_positive"]
        table.append(
            [
                cell["retriever"],
                _shown(made["groups"]),
                "–" if same is None else f"{same:.0%}",
                _shown(made["rollouts"]),
                cell["agent"],
                cell["benchmark"],
                figure(metrics["agentic_em"], with_interval=True),
                figure(metrics.get("search_turns"), 1),
            ]
        )
    return table


def _cost_of_reranking(
    cells: Sequence[Mapping[str, Any]], plans: Mapping[str, Any], rerankers: Mapping[str, Mapping[str, Any]]
) -> list[list[str]]:
    """Table: seconds of training, and of the evaluation with and without a reranker."""
    took = {(cell["retriever"], cell["agent"], cell["benchmark"]): cell["cost"]["seconds"] for cell in cells}
    table = [["retriever", "agent", "benchmark", "training, s", "evaluation, s", "without reranker, s"]]
    for (name, *where), seconds in took.items():
        if (plan := plans[name]).rerank:
            shown = (rerankers[plan.rerank]["train_runtime"], seconds, took.get((plan.of, *where)))
            table.append([name, *where, *(_shown(None if time is None else round(time)) for time in shown)])
    return table


def _positives(file: Path) -> dict[tuple[str, int], list[str]]:
    found: dict[tuple[str, int], list[str]] = {}
    for group in read_records(file, Group):
        found.setdefault((group.id, group.turn), []).append(group.positive)
    return found


def _shown(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
