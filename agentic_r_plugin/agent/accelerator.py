"""Hydra overrides for verl on accelerators, derived from our settings; a comment gives the reason for each group."""

from __future__ import annotations

import importlib.util

from agentic_r_plugin.agent import packed_attention
from agentic_r_plugin.agent.cpu.detect import SWITCH
from agentic_r_plugin.agent.settings import TrainAgentConfig
from agentic_r_plugin.agent.verl_config import FSDP_SETTINGS, critic_tokens
from agentic_r_plugin.errors import ConfigError


def accelerator_overrides(config: TrainAgentConfig) -> list[str]:
    """Build the overrides for one machine or a Ray cluster; like those for the CPU, they precede the user's own.

    Raises:
        ConfigError: `tensor_parallel` does not divide the number of devices, the devices do not divide a mini-batch,
            or the rollout engine is not available.
    """
    _check_engine(config)
    _check_shares(config)
    offload = str(config.offload).lower()
    overrides = [
        f"actor_rollout_ref.rollout.name={config.engine}",
        f"actor_rollout_ref.rollout.tensor_model_parallel_size={config.tensor_parallel}",
        # The reference policy sees each batch only once, so it never has to stay on the device.
        "actor_rollout_ref.ref.fsdp_config.param_offload=true",
    ]
    for engine, fsdp in FSDP_SETTINGS.items():
        overrides += [f"{engine}.strategy=fsdp2", f"{fsdp}.strategy=fsdp2"]
        if config.precision != "auto":
            overrides.append(f"+{fsdp}.mixed_precision.param_dtype={config.precision}")
        if engine != "actor_rollout_ref.ref":
            overrides += [f"{fsdp}.param_offload={offload}", f"{fsdp}.optimizer_offload={offload}"]
    # Hydra refuses to add (`+`) a key twice, so the user's value replaces ours.
    if not any("attn_implementation" in item for item in config.verl):
        overrides += packed_attention.overrides(config.attention)
    if config.engine == "sglang":
        overrides.append("actor_rollout_ref.rollout.skip_tokenizer_init=false")  # its stop strings match text only
    if config.micro_batch_tokens:
        overrides += [
            "actor_rollout_ref.actor.use_dynamic_bsz=true",  # also applies to reference and old log-probabilities
            f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={config.micro_batch_tokens}",
        ]
    overrides += critic_tokens(config.micro_batch_tokens or config.micro_batch_size * config.limits.max_tokens)
    overrides += [
        # Join a running cluster only for multi-machine runs; by default Ray would search for one itself.
        f"+ray_kwargs.ray_init.address={'auto' if config.nodes + config.rollout_nodes > 1 else 'local'}",
        # Processes on other machines inherit the environment of `ray start`, and some of them see no accelerator.
        f"+ray_kwargs.ray_init.runtime_env.env_vars.{SWITCH}='0'",
    ]
    if config.lora_rank:
        overrides += [
            f"actor_rollout_ref.model.lora_rank={config.lora_rank}",
            f"actor_rollout_ref.model.lora_alpha={config.lora_alpha}",
            "actor_rollout_ref.model.target_modules=all-linear",
            # The engine loads the base weights from disk; after that only the adapters are sent to it.
            "actor_rollout_ref.rollout.load_format=safetensors",
            # Gather adapters layer by layer: verl's other method supports FSDP1 only.
            "actor_rollout_ref.rollout.layered_summon=true",
        ]
    if config.mode == "separate_async":
        overrides += [
            f"actor_rollout_ref.rollout.nnodes={config.rollout_nodes}",
            f"actor_rollout_ref.rollout.n_gpus_per_node={config.devices}",
            "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
            # verl requires batch_size = parameter_sync_step x mini_batch_size: one update per sampled mini-batch.
            f"trainer.v1.separate_async.parameter_sync_step={config.batch_size // config.mini_batch_size}",
        ]
    return overrides


def _check_engine(config: TrainAgentConfig) -> None:
    if config.engine == "sglang" and importlib.util.find_spec("sglang") is None:
        raise ConfigError(
            "engine=sglang: the package sglang is not installed here, and verl 0.9.1 cannot be installed with it: "
            "verl[sglang] requires sglang 0.5.12, which requires transformers 5.6.0, which verl excludes. Use "
            "engine=vllm, or install sglang against that exclusion (uv pip install --override) and try again"
        )


def _check_shares(config: TrainAgentConfig) -> None:
    world = config.devices * config.nodes
    devices = f"the {world} devices (devices x nodes)"
    if world % config.tensor_parallel:
        raise ConfigError(f"tensor_parallel={config.tensor_parallel} must divide {devices}")
    trajectories = config.mini_batch_size * config.samples
    if trajectories % world:
        raise ConfigError(f"{devices} must divide the {trajectories} trajectories of a mini-batch")
    if not config.micro_batch_tokens and trajectories // world % config.micro_batch_size:
        raise ConfigError(
            f"micro_batch_size={config.micro_batch_size} must divide the {trajectories // world} trajectories of a "
            "mini-batch that a device gets; or set micro_batch_tokens"
        )
