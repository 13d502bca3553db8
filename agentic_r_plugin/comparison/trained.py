"""How one retriever is trained in an experiment: the settings of each stage, and where its files are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from agentic_r_plugin.comparison.benchmarks import Benchmarks
from agentic_r_plugin.comparison.settings import ExperimentConfig
from agentic_r_plugin.config import load_config, merged, to_dict
from agentic_r_plugin.data.correctness import CorrectnessConfig
from agentic_r_plugin.data.groups import GroupsConfig, check_pruned
from agentic_r_plugin.data.relevance import RelevanceConfig
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.retriever.settings import TrainRetrieverConfig


class TrainedRetriever:
    """One retriever: the run's settings of each stage with the changes of its plan.

    Stages that the plan does not change are not run again: their files are the run's.
    """

    def __init__(self, config: ExperimentConfig, benchmarks: Benchmarks, name: str) -> None:
        self.name, self.plan, self.run = name, config.retrievers[name], benchmarks.run
        self.corpus = str(benchmarks.corpus(benchmarks.main))
        self.out = Path(config.out)
        self.home = self.out / "retrievers" / name

    @cached_property
    def reads(self) -> set[str]:
        """Files that the selection of its groups reads, in addition to the candidates."""
        return set(self._groups().files())

    @property
    def rolls_out(self) -> bool:
        """Whether its correctness is not the run's."""
        return bool(self.plan.exhaustive or (self.plan.rolls_out and "correctness" in self.reads))

    def file(self, name: str) -> Path:
        """Candidates, relevance, correctness or groups: its own, the run's, or correctness that retrievers share."""
        own = (
            (name == "relevance" and (self.plan.sampled or self.plan.relevance))
            or (name == "correctness" and self.rolls_out)
            or (name == "groups" and self.plan.regroups)
        )
        if not own:
            return self.run.data(name)
        shared = name == "correctness" and self.plan.exhaustive
        return (self.out if shared else self.home) / f"{name}.jsonl"

    def check(self) -> None:
        """Compose every stage.

        Raises:
            ConfigError: a wrong setting, or the run lacks data that are needed.
        """
        of_run = {name for name in self.reads if self.file(name) == self.run.data(name)}
        if self.plan.sampled:
            of_run.add("relevance")
        self.run.require_data(f"retrievers.{self.name}", "candidates", "groups", *sorted(of_run))
        if "correctness" in of_run:
            self._check_pruned()
        if self.plan.relevance:
            self.relevance().check()
        if self.rolls_out:
            self.correctness("").check()
        self.train()

    def _check_pruned(self) -> None:
        """Check that the run's correctness was not pruned more than the groups allow."""
        rolled_out = self.run.stage("correctness")
        if not rolled_out.exhaustive:
            try:
                check_pruned(self._groups().rule(), rolled_out.rule())
            except ConfigError as error:
                raise ConfigError(f"retrievers.{self.name}: {error} (or exhaustive: true here)") from error

    def relevance(self) -> RelevanceConfig:
        """Scores of the run's candidates."""
        own = to_dict(self.run.stage("relevance"))
        if self.plan.relevance.get("scorer", own["scorer"]) != own["scorer"]:
            own["options"] = {}  # they belong to the run's scorer
        files = {"candidates": str(self.file("candidates")), "out": str(self.file("relevance"))}
        return load_config(RelevanceConfig, values=merged(own, self.plan.relevance) | files)

    def correctness(self, url: str) -> CorrectnessConfig:
        """Correctness of the run's candidates, by the loop's agent, with the retrieval service at `url`."""
        changed = merged(to_dict(self.run.stage("correctness", url)), self.plan.correctness)
        values = {
            "candidates": str(self.file("candidates")),
            "relevance": "" if self.plan.exhaustive else str(self.file("relevance")),
            "exhaustive": self.plan.exhaustive,
            "preset": self._groups().preset,  # the pruning must match the rule of the groups
            "corpus": self.corpus,
            "out": str(self.file("correctness")),
        }
        return load_config(CorrectnessConfig, values=changed | values)

    def groups(self) -> GroupsConfig:
        """Selection of the groups from the plan's files."""
        return self._groups({name: str(self.file(name)) for name in ("candidates", "relevance", "correctness")})

    def _groups(self, files: Mapping[str, str] = MappingProxyType({})) -> GroupsConfig:
        own = to_dict(self.run.stage("groups")) | {"trajectories": str(self.run.data("trajectories"))}
        out = {"out": str(self.home / "groups.jsonl")}
        return load_config(GroupsConfig, values=own | dict(files) | self.plan.groups | out)

    def train(self) -> TrainRetrieverConfig:
        """The loop's training of the iteration's retriever."""
        # The weights from which the loop trained its retriever, so that only the plan's changes differ.
        first = "retriever-0" if self.run.config.retriever_from == "first" else self.run.first_retriever
        start = self.plan.train.get("retriever") or self.run.model(first, "retriever")
        made = self.run.phases.train_retriever(self.run.iteration, start, str(self.file("groups")), self.plan.train)
        if self.plan.relevance and made.relevance:
            made = replace(made, relevance=str(self.file("relevance")))
        return replace(made, corpus=self.corpus, out=str(self.home / "retriever"))
