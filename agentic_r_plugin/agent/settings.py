"""Settings of `agentic-r train-agent`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from agentic_r_plugin.agent.stability import StabilityRule
from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, setting
from agentic_r_plugin.credentials import refuse_secrets
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.questions import FORMAT

ALGORITHMS = ("ppo", "grpo")
MODES = ("sync", "colocate_async", "separate_async")
ENGINES = ("vllm", "sglang")
PRECISIONS = ("auto", "float32", "bfloat16")
VALUE_HEADS = ("random", "zero")


_MEMORY_OF_VERL = (
    "gpu_memory_utilization", "max_token_len_per_gpu", "micro_batch_size_per_gpu", "_offload", "enforce_eager",
    "max_num_seqs", "max_num_batched_tokens",
)  # fmt: skip
"""Suffixes of verl's keys that affect memory use but not what is learnt."""


def _deciding_overrides(overrides: list[str]) -> list[str]:
    return [item for item in overrides if not item.partition("=")[0].endswith(_MEMORY_OF_VERL)]


@dataclass(frozen=True, kw_only=True)
class TrainAgentConfig:
    """Train the agent with PPO in verl; defaults are the paper's (method section 6)."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "released_code": {
            "steps": 400,
            "limits": {"max_searches": 4, "max_response_tokens": 800, "max_observation_tokens": 800},
        },
    }
    """Values that replace the defaults; a file, flags and overrides take precedence."""

    preset: str = setting(
        "paper, or released_code: 4 searches, 800 tokens per turn and observation, 400 steps", default="paper"
    )
    model: str = setting("folder of the agent to start from (Hugging Face format)", BY_CONTENTS, default=MISSING)
    questions: str = setting("training questions", BY_CONTENTS, default=MISSING)
    format: str = field(default="", metadata=FORMAT)
    retrieval_url: str = setting("address of the retrieval service", FREE, default=MISSING)
    retrieval_token_env: str = setting(
        "environment variable that holds the service's token; workers of a Ray cluster need it, too", FREE, default=""
    )
    out: str = setting("folder of the run; the trained agent is written to OUT/agent", FREE, default=MISSING)
    validation: str | None = setting("questions to validate on; none: no validation", BY_CONTENTS, default=None)
    validation_questions: int = setting(
        "use only N validation questions, the same draw for every seed; 0: all", default=0
    )
    critic: str | None = setting(
        "folder of a critic to start from; none: the agent with a new value head", BY_CONTENTS, default=None
    )
    value_head: str = setting(
        "how a new value head starts: random (verl's), or zero: values are 0 at first", default="random"
    )

    protocol: str = setting("name of a registered agent protocol", default="search_r1")
    protocol_options: dict[str, Any] = setting(
        "options of the protocol that differ from its own", LATER, default_factory=dict
    )
    limits: Limits = setting("how far one trajectory may go", default_factory=Limits)
    topk: int = setting("passages shown for a search", default=3)

    reward: dict[str, float] = setting(
        "registered reward -> weight, added up; empty: exact_match alone", LATER, default_factory=dict
    )
    reward_options: dict[str, Any] = setting("registered reward -> its options", LATER, default_factory=dict)

    algorithm: str = setting("ppo (GAE with a critic) or grpo (no critic; needs several samples)", default="ppo")
    mode: str = setting("verl's trainer: sync, colocate_async or separate_async", default="sync")
    steps: int = setting("total PPO steps", default=500)
    seed: int = setting("seed of data order, random draws, sampling and workers", default=0)
    sampling_seed: int | None = setting(
        "seed of the rollouts; -1: `seed` with mode=sync, else none, because an aborted request would reuse its first "
        "random numbers; null: none: vLLM samples faster, but a repeated step draws other tokens",
        default=-1,
    )
    batch_size: int = setting("questions per step", default=512)
    samples: int = setting("trajectories per question", default=1)
    mini_batch_size: int = setting("questions per update", default=256)
    micro_batch_size: int = setting("trajectories per forward and backward pass and device", FREE, default=8)
    temperature: float = setting("sampling temperature in training; validation is greedy", default=1.0)
    actor_lr: float = setting("learning rate of the actor", default=1e-6)
    actor_warmup: float = setting("share of all steps over which the actor's learning rate rises", default=0.285)
    critic_lr: float = setting("learning rate of the critic", default=1e-5)
    critic_warmup: float = setting("share of all steps over which the critic's learning rate rises", default=0.015)
    kl_coef: float = setting("coefficient of the KL to the starting agent", default=0.001)
    mask_observations: bool = setting(
        "exclude the environment's tokens from the loss; off (ablation): train on them too", default=True
    )
    kl_loss: bool = setting("put the KL into the loss (k3 estimate) instead of the reward", default=False)
    critic_only_steps: int = setting("first steps in which only the critic learns", default=0)

    lora_rank: int = setting("rank of LoRA adapters on the actor; 0: all weights are trained", default=0)
    lora_alpha: int = setting("scale of the adapters, divided by their rank", default=32)

    stability: StabilityRule = setting("when training has collapsed", FREE, default_factory=StabilityRule)
    save_every: int = setting("steps between checkpoints; the last step is always saved", FREE, default=50)
    keep_checkpoints: int = setting("newest checkpoints to keep; 0: all", FREE, default=3)
    validate_every: int = setting(
        "steps between validations; 0: only before the first and after the last", FREE, default=50
    )
    rollouts_per_step: int = setting(
        "random trajectories of each step to write to rollouts/STEP.jsonl", FREE, default=4
    )
    loggers: list[str] = setting("verl's loggers: wandb, …", FREE, default_factory=lambda: ["console"])

    max_failed_search_share: float = setting(
        "the run stops if a larger share of searches (asynchronous modes: or of agent loops) fails", FREE, default=0.1
    )
    max_concurrent_searches: int = setting("maximum concurrent searches per agent-loop worker", FREE, default=64)
    search_timeout_s: float = setting("timeout of one search attempt", FREE, default=60.0)
    search_retries: int = setting("retries of a failed search, with exponential backoff", FREE, default=5)
    cpu: bool | None = setting("train on the CPU; none: only if no accelerator is found", default=None)
    devices: int = setting("accelerators (or CPU worker processes) on this machine", default=1)
    nodes: int = setting(
        "machines in one Ray cluster, each with that many devices; for more than 1, out must be on a shared disk",
        default=1,
    )
    rollout_nodes: int = setting("further machines for rollouts alone (separate_async)", default=0)
    device_memory_gb: float = setting("memory of one accelerator, for the estimate of --dry-run", FREE, default=80.0)
    tensor_parallel: int = setting("accelerators that share one rollout engine", FREE, default=1)
    offload: bool = setting(
        "keep weights and optimizer states in host memory while they are not used", FREE, default=True
    )
    micro_batch_tokens: int = setting(
        "pack trajectories into micro-batches of that many tokens per device; 0: use micro_batch_size", FREE, default=0
    )
    precision: str = setting(
        "compute type of actor, reference and critic: float32, bfloat16; auto: the CPU's fast type, or verl's default",
        default="auto",
    )
    threads: int | None = setting("CPU threads per worker; none: all cores", FREE, default=None)
    engine: str = setting(
        "verl's rollout engine on accelerators: vllm, or sglang, which verl 0.9.1 cannot be installed with",
        default="vllm",
    )
    attention: str | None = setting(
        "attention of the models in training on accelerators, as transformers names it; none: flash_attention_2 where "
        "flash-attn is installed here, else packed_causal, which needs nothing but torch",
        FREE,
        default=None,
    )
    dry_run: bool = setting(
        "print the resolved configuration and the memory estimate, check inputs, start nothing", FREE, default=False
    )
    verl: list[str] = setting(
        "further Hydra overrides for verl, applied last", {"decides": _deciding_overrides}, default_factory=list
    )

    def __post_init__(self) -> None:
        reached = {"retrieval_url": self.retrieval_url, "retrieval_token_env": self.retrieval_token_env}
        refuse_secrets("train-agent", reached, "give the name of an environment variable that holds it")
        self._check_values()
        self._check_combinations()

    def _check_values(self) -> None:
        """Each value alone."""
        choices = {"preset": tuple(self.PRESETS), "algorithm": ALGORITHMS, "mode": MODES, "engine": ENGINES}
        choices |= {"precision": PRECISIONS, "value_head": VALUE_HEADS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")
        positive = ("topk", "steps", "batch_size", "samples", "mini_batch_size", "micro_batch_size", "devices", "nodes")
        for name in (*positive, "save_every", "max_concurrent_searches", "tensor_parallel"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("lora_rank", "micro_batch_tokens", "search_retries", "keep_checkpoints"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        for name in ("actor_lr", "critic_lr", "temperature", "search_timeout_s", "device_memory_gb"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: expected a number above 0, found {getattr(self, name)}")
        for name in ("actor_warmup", "critic_warmup", "max_failed_search_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected a share between 0 and 1, found {getattr(self, name)}")

    def _check_combinations(self) -> None:
        """Values that do not go together."""
        if self.algorithm == "grpo" and self.samples < 2:
            raise ConfigError(f"samples={self.samples}: grpo compares a question's trajectories, expected at least 2")
        if (self.rollout_nodes > 0) != (self.mode == "separate_async"):
            raise ConfigError(
                f"rollout_nodes={self.rollout_nodes}: separate_async needs at least 1, the other modes have none"
            )
        if self.lora_rank and self.mode == "separate_async":
            raise ConfigError(
                f"lora_rank={self.lora_rank}: expected 0 with mode=separate_async, where verl sends base weights alone "
                "to the rollout engines"
            )
        if self.batch_size % self.mini_batch_size:
            raise ConfigError(
                f"batch_size={self.batch_size} must be a multiple of mini_batch_size={self.mini_batch_size}"
            )
