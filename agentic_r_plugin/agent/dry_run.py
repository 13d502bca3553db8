"""`agentic-r train-agent --dry-run`: all checks that a launch can make before it needs an accelerator.

Prints verl's resolved configuration, the memory estimate, and one line per check to stdout. A failed check does not
stop the others, so one run reports every problem.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from agentic_r_plugin.agent import dataset, memory_estimate, prepare, verl_config
from agentic_r_plugin.agent.checkpoints import latest_step
from agentic_r_plugin.agent.rewards import RewardSum
from agentic_r_plugin.agent.settings import TrainAgentConfig
from agentic_r_plugin.errors import AgenticRError, ConfigError
from agentic_r_plugin.protocol import load_protocol


def run(config: TrainAgentConfig) -> None:
    """Print configuration, estimate and checks; nothing is written.

    Raises:
        ConfigError: checks failed; the message gives their number.
    """
    checks = Checks()
    checks.make("protocol", lambda: load_protocol(config.protocol, config.protocol_options).description)
    if config.reward or config.reward_options:
        checks.make("reward", lambda: " + ".join(RewardSum(config.reward, config.reward_options).rewards))
    model = checks.make("model", lambda: _model(config))
    questions = checks.make("questions", lambda: prepare.training_questions(config), show=_describe)
    validation = checks.make("validation", lambda: prepare.validation_questions(config), show=_describe)
    lengths = checks.make("prompts", lambda: _lengths(config, questions, validation), show=_spread)
    probe = questions[0].record.question if questions else "test"
    checks.make("retrieval service", lambda: prepare.check_service(config, probe=probe))
    checks.make("output folder", lambda: _output_folder(config))
    checks.make("rollout engine", lambda: _engine(config))
    # Without model or data the prompt lengths are unknown; a placeholder lets the rest of the configuration be checked.
    known = lengths or [config.limits.max_tokens // 2]
    composed = checks.make(
        "verl configuration",
        lambda: prepare.compose(config, num_questions=len(questions or []) or config.batch_size, prompt_lengths=known)[
            0
        ],
        show=lambda _: "composed",
    )
    if composed is not None:
        print(OmegaConf.to_yaml(composed))
        checks.make("attention", lambda: verl_config.attention_of(composed))
    if composed is not None and model is not None:  # verl's checks load the model's configuration
        checks.make("verl's own checks", lambda: verl_config.validate(_with_critic(config, composed)))
        if not prepare.on_cpu(config):
            checks.make("memory", lambda: _memory(config, composed))
    print("\n".join(checks.lines))
    if checks.failed:
        raise ConfigError(f"dry run: {checks.failed} of {len(checks.lines)} checks failed; see the lines marked FAILED")


class Checks:
    """Runs checks and collects their results."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failed = 0

    def make(self, name: str, check: Callable[[], Any], show: Callable[[Any], str] = str) -> Any:
        """Run one check; return its result, or None if it failed."""
        try:
            found = check()
        except AgenticRError as error:
            self.failed += 1
            self.lines.append(f"FAILED  {name}: {error}")
            return None
        self.lines.append(f"ok      {name}: {show(found)}")
        return found


def _with_critic(config: TrainAgentConfig, composed: Any) -> Any:
    """Use the agent in place of a critic that only the launch will write: both have the same shape."""
    if not verl_config.starts_from_zero_critic(config):
        return composed
    shown = copy.deepcopy(composed)
    shown.critic.model.path = str(Path(config.model).resolve())
    return shown


def _model(config: TrainAgentConfig) -> str:
    for folder in (config.model, config.critic):
        if folder is not None:
            prepare.check_model(Path(folder))
    return str(Path(config.model).resolve())


def _lengths(config: TrainAgentConfig, questions: Any, validation: Any) -> list[int]:
    if questions is None:
        raise ConfigError("not checked, because the questions could not be read")
    prepare.check_model(Path(config.model))
    return prepare.fitting_questions(config, questions, validation).prompt_tokens


def _describe(questions: list[dataset.SourcedQuestion] | None) -> str:
    if questions is None:
        return "none"
    sources: dict[str, int] = {}
    for item in questions:
        sources[item.source] = sources.get(item.source, 0) + 1
    return ", ".join(f"{source} {count:,}" for source, count in sources.items())


def _spread(lengths: list[int]) -> str:
    return f"{min(lengths)} to {max(lengths)} tokens"


def _output_folder(config: TrainAgentConfig) -> str:
    folder = Path(config.out).resolve()
    if folder.exists():
        prepare.run_output(config).finished()  # raises if the folder belongs to another run
        step = latest_step(folder)
        return f"{folder} exists, its newest checkpoint is step {step}: continue with --resume"
    parent = next(item for item in folder.parents if item.exists())
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"out: {parent} cannot be written to")
    return f"{folder} will be created"


def _engine(config: TrainAgentConfig) -> str:
    """Name the rollout engine and its missing packages.

    They may be missing on a machine without an accelerator, which can only launch training on others.

    Raises:
        ConfigError: this machine has an accelerator, but packages needed to train on it are missing.
    """
    if prepare.on_cpu(config):
        return "hf, on the CPU"
    from agentic_r_plugin.agent.cpu import detect

    # cupy: verl's transfer of weights to separate rollout devices (NCCL) needs it.
    needed = [config.engine, *(["cupy"] if config.mode == "separate_async" else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    found = detect.accelerator()
    if found and not detect.torch_drives(found):
        missing.insert(0, "torch with CUDA")
    if not missing:
        return config.engine
    absent = f"{', '.join(missing)}: not installed here, required on machines that train (verl[{config.engine}])"
    if found:
        raise ConfigError(f"{absent}, and this machine has an accelerator ({found}); install that, or set cpu=true")
    return absent


def _memory(config: TrainAgentConfig, composed: Any) -> str:
    actor = memory_estimate.model_size(config.model)
    critic = memory_estimate.model_size(config.critic or config.model) if config.algorithm == "ppo" else None
    estimate = memory_estimate.estimate(composed, actor, critic, device_memory_gb=config.device_memory_gb)
    print(f"# Memory, estimated ({actor.parameters:,} weights)\n{estimate.table()}\n")
    if not estimate.fits:
        raise ConfigError(
            f"about {estimate.peak_gib:.0f} GiB are needed on a device of {estimate.device_gib:.0f} GiB; lower "
            "micro_batch_tokens or gpu_memory_utilization, set offload=true, or use more devices"
        )
    return f"fullest moment {estimate.peak_gib:.1f} of {estimate.device_gib:.1f} GiB"
