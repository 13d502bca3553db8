"""Compose verl's configuration from our settings, as Hydra overrides on verl's `ppo_trainer`.

Overrides in ascending precedence: `config/ppo.yaml`, the machine's overrides, the settings, the user's own overrides.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf, open_dict

from agentic_r_plugin.agent import packed_attention
from agentic_r_plugin.agent.settings import TrainAgentConfig
from agentic_r_plugin.config import flat
from agentic_r_plugin.errors import ConfigError, UpstreamError

_PPO_YAML = Path(__file__).parent / "config" / "ppo.yaml"
LOOP_NAME = "agentic_r"
"""Name of our agent loop in verl."""
ZERO_CRITIC = "critic-start"
"""Folder inside the run folder of the critic with a value head of zeros."""
FSDP_SETTINGS = {
    "actor_rollout_ref.actor": "actor_rollout_ref.actor.fsdp_config",
    "actor_rollout_ref.ref": "actor_rollout_ref.ref.fsdp_config",
    "critic": "critic.fsdp",
}
"""verl's training engines -> their FSDP settings."""


def agent_loop_yaml(config: TrainAgentConfig) -> str:
    """Content of the file at `rollout.agent.agent_loop_config_path`."""
    loop = {
        "name": LOOP_NAME,
        "_target_": "agentic_r_plugin.agent.agent_loop.SearchAgentLoop",
        "protocol": config.protocol,
        "protocol_options": config.protocol_options,
        "limits": asdict(config.limits),
        "retrieval_url": config.retrieval_url,
        "retrieval_token_env": config.retrieval_token_env,
        "topk": config.topk,
        "max_concurrent_searches": config.max_concurrent_searches,
        "search_timeout_s": config.search_timeout_s,
        "search_retries": config.search_retries,
        "mask_observations": config.mask_observations,
        "seed": config.sampling_seed if config.sampling_seed != -1 else config.seed if config.mode == "sync" else None,
        "reward": config.reward,
        "reward_options": config.reward_options,
    }
    return OmegaConf.to_yaml(OmegaConf.create([loop]))


def compose(
    config: TrainAgentConfig, *, machine: Sequence[str], num_questions: int, prompt_lengths: Sequence[int], fresh: bool
) -> Any:
    """Compose verl's configuration of a run.

    Args:
        machine: overrides for the machine, from `cpu.overrides.cpu_overrides()` or
            `accelerator.accelerator_overrides()`.
        num_questions: number of training questions.
        prompt_lengths: tokens of each training and validation prompt; with `limits.max_tokens` they determine verl's
            two length limits, so that verl never truncates anything.
        fresh: the run has no checkpoint yet, so it validates before the first step.

    Raises:
        ConfigError: verl's configuration rejects an override, or our attention cannot do what it asks for.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    settings = _settings(config, num_questions=num_questions, prompt_lengths=prompt_lengths, fresh=fresh)
    overrides = [
        *to_overrides(OmegaConf.to_container(OmegaConf.load(_PPO_YAML))),  # type: ignore[arg-type]
        *machine,
        *to_overrides(settings),
        *config.verl,
    ]
    # Hydra refuses a second initialisation; the calling program may have made one.
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(_verl_config_dir()), version_base=None):
            composed = hydra.compose("ppo_trainer", overrides)
        with open_dict(composed):
            OmegaConf.resolve(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"verl's configuration: {str(error).strip()}") from error
    attention_of(composed)
    return composed


def attention_of(composed: Any) -> str:
    """The attention that a composed configuration trains with.

    Raises:
        ConfigError: it is `packed_causal`, but the configuration asks for sequence parallelism or padded rows, which
            need flash attention in verl.
    """
    # Without an override, verl trains with flash attention.
    used = str(composed.actor_rollout_ref.model.override_config.get("attn_implementation", packed_attention.FLASH))
    if used != packed_attention.NAME:
        return used
    for engine, fsdp in FSDP_SETTINGS.items():
        settings = (OmegaConf.select(composed, engine), OmegaConf.select(composed, fsdp))
        size = max(of.get("ulysses_sequence_parallel_size", 1) for of in settings)
        if size > 1:
            raise ConfigError(
                f"{engine}: ulysses_sequence_parallel_size={size} needs flash-attn, which verl splits over devices; "
                f"the attention here is {used}. Install flash-attn, or leave the size at 1"
            )
    if not (composed.actor_rollout_ref.model.use_remove_padding and composed.critic.model.use_remove_padding):
        raise ConfigError(f"use_remove_padding=false: {used} attention takes packed rows; expected true")
    return used


def validate(composed: Any) -> str:
    """Run verl's `validate_config` as its own entry point does, and build its typed rollout configuration.

    Raises:
        ConfigError: verl rejects the configuration.
    """
    from hydra.errors import HydraException
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    # verl asks vLLM for the allowed LoRA ranks, but a machine that only launches need not have vLLM installed.
    unseen = bool(
        composed.actor_rollout_ref.model.lora_rank
        and composed.actor_rollout_ref.rollout.name == "vllm"
        and importlib.util.find_spec("vllm") is None
    )
    checked = copy.deepcopy(composed)
    if unseen:
        checked.actor_rollout_ref.rollout.name = "sglang"  # verl checks the rank for vLLM alone
    try:
        with contextlib.redirect_stdout(sys.stderr):  # verl prints; stdout is for --dry-run
            omega_conf_to_dataclass(checked.actor_rollout_ref.rollout)
            validate_config(
                checked, use_reference_policy=need_reference_policy(checked), use_critic=need_critic(checked)
            )
    except (AssertionError, ValueError, TypeError, OSError, HydraException) as error:
        raise ConfigError(f"verl refuses the configuration: {error}") from error
    return "passed" + (", but for LoRA's rank: vLLM is not installed here" if unseen else "")


def _verl_config_dir() -> Path:
    spec = importlib.util.find_spec("verl")
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    folder = Path(locations[0]) / "trainer" / "config" if locations else None
    if folder is None or not (folder / "ppo_trainer.yaml").is_file():
        raise UpstreamError(f"verl's configuration ppo_trainer.yaml was not found (looked in {folder}); install verl")
    return folder


def _settings(
    config: TrainAgentConfig, *, num_questions: int, prompt_lengths: Sequence[int], fresh: bool
) -> dict[str, Any]:
    """Map our settings to verl's names."""
    run_dir = Path(config.out).resolve()
    with_critic = config.algorithm == "ppo"
    validated = config.validation is not None
    data = run_dir / "data"
    return {
        "data": {
            "train_files": str(data / "train.parquet"),
            # verl always builds a validation set; without questions for it, test_freq=-1 leaves it unused.
            "val_files": str(data / ("validation.parquet" if validated else "train.parquet")),
            "train_batch_size": config.batch_size,
            "max_prompt_length": max(prompt_lengths),
            "max_response_length": config.limits.max_tokens - min(prompt_lengths),
            "seed": config.seed,
        },
        "actor_rollout_ref": _actor_rollout_ref(config, run_dir),
        "critic": {
            "enable": with_critic,
            "model": {"path": str(_critic_start(config).resolve())},
            "ppo_micro_batch_size_per_gpu": config.micro_batch_size,
            "data_loader_seed": config.seed,
            "optim": {"lr": config.critic_lr, "lr_warmup_steps_ratio": config.critic_warmup},
        },
        "algorithm": {
            "adv_estimator": "gae" if with_critic else "grpo",
            "use_kl_in_reward": with_critic and not config.kl_loss,
            "kl_ctrl": {"kl_coef": config.kl_coef},
        },
        "trainer": {
            "n_gpus_per_node": config.devices,
            "nnodes": config.nodes,
            "logger": list(config.loggers),
            "experiment_name": run_dir.name,
            "default_local_dir": str(run_dir / "checkpoints"),
            "total_training_steps": config.steps,
            # More epochs than needed: total_training_steps ends the training.
            "total_epochs": math.ceil(config.steps / max(1, num_questions // config.batch_size)) + 1,
            "save_freq": config.save_every,
            "test_freq": (config.validate_every or config.steps) if validated else -1,
            "val_before_train": validated and fresh,
            # verl updates the actor from this step number on.
            "critic_warmup": config.critic_only_steps + 1 if config.critic_only_steps else 0,
            "v1": {"trainer_mode": f"{LOOP_NAME}_{config.mode}"},
        },
        "agentic_r": {
            "run_dir": str(run_dir),
            "seed": config.seed,
            "max_failed_search_share": config.max_failed_search_share,
            "rollouts_per_step": config.rollouts_per_step,
            "keep_checkpoints": config.keep_checkpoints,
            "stability": asdict(config.stability),
        },
    }


def _actor_rollout_ref(config: TrainAgentConfig, run_dir: Path) -> dict[str, Any]:
    micro = {"log_prob_micro_batch_size_per_gpu": config.micro_batch_size}
    return {
        "model": {"path": str(Path(config.model).resolve())},
        "actor": {
            "ppo_mini_batch_size": config.mini_batch_size,
            "ppo_micro_batch_size_per_gpu": config.micro_batch_size,
            "use_kl_loss": config.kl_loss or config.algorithm == "grpo",
            "kl_loss_coef": config.kl_coef,
            "data_loader_seed": config.seed,
            "optim": {"lr": config.actor_lr, "lr_warmup_steps_ratio": config.actor_warmup},
        },
        "ref": dict(micro),
        "rollout": {
            **micro,
            "n": config.samples,
            "temperature": config.temperature,
            "seed": config.seed,
            # verl reserves one token of SGLang's context length, which the last turn may need.
            "max_model_len": config.limits.max_tokens + (config.engine == "sglang"),
            "agent": {"agent_loop_config_path": str(run_dir / "agent_loop.yaml")},
        },
    }


def critic_tokens(most: int) -> list[str]:
    """Overrides that limit the critic's packed micro-batches to `most` tokens per device.

    verl 0.9.1 (`PPOTrainer._init_workers` in `trainer/ppo/v1/trainer_base.py`) reads the size of all critic passes from
    a key that its configuration does not define, and ignores the critic's micro-batch size.
    """
    return [f"critic.ppo_max_token_len_per_gpu={most}", f"++critic.ppo_infer_max_token_len_per_gpu={most}"]


def starts_from_zero_critic(config: TrainAgentConfig) -> bool:
    """Whether `launch` writes an initial critic with a value head of zeros."""
    return config.algorithm == "ppo" and config.critic is None and config.value_head == "zero"


def _critic_start(config: TrainAgentConfig) -> Path:
    """Folder of the critic's initial weights."""
    if starts_from_zero_critic(config):
        return Path(config.out) / ZERO_CRITIC
    return Path(config.critic or config.model)


def to_overrides(tree: Mapping[str, Any]) -> list[str]:
    """Convert a nested mapping to Hydra overrides that set or add each leaf.

    >>> to_overrides({"a": {"b": 1, "c": [True, None]}, "d": "x y"})
    ['++a.b=1', '++a.c=[true,null]', "++d='x y'"]
    """
    return [f"++{name}={_literal(value)}" for name, value in flat(tree)]


def _literal(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(_literal(item) for item in value) + "]"
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
