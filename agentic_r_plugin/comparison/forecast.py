"""Forecast of the time that an experiment will still take, from its runs' finished phases or else the loop's YAML."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path

from agentic_r_plugin.comparison.settings import Part
from agentic_r_plugin.config import load_config
from agentic_r_plugin.evaluation.matrix import markdown
from agentic_r_plugin.loop.costs import read_costs
from agentic_r_plugin.loop.settings import IterateConfig
from agentic_r_plugin.progress import duration, scaled
from agentic_r_plugin.retriever import reranker, training
from agentic_r_plugin.search.indexing import index

_RERANKER, _RERANKED = 2.0, 10.0
"""Time of training a reranker relative to a retriever, and of a cell with reranking relative to one without."""
_FEW = 30
"""A run's own evaluation of fewer questions does not show how long one takes."""
_PRUNED = 0.045
"""Share of the exhaustive rollouts that pruned correctness makes (recipes/experiments/README.md)."""


def forecast(found: list[Part]) -> str:
    """A table with the time that each part will still take."""
    rows, total = [["part", "loop", "retrievers", "cells"]], 0.0
    for part in found:
        known = _known_seconds(part)
        left = (_loop_left(part), _retrievers_left(part, known), _cells_left(part, known))
        total += sum(left)
        name = "/".join(filter(None, (part.variant, "" if part.seed is None else f"seed {part.seed}")))
        rows.append([name or "all", *map(duration, left)])
    return f"{markdown(rows)}\nforecast: {duration(total)} are left if nothing else runs on this machine"


def _settings(part: Part) -> IterateConfig:
    return part.loop or load_config(IterateConfig, Path(part.experiment.run, "config.yaml"))


def _took(part: Part) -> dict[tuple[int, str], float]:
    """Seconds of the run's finished phases."""
    return {phase: float(line["seconds"]) for phase, line in read_costs(Path(part.experiment.run)).items()}


def _known_seconds(part: Part) -> dict[str, float]:
    """Seconds of each phase of the experiment's iteration, and of one question of a cell (`question`)."""
    loop, took = _settings(part), _took(part)
    of_all = loop.expected() | took
    known = {phase: of_all[k, phase] for k, phase in of_all if k == part.experiment.iteration or phase == "evaluate"}
    asked = _asked(loop)
    if part.experiment.loop and (asked < _FEW or not any(phase == "evaluate" for _, phase in took)):
        # The seconds in the YAML file were measured with the settings in that file, without `loop_settings`.
        loop = load_config(IterateConfig, part.experiment.loop)
        known |= {phase: seconds for (_, phase), seconds in loop.expected().items() if phase == "evaluate"}
        asked = _asked(loop)
    return known | {"question": known.get("evaluate", 0.0) / asked}


def _asked(loop: IterateConfig) -> int:
    """Questions of all cells of the loop's evaluation."""
    cells = len(loop.evaluate.get("cells", [])) or (loop.iterations + 1) ** 2  # without a list, all pairs
    return int(loop.evaluate.get("first") or loop.world.test_questions) * cells * len(_of_run(loop))


def _of_run(loop: IterateConfig) -> list[str]:
    """The benchmarks of the run's own evaluation; the run's own one is named by its place alone."""
    return loop.evaluate.get("benchmarks") or ["main"]


def _num_questions(part: Part) -> int:
    """Test questions of the run's benchmark, as its world says."""
    loop = _settings(part)
    first = part.experiment.evaluate.get("first") or loop.evaluate.get("first")
    return int(first or loop.world.test_questions)


def _loop_left(part: Part) -> float:
    return sum(scaled(part.loop.expected(), _took(part)).values()) if part.loop is not None else 0.0


def _retrievers_left(part: Part, known: Mapping[str, float]) -> float:
    """Training, indexes and rollouts of retrievers that are not done."""
    out, seconds, exhaustive = Path(part.experiment.out), 0.0, False
    for name, plan in part.experiment.retrievers.items():
        trained = (out / "retrievers" / name / "retriever" / training.DONE).is_file()
        indexed = plan.model and any((out / "index" / name).glob(f"*/{index.MANIFEST}"))
        if plan.bm25 or plan.of_run or plan.hybrid or plan.rerank or trained or indexed:
            continue
        seconds += known.get("index", 0.0) + (0.0 if plan.model else known.get("train-retriever", 0.0))
        exhaustive |= plan.exhaustive
        if plan.rolls_out and not plan.exhaustive and plan.groups.get("use_correctness", True):
            seconds += known.get("correctness", 0.0)
    for name in dict.fromkeys(plan.rerank for plan in part.experiment.retrievers.values() if plan.rerank):
        if not (out / "rerankers" / name / reranker.DONE).is_file():
            seconds += _RERANKER * known.get("train-retriever", 0.0)
    # Made once, for all retrievers that are trained on it.
    if exhaustive and not (out / "correctness.jsonl").is_file():
        seconds += known.get("correctness", 0.0) / _PRUNED
    return seconds


def _cells_left(part: Part, known: Mapping[str, float]) -> float:
    config, loop = part.experiment, part.loop
    benchmarks = len({*_of_run(_settings(part)), *config.benchmarks, *config.worlds})
    pairs = [cell.partition(":")[::2] for cell in config.evaluate.get("cells", ())]
    pairs = pairs or list(product(config.agents, config.retrievers))
    if config.evaluate.get("reuse"):  # Cells without a trained part are copied from the first seed's.
        fixed = loop is not None and not loop.train_agents
        plans = config.retrievers.items()
        base = {name for name, plan in plans if plan.bm25 or plan.model or plan.of_run == "retriever-0"}
        pairs = [(a, r) for a, r in pairs if r not in base or not (fixed or "=" in a or a == "agent-0")]
    reranked = {name for name, plan in config.retrievers.items() if plan.rerank}
    cells = sum(_RERANKED if retriever in reranked else 1 for _, retriever in pairs) * max(len(config.max_searches), 1)
    of_pairs = (Path(config.out, "evaluation").glob(f"{agent}*-{name}-*/result.json") for agent, name in pairs)
    done = len(set().union(*of_pairs))
    return max(cells * benchmarks - done, 0) * _num_questions(part) * known["question"]
