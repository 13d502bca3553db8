"""The configuration of every phase of the loop, composed from `IterateConfig`, and where its files are.

Nothing is run here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from agentic_r_plugin.agent.settings import TrainAgentConfig
from agentic_r_plugin.config import deciding, flat, load_config, merged, to_dict
from agentic_r_plugin.data import candidates, correctness, groups, relevance, sub_answers, trajectories
from agentic_r_plugin.data.groups import GroupsConfig
from agentic_r_plugin.data.selection import selection_named
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.evaluation.benchmarks import split_file
from agentic_r_plugin.evaluation.evaluate import EvaluateConfig
from agentic_r_plugin.loop.settings import IterateConfig
from agentic_r_plugin.query import DEFAULT_FORMULATION, needs_reasoning
from agentic_r_plugin.retriever.settings import TrainRetrieverConfig
from agentic_r_plugin.search.corpus import corpus_file
from agentic_r_plugin.search.indexing.index import IndexConfig
from agentic_r_plugin.search.service.server import ServeConfig
from agentic_r_plugin.storage.fingerprints import path_fingerprint
from agentic_r_plugin.world.settings import WorldConfig

NOT_YET, URL = "x", "http://127.0.0.1:1"
"""Placeholders for the loop's own models, indexes and groups, and for its retrieval service (`Phases.planned`)."""

_STAGE_CONFIG: dict[str, Any] = {
    item.name: item.metadata["section"] for item in fields(IterateConfig) if "section" in item.metadata
}
"""Section -> the class of its settings."""


class Phases:
    """The configuration of every phase: its section, over what the loop fills in, under the paths of the run folder."""

    def __init__(self, config: IterateConfig) -> None:
        self.config = config
        self.folder = Path(config.out)
        self.benchmark = Path(config.benchmark) if config.benchmark else self.folder / "benchmark" / "fictional_world"
        self.corpus = Path(config.corpus) if config.corpus else corpus_file(self.benchmark)

    # --- files

    def iteration(self, k: int) -> Path:
        """Folder of iteration k."""
        return self.folder / f"iteration-{k}"

    def index_folder(self, k: int) -> Path:
        """The corpus, encoded with retriever k."""
        return self.iteration(k) / "index"

    def agent(self, k: int) -> str:
        """Folder of agent k; without PPO, the given agent."""
        trained = k > 0 and self.config.train_agents
        return str(self.iteration(k) / "agent" / "agent") if trained else self.config.agent

    def retriever(self, k: int) -> str:
        """Folder of retriever k; retriever 0 is the given one."""
        return str(self.iteration(k) / "retriever") if k > 0 else self.config.retriever

    def data(self, k: int, stage: str) -> Path:
        """Output of a data stage."""
        return self.iteration(k) / "data" / f"{_section(stage)}.jsonl"

    def questions(self, split: str) -> str:
        """Question file of a split of the benchmark."""
        with suppress(ConfigError):
            return str(split_file(self.benchmark, split))
        return str(self.benchmark / f"{split}.jsonl")  # the world is not generated yet

    # --- configurations

    def stages(self) -> dict[str, ModuleType]:
        """Data stage -> module; of relevance and correctness, those that the selection or the trainer reads."""
        trainer = self.config.train_retriever
        read = {"relevance"} if _reads_scores(trainer) else set()
        # A section of the trainer that names `relevance` or `correctness` reads that file, too.
        chosen = {"candidates": NOT_YET, "out": NOT_YET} | self.config.groups
        read |= trainer.keys() | load_config(GroupsConfig, values=chosen).files().keys()
        if "correctness" in read and not self.config.correctness.get("exhaustive"):
            read.add("relevance")  # it prunes
        judge = {"sub-answers": sub_answers} if self.config.judge else {}
        scores = {"relevance": relevance, "correctness": correctness}
        return {
            "trajectories": trajectories,
            "candidates": candidates,
            **judge,
            **{name: module for name, module in scores.items() if name in read},
            "groups": groups,
        }

    def protocol_settings(self) -> dict[str, Any]:
        """Protocol, its options, limits and topk, for every phase in which the agent acts."""
        config = self.config
        return {
            "protocol": config.protocol,
            "protocol_options": config.protocol_options,
            "limits": to_dict(config.limits),
            "topk": config.topk,
        }

    def world(self) -> WorldConfig:
        """The generated benchmark."""
        return replace(self.config.world, out=str(self.benchmark.parent), name=self.benchmark.name)

    def index(self, k: int, retriever: str) -> IndexConfig:
        """Encoding of the corpus with retriever k."""
        values = {"corpus": str(self.corpus), "retriever": retriever, "out": str(self.index_folder(k))}
        return load_config(IndexConfig, values=self.config.index | values)

    def serve(self, index_dir: str) -> ServeConfig:
        """The retrieval service on an index."""
        return replace(self.config.serve, index=index_dir)

    def train_agent(self, k: int, agent: str, url: str) -> TrainAgentConfig:
        """PPO that trains agent k, starting from `agent` and searching at `url`."""
        config = self.config
        section = merged(config.train_agent, config.train_agent_later if k > 1 else {})
        known = {"seed": self._seed(k), "retrieval_token_env": config.serve.token_env, "format": config.format}
        paths = {
            "model": agent,
            "questions": self.questions(config.train_split),
            "retrieval_url": url,
            "out": str(self.iteration(k) / "agent"),
        }
        if config.dev_split:
            paths["validation"] = self.questions(config.dev_split)
        if k > 1 and config.critic_from == "previous":
            paths["critic"] = str(self.iteration(k - 1) / "agent" / "critic")
        values = merged(known | self.protocol_settings(), section)
        return load_config(TrainAgentConfig, values=values | paths)

    def stage(self, k: int, name: str, agent: str, url: str) -> Any:
        """A data stage with agent k and the retrieval service at `url`."""
        config, cls = self.config, _STAGE_CONFIG[_section(name)]
        section = getattr(config, _section(name))
        # What any stage may need; each stage gets the fields that it has (`own` below).
        known: dict[str, Any] = {
            "in_": self.questions(config.train_split) if name == "trajectories" else str(self.data(k, "trajectories")),
            "out": str(self.data(k, name)),
            "candidates": str(self.data(k, "candidates")),
            "relevance": "" if section.get("exhaustive") else str(self.data(k, "relevance")),
            "correctness": str(self.data(k, "correctness")),
            "corpus": str(self.corpus),
            "questions": self.questions(config.train_split),
            "sub_answers": str(self.data(k, "sub-answers")) if config.judge else "",
            "search": self._search(section, url),
            "seed": self._seed(k),
            "protocol": config.protocol,
            "protocol_options": config.protocol_options,
            "format": config.format,
            "reasoning": needs_reasoning(config.train_retriever.get("formulation") or DEFAULT_FORMULATION),
        }
        if name in ("trajectories", "correctness"):
            known |= self.protocol_settings() | {"llm": to_dict(config.llm) | {"model": agent}}
        if name == "correctness" and "preset" in config.groups:
            known["preset"] = config.groups["preset"]  # the pruning must match the rule of the groups
        if name == "groups" and "trajectories" in selection_named(section.get("preset", "paper")).needs:
            known["trajectories"] = str(self.data(k, "trajectories"))
        own = {item.name for item in fields(cls)}
        return load_config(cls, values=merged({key: value for key, value in known.items() if key in own}, section))

    def _search(self, section: Mapping[str, Any], url: str) -> dict[str, Any]:
        search: dict[str, Any] = {"backend": "service", "url": url}
        # The token belongs to the loop's own service and must not be sent to any other.
        if self.config.serve.token_env and not section.get("search", {}).keys() & {"backend", "url"}:
            search["options"] = {"token_env": self.config.serve.token_env}
        return search

    def train_retriever(
        self, k: int, start: str, training_groups: str, changes: Mapping[str, Any] = MappingProxyType({})
    ) -> TrainRetrieverConfig:
        """Training of retriever k, starting from `start`; `changes` override the section."""
        values = {"seed": self._seed(k)} | self.config.train_retriever | dict(changes)
        if _reads_scores(values):
            values = {"relevance": str(self.data(k, "relevance"))} | values
        paths = {"groups": training_groups, "corpus": str(self.corpus), "retriever": start, "out": self.retriever(k)}
        return load_config(TrainRetrieverConfig, values=values | paths)

    def evaluate(self, agents: Iterable[str], indexes: Iterable[str]) -> EvaluateConfig:
        """Agents x retrievers, each from 0 on, on the test split."""
        values = {
            "out": str(self.folder / "evaluation"),
            "data_dir": str(self.benchmark.parent),
            "benchmarks": [self.benchmark.name],
            "split": self.config.test_split,
            "format": self.config.format,
            "agents": {f"agent-{k}": agent for k, agent in enumerate(agents)},
            "searches": {f"retriever-{k}": index for k, index in enumerate(indexes)},
            "settings": self.protocol_settings() | {"agent": to_dict(self.config.llm)},
        }
        return load_config(EvaluateConfig, values=merged(values, self.config.evaluate))

    def _seed(self, k: int) -> int:
        """Seed of iteration k. It differs between iterations, so that each draws other samples."""
        return self.config.seed + k - 1

    # --- all of them, before the start

    @cached_property
    def planned(self) -> dict[str, Any]:
        """Section -> configuration of the phase in the first iteration (`train_agent_later`: in the second).

        Models, indexes and the service that do not exist yet are placeholders.
        """
        of_all = [NOT_YET] * (self.config.iterations + 1)
        world = {} if self.config.benchmark else {"world": self.world()}
        return {
            **world,
            "index": self.index(0, NOT_YET),
            "serve": self.serve(NOT_YET),
            "train_agent": self.train_agent(1, NOT_YET, URL),
            "train_agent_later": self.train_agent(2, NOT_YET, URL),
            **{_section(name): self.stage(1, name, NOT_YET, URL) for name in self.stages()},
            "train_retriever": self.train_retriever(1, NOT_YET, NOT_YET),
            "evaluate": self.evaluate(of_all, of_all),
        }

    def made_from(self) -> dict[str, Any]:
        """What decides the results: settings, and contents of the given agent, retriever and questions.

        Finished phases are not run again, so these are compared here. The manifests of the indexes record the corpus.
        """
        config = self.config
        given = {"agent": config.agent, "retriever": config.retriever}
        if config.benchmark:
            for split in filter(None, (config.train_split, config.dev_split, config.test_split)):
                given[f"questions of {split}"] = self.questions(split)
        return self.deciding() | {f"contents of {name}": path_fingerprint(where) for name, where in given.items()}

    def deciding(self) -> dict[str, Any]:
        """Settings that can change the results, by dotted name.

        For a section these are the settings of the phases composed from it. Each command's fields declare which count.
        """
        of_phases = {name: deciding(phase, names=True) for name, phase in self.planned.items()}
        return dict(flat(deciding(self.config) | of_phases))


def _section(stage: str) -> str:
    return stage.replace("-", "_")


def _reads_scores(train_retriever: Mapping[str, Any]) -> bool:
    """Whether the trainer learns from scores in addition to groups."""
    return bool(train_retriever.get("trainer", "contrastive") != "contrastive")
