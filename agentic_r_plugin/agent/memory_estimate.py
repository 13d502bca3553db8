"""Estimate the memory that a training run needs from verl's configuration, without an accelerator.

Weights, gradients and optimizer states are counted exactly. Activations and logits are derived from the model's shape
for one micro-batch of the longest trajectories. CUDA, NCCL and fragmentation are covered by a flat `RESERVE_GIB`.
Device memory peaks either while sampling (rollout engine plus everything that is not offloaded) or during the update
of the actor or the critic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentic_r_plugin.errors import ConfigError

GIB = 2**30
RESERVE_GIB = 4.0
_MASTER_BYTES = {"fp32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2}
_ADAM_BYTES = 8
"""Two float32 moments per weight."""
_LINEAR_SHAPES = 7
"""Linear layers per block: query, key, value, output, gate, up, down."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The dimensions of a language model that determine its memory."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    embeddings: int
    """Matrices of vocabulary x hidden weights: embedding and output, or one for both."""

    @property
    def per_layer(self) -> int:
        """Approximate number of weights per block, the unit that FSDP gathers."""
        blocks = self.parameters - self.embeddings * self.vocabulary * self.hidden
        return blocks // max(1, self.layers)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """GiB by purpose: for each moment on one device, and for the main memory of one machine."""

    moments: Mapping[str, Mapping[str, float]]
    host: Mapping[str, float]
    device_gib: float

    @property
    def peak_gib(self) -> float:
        """GiB needed on a device at the fullest moment."""
        return max(sum(parts.values()) for parts in self.moments.values())

    @property
    def fits(self) -> bool:
        """Whether the fullest moment fits into one device."""
        return self.peak_gib <= self.device_gib

    def table(self) -> str:
        """Format the estimate as text."""
        lines = []
        for moment, parts in {**self.moments, "main memory of a machine": self.host}.items():
            lines.append(f"{moment}: {sum(parts.values()):.1f} GiB")
            lines += [f"    {name:<34}{gib:7.1f}" for name, gib in parts.items() if gib >= 0.05]
        word = "fits into" if self.fits else "DOES NOT FIT into"
        return "\n".join(
            [*lines, f"fullest moment {self.peak_gib:.1f} GiB {word} a device of {self.device_gib:.1f} GiB"]
        )


def model_size(folder: str | Path) -> ModelSize:
    """Read a model's shape from its `config.json`, without loading weights.

    Raises:
        ConfigError: transformers cannot read the configuration.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {folder}/config.json: {error}") from error
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        embeddings=1 if config.tie_word_embeddings else 2,
    )


def estimate(composed: Any, actor: ModelSize, critic: ModelSize | None, *, device_memory_gb: float) -> MemoryEstimate:
    """Estimate the memory of a run.

    Args:
        composed: verl's composed configuration.
        actor: shape of the agent, and of the reference policy.
        critic: shape of the critic; None without one.
        device_memory_gb: memory of one accelerator in units of 10^9 bytes, as vendors count.
    """
    trainer, policy = composed.trainer, composed.actor_rollout_ref
    world = trainer.nnodes * trainer.n_gpus_per_node
    device_gib = device_memory_gb * 1e9 / GIB
    roles = {"actor": _role(actor, policy.actor.fsdp_config, world, _lora(composed, actor))}
    if critic is not None:
        roles["critic"] = _role(critic, composed.critic.fsdp, world, None)
    reference = _reference(composed, actor, world)
    resting = {f"{name}, not offloaded": role.resting for name, role in roles.items()}
    resting["reference policy, not offloaded"] = 0.0 if policy.ref.fsdp_config.param_offload else reference
    engine = {"rollout engine (gpu_memory_utilization)": policy.rollout.gpu_memory_utilization * device_gib}
    moments: dict[str, dict[str, float]] = {"sampling": {**engine, **resting, "reserve": RESERVE_GIB}}
    for name, role in roles.items():
        # The model being updated is on the device in full; the others hold only what is not offloaded.
        others = {part: gib for part, gib in resting.items() if not part.startswith(name)}
        moments[f"update of the {name}"] = {
            "weights": role.weights,
            "gradients": role.gradients,
            "optimizer": role.optimizer,
            **_activations(composed, role.size, name),
            **others,
            "reserve": RESERVE_GIB,
        }
    devices = trainer.n_gpus_per_node
    host = {f"{name}, offloaded": devices * role.offloaded for name, role in roles.items()}
    host["reference policy, offloaded"] = devices * reference * bool(policy.ref.fsdp_config.param_offload)
    return MemoryEstimate(moments=moments, host=host, device_gib=device_gib)


def _reference(composed: Any, actor: ModelSize, world: int) -> float:
    """GiB of the reference policy on one device, if it is not offloaded."""
    policy = composed.actor_rollout_ref
    used = composed.algorithm.use_kl_in_reward or policy.actor.use_kl_loss
    # With LoRA the reference policy is the actor with its adapters disabled: no second copy of the weights.
    if not used or policy.model.lora_rank:
        return 0.0
    return _bytes(policy.ref.fsdp_config) * actor.parameters / world / GIB


def _bytes(fsdp: Any) -> int:
    return _MASTER_BYTES.get(str(fsdp.model_dtype), 4)


def _lora(composed: Any, size: ModelSize) -> int | None:
    """Number of weights trained with LoRA on all linear layers; None without LoRA."""
    rank = composed.actor_rollout_ref.model.lora_rank
    if not rank:
        return None
    # Adapters of an (in, out) layer have rank * (in + out) weights; this is summed over the linear layers of a block.
    # Grouped-query attention has narrower keys and values, so this is an upper bound.
    return int(size.layers * rank * (_LINEAR_SHAPES * size.hidden + 3 * size.intermediate + 4 * size.hidden))


@dataclass(frozen=True, kw_only=True)
class _Role:
    """A model that is trained: GiB of its weights, gradients and optimizer states on one device."""

    size: ModelSize
    fsdp: Any
    weights: float
    gradients: float
    optimizer: float

    @property
    def offloaded(self) -> float:
        """What is in main memory between updates, for one device."""
        return self.weights * bool(self.fsdp.param_offload) + self.optimizer * bool(self.fsdp.optimizer_offload)

    @property
    def resting(self) -> float:
        """What is on the device between updates; gradients exist only during one."""
        return self.weights * (not self.fsdp.param_offload) + self.optimizer * (not self.fsdp.optimizer_offload)


def _role(size: ModelSize, fsdp: Any, world: int, adapters: int | None) -> _Role:
    """The memory of one model; FSDP shards all of it.

    Args:
        adapters: number of weights trained with LoRA; None: all weights are trained.
    """
    learning = size.parameters if adapters is None else adapters
    return _Role(
        size=size,
        fsdp=fsdp,
        weights=(_bytes(fsdp) * size.parameters + 4 * (adapters or 0)) / world / GIB,  # adapters are float32
        gradients=4 * learning / world / GIB,
        optimizer=_ADAM_BYTES * learning / world / GIB,
    )


def _activations(composed: Any, size: ModelSize, role: str) -> dict[str, float]:
    """GiB of the forward and backward pass of one micro-batch in bfloat16."""
    actor = composed.actor_rollout_ref.actor
    model = composed.actor_rollout_ref.model if role == "actor" else composed.critic.model
    longest = composed.data.max_prompt_length + composed.data.max_response_length
    longest = min(longest, composed.actor_rollout_ref.rollout.max_model_len or longest)
    if role == "critic":
        # The key from which verl reads the size of all critic passes (`verl_config.critic_tokens`).
        tokens = composed.critic.ppo_infer_max_token_len_per_gpu
    else:
        packed = actor.use_dynamic_bsz
        tokens = actor.ppo_max_token_len_per_gpu if packed else actor.ppo_micro_batch_size_per_gpu * longest
    # Per token and block, 2 bytes each: about 8 vectors of the hidden size and 3 of the MLP's. Checkpointing keeps only
    # each block's input and recomputes one block at a time.
    inside = 2 * (8 * size.hidden + 3 * size.intermediate)
    kept = 2 * size.hidden * size.layers if model.enable_gradient_checkpointing else inside * size.layers
    return {
        # bfloat16, 2 bytes; FSDP gathers the next block while it computes this one
        "gathered block, twice": 2 * 2 * size.per_layer / GIB,
        "activations": tokens * (kept + inside) / GIB,
        # bfloat16 logits and their gradient, plus a float32 copy for log-probabilities and entropy
        "logits": tokens * size.vocabulary * 8 / GIB if role == "actor" else 0.0,
    }
