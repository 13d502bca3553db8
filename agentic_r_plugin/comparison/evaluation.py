"""The evaluation of an experiment: agents x retrievers x benchmarks, and the rule that decides where to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from agentic_r_plugin.comparison.benchmarks import Benchmarks
from agentic_r_plugin.comparison.settings import ExperimentConfig
from agentic_r_plugin.config import load_config, merged, to_dict
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.evaluation import evaluate
from agentic_r_plugin.evaluation.benchmarks import split_file
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.store import read_json, write_json

_REPLACED = frozenset({"agents", "searches", "cells", "per_agent", "data_dir", "benchmarks", "out"})
"""Settings of the run's evaluation that an experiment replaces by its own."""


def stops_at(scores: Sequence[float]) -> int:
    """The place of the score to keep: the last one before the first without improvement.

    Args:
        scores: scores of successive iterations, on questions that were not used for training.

    >>> stops_at([0.40, 0.44, 0.43]), stops_at([0.40, 0.44, 0.45]), stops_at([0.40, 0.40, 0.50])
    (1, 2, 0)
    """
    return next((k for k, (now, later) in enumerate(pairwise(scores)) if later <= now), len(scores) - 1)


class Evaluation:
    """Evaluates the retrievers of an experiment with its agents.

    Methods take the location or settings of each retriever, as `evaluate` expects them (`searches`).
    """

    def __init__(self, config: ExperimentConfig, benchmarks: Benchmarks) -> None:
        self.config, self.benchmarks, self.run = config, benchmarks, benchmarks.run
        self.out = Path(config.out)
        named = (agent.partition("=") for agent in config.agents)
        self.agents = {name: folder if given else self.run.model(name, "agent") for name, given, folder in named}

    def planned(self) -> list[evaluate.EvaluateConfig]:
        """The planned evaluations, with placeholders for the retrievers.

        Raises:
            ConfigError: a key or value is wrong.
        """
        searches = dict.fromkeys(self.config.retrievers, "x")
        stop = [self.stop_settings(searches)] if self.config.stop_rule else []
        return [self.settings(searches), *stop]

    def check_agents(self) -> None:
        """Raise ConfigError if a folder given as an agent does not exist."""
        for config in self.planned():
            evaluate.check_models(config)

    def check_inputs(self) -> None:
        """Check the inputs before anything is trained. The benchmarks must have been gathered.

        Raises:
            ConfigError, RecordError: an agent or a split does not exist, or there are too few or broken questions.
        """
        for config in self.planned():
            evaluate.check_inputs(config, later=config.searches.keys())

    def compare(self, searches: Mapping[str, Any]) -> None:
        """Evaluate agents x retrievers x benchmarks; if wanted, also find where the loop should have stopped."""
        evaluate.run(self.settings(searches), resume=True)
        if self.config.stop_rule:
            self._find_stop(searches)

    def settings(
        self, searches: Mapping[str, Any], folder: str = "evaluation", **given: Any
    ) -> evaluate.EvaluateConfig:
        """The run's evaluation with the agents, retrievers and benchmarks of the experiment, and with `given`."""
        of_run, limits = self.run.config, self.config.max_searches
        values: dict[str, Any] = {
            "data_dir": str(self.benchmarks.folder),
            "benchmarks": self.benchmarks.compared(),
            "split": of_run.test_split,
            "agents": {f"{name}-max-{n}": path for name, path in self.agents.items() for n in limits} or self.agents,
            "per_agent": {f"{name}-max-{n}": {"limits": {"max_searches": n}} for name in self.agents for n in limits},
            "searches": dict(searches),
            "settings": self.run.phases.protocol_settings() | {"agent": to_dict(of_run.llm)},
        }
        own = {key: value for key, value in of_run.evaluate.items() if key not in _REPLACED}
        values = merged(merged(values, own), self.config.evaluate)
        return load_config(evaluate.EvaluateConfig, values=values | given | {"out": str(self.out / folder)})

    def stop_settings(self, searches: Mapping[str, Any]) -> evaluate.EvaluateConfig:
        """Each iteration's own agent and retriever on the split of the stop rule, with those before training if given.

        Raises:
            ConfigError: none of the agents is one of the run's own, agent-1, agent-2, ...
        """
        cells = [f"agent-{k}:retriever-{k}" for k in self._rounds()]
        if cells in ([], ["agent-0:retriever-0"]):
            raise ConfigError(f"stop_rule: expected agent-1, agent-2, ... among the agents {', '.join(self.agents)}")
        # `splits` of the run would take precedence over `split`.
        given = {"benchmarks": [self.benchmarks.main], "split": self.config.stop_rule, "splits": {}, "cells": cells}
        settings = self.settings(searches, "stop_rule", **given)
        file = split_file(self.run.phases.benchmark, self.config.stop_rule)
        if not file.is_file():  # the check of the inputs says so
            return settings
        # This split is often smaller than the test split, whose number of questions is asked of it at most.
        held = sum(1 for _ in read_questions(file, format=settings.format))
        first, drawn = (None if n is None else min(n, held) for n in (settings.first, settings.random))
        return replace(settings, first=first, random=drawn)

    def _find_stop(self, searches: Mapping[str, Any]) -> None:
        """Find where the loop should have stopped, on a split other than the test split; writes `stop_rule.json`.

        The retrievers must include the run's own, named retriever-1, retriever-2, ...
        """
        split = self.config.stop_rule
        evaluate.run(self.stop_settings(searches), resume=True)
        found = read_json(self.out / "stop_rule" / "matrix.json")["cells"]
        scores = [cell["metrics"]["agentic_em"]["mean"] for cell in found]
        if None in scores:
            raise ConfigError(f"stop_rule: split {split!r} has no gold answers to decide by")
        rounds = self._rounds()
        result = {"split": split, "iterations": rounds, "em": scores, "stops_at": rounds[stops_at(scores)]}
        write_json(self.out / "stop_rule.json", result)
        print(f"stop rule on {split}: K = {result['stops_at']}", flush=True)

    def _rounds(self) -> list[int]:
        """The iterations that are compared. 0 is what training started from: the first one may be worse."""
        start = [0] if "agent-0" in self.agents and "retriever-0" in self.config.retrievers else []
        return start + [k for k in range(1, self.run.config.iterations + 1) if f"agent-{k}" in self.agents]
