"""Checks of a loop before anything runs: of its settings, and of the files and models that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from agentic_r_plugin import components
from agentic_r_plugin.agent.settings import TrainAgentConfig
from agentic_r_plugin.credentials import read_secret
from agentic_r_plugin.data.groups import check_pruned
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.evaluation import evaluate
from agentic_r_plugin.loop.phases import NOT_YET, URL, Phases
from agentic_r_plugin.loop.settings import IterateConfig
from agentic_r_plugin.net import is_loopback
from agentic_r_plugin.protocol import load_protocol


def check_settings(phases: Phases) -> None:
    """Compose every phase, so that a wrong key is found at the start, and check that they fit together.

    Raises:
        ConfigError: a section holds an unknown key or a wrong value, or phases contradict each other.
    """
    _check_sections(phases.config)
    _check_stages(phases.planned)
    _check_reach(phases.planned)
    components.load("retriever_trainer", phases.planned["train_retriever"].trainer)
    load_protocol(phases.config.protocol, phases.config.protocol_options)
    _check_world(phases.config)


def check_files(phases: Phases) -> None:
    """Check that everything that the loop starts from exists.

    Raises:
        ConfigError: files, models or the service's token do not exist; the message names all of them.
    """
    config, missing = phases.config, []
    for split in filter(None, (config.train_split, config.dev_split, config.test_split)):
        if config.benchmark and not Path(phases.questions(split)).is_file():
            missing.append(f"benchmark: {phases.questions(split)} does not exist")
    try:
        read_secret(config.serve.token_env, "serve.token_env")
    except ConfigError as error:
        missing.append(str(error))
    if (config.benchmark or config.corpus) and not phases.corpus.exists():
        missing.append(f"corpus: {phases.corpus} does not exist")
    if config.retriever.startswith("builtin:"):
        from agentic_r_plugin.search.encoder import resolve

        try:
            resolve(config.retriever)
        except ConfigError as error:
            missing.append(f"retriever: {error}")
    if not Path(config.agent).is_dir():
        missing.append(f"agent: {config.agent} is not a folder")
    for name in ("sub_answers", "relevance"):
        judge = phases.planned[name].llm.model if name in phases.planned else ""
        # Only names that look like a path: others may be models on the hub.
        if judge.startswith(("/", "./", "models/")) and not Path(judge).exists():
            missing.append(f"{name}.llm.model: {judge} does not exist")
    try:
        _check_evaluation(phases)
    except ConfigError as error:
        missing.append(f"evaluate: {error}")
    if missing:
        raise ConfigError("; ".join(missing))


def _check_world(config: IterateConfig) -> None:
    """Check that the splits are those of a generated world and hold questions."""
    if config.benchmark:
        return
    splits = {"train_split": config.train_split, "test_split": config.test_split}
    if config.train_agents and config.dev_split:
        splits["dev_split"] = config.dev_split
    for name, split in splits.items():
        if split not in ("train", "dev", "test"):
            raise ConfigError(f"{name}: the generated world has the splits train, dev and test, found {split!r}")
        if getattr(config.world, f"{split}_questions") < 1:
            raise ConfigError(f"world.{split}_questions: expected at least 1, for {name}={split}, found 0")


def _check_sections(config: IterateConfig) -> None:
    """Refuse locations of outputs, and presets of PPO that would override the loop's limits."""
    for item in fields(config):
        section = getattr(config, item.name)
        out = section.get("out") if isinstance(section, dict) else getattr(section, "out", "")
        if out and item.name != "report":  # the report may be written elsewhere
            raise ConfigError(
                f"{item.name}.out: not a setting of the loop, whose run folder holds every output; set out"
            )
    if config.evaluate.get("tables") is False:
        raise ConfigError("evaluate.tables: the loop reads the tables; leave it on")
    for name in ("train_agent", "train_agent_later"):
        preset = getattr(config, name).get("preset", "paper")
        held = dict(TrainAgentConfig.PRESETS.get(preset, {}))
        if held:
            limits = [f"limits.{key}={value}" for key, value in held.pop("limits", {}).items()]
            rest = [f"{name}.{key}={value}" for key, value in held.items()]
            raise ConfigError(
                f"{name}.preset={preset}: expected paper, because the limits of the loop hold for PPO, data and "
                f"evaluation alike and not for PPO alone; set its values instead: {' '.join([*limits, *rest])}"
            )


def _check_stages(planned: Mapping[str, Any]) -> None:
    """Check each data stage, that judges have a model, and that every candidate that the groups need is rolled out."""
    for name in planned.keys() & {"relevance", "correctness", "groups"}:
        planned[name].check()
    # No passages per prompt: the scorer asks no language model.
    judged = ["relevance"] if "relevance" in planned and planned["relevance"].passages_per_prompt() else []
    for name in [*judged, *(planned.keys() & {"sub_answers"})]:
        if not planned[name].llm.model:
            raise ConfigError(f"{name}.llm.model: expected the judge, found nothing")
    rule, rolled_out = planned["groups"].rule(), planned.get("correctness")
    if rolled_out and rule.use_correctness and not rolled_out.exhaustive:
        check_pruned(rule, rolled_out.rule())


def _check_reach(planned: Mapping[str, Any]) -> None:
    """Check that workers on other machines can reach the retrieval service."""
    host = planned["serve"].host
    if not is_loopback(host):
        return
    searching = [name for name in ("trajectories", "candidates", "correctness") if name in planned]
    far = [
        f"{name}.runner.address={planned[name].runner.address}"
        for name in searching
        if planned[name].search.url == URL and planned[name].runner.elsewhere  # the loop's own service
    ]
    ppo = (planned["train_agent"], planned["train_agent_later"])
    if any(settings.nodes + settings.rollout_nodes > 1 for settings in ppo):
        far.append("train_agent on several machines")
    if far:
        raise ConfigError(
            f"serve.host={host}: other machines cannot reach it, and there is {', '.join(far)}; set "
            "serve.host=0.0.0.0 (or this machine's address) and serve.token_env=NAME, a variable that is exported "
            "here and before `ray start` on every machine"
        )


def _check_evaluation(phases: Phases) -> None:
    """Check benchmarks, and agents and retrievers from outside the loop. A world not yet generated is skipped."""
    config = phases.planned["evaluate"]
    made_here = {name for name, where in (config.agents | config.searches).items() if where == NOT_YET}
    if phases.config.benchmark or config.data_dir != str(phases.benchmark.parent):
        evaluate.check_inputs(config, later=made_here)
