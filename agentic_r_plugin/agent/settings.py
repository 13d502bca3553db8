"""What `agentic-r train-agent` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.protocol import Limits


def _help(text: str, **options: Any) -> Any:
    return field(metadata={"help": text}, **options)


@dataclass(frozen=True, kw_only=True)
class TrainAgentConfig:
    """Train the agent with PPO in verl; defaults are the paper's (method section 6)."""

    model: str = _help("folder of the agent to start from (Hugging Face format)", default=MISSING)
    questions: str = _help("training questions (FlashRAG jsonl)", default=MISSING)
    retrieval_url: str = _help("address of the retrieval service", default=MISSING)
    out: str = _help("folder of the run; the trained agent is written to OUT/agent", default=MISSING)
    validation: str | None = _help("questions to validate on; none: no validation", default=None)
    validation_questions: int = _help("use only the first N validation questions; 0: all", default=0)
    critic: str | None = _help("folder of a critic to start from; none: the agent with a new value head", default=None)

    protocol: str = _help("name of a registered agent protocol", default="search_r1")
    limits: Limits = field(default_factory=Limits, metadata={"help": "how far one trajectory may go"})
    topk: int = _help("passages shown for a search", default=3)

    steps: int = _help("PPO steps in all", default=500)
    seed: int = _help("of the data order, the sampling and the workers", default=0)
    batch_size: int = _help("questions a step", default=512)
    samples: int = _help("trajectories a question", default=1)
    mini_batch_size: int = _help("questions an update", default=256)
    micro_batch_size: int = _help("trajectories a forward and backward pass, per device", default=8)
    temperature: float = _help("of sampling while training; validation is greedy", default=1.0)
    actor_lr: float = _help("learning rate of the actor", default=1e-6)
    actor_warmup: float = _help("share of all steps over which the actor's learning rate rises", default=0.285)
    critic_lr: float = _help("learning rate of the critic", default=1e-5)
    critic_warmup: float = _help("share of all steps over which the critic's learning rate rises", default=0.015)
    kl_coef: float = _help("coefficient of the KL to the starting agent", default=0.001)
    mask_observations: bool = _help("off: ablation, passages are trained on like the model's own tokens", default=True)
    kl_loss: bool = _help("put the KL into the loss (k3 estimate) instead of the reward", default=False)
    critic_only_steps: int = _help("first steps in which only the critic learns", default=0)

    save_every: int = _help("steps between checkpoints; the last step is always saved", default=50)
    keep_checkpoints: int = _help("newest checkpoints to keep; 0: all", default=3)
    validate_every: int = _help("steps between validations; 0: only before the first and after the last", default=50)
    rollouts_per_step: int = _help("trajectories of each step written to rollouts.jsonl", default=4)

    max_failed_search_share: float = _help("share of failed searches above which the run stops", default=0.1)
    max_concurrent_searches: int = _help("searches under way at once, per agent-loop worker", default=64)
    search_timeout_s: float = _help("limit of one attempt of a search", default=60.0)
    search_retries: int = _help("attempts after a search's first, with doubling pauses", default=5)
    cpu: bool | None = _help("train on the CPU; none: where no accelerator is found", default=None)
    devices: int = _help("accelerators (or CPU worker processes) on this machine", default=1)
    threads: int | None = _help("CPU threads a worker; none: all cores", default=None)
    engine: str = _help("verl's rollout engine on accelerators", default="vllm")
    verl: list[str] = field(default_factory=list, metadata={"help": "further Hydra overrides for verl, applied last"})

    def __post_init__(self) -> None:
        positive = ("topk", "steps", "batch_size", "samples", "mini_batch_size", "micro_batch_size", "devices")
        for name in (*positive, "save_every", "max_concurrent_searches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.batch_size % self.mini_batch_size:
            raise ConfigError(
                f"batch_size={self.batch_size} must be a multiple of mini_batch_size={self.mini_batch_size}"
            )
        for name in ("actor_lr", "critic_lr", "temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: expected a number above 0, found {getattr(self, name)}")
        for name in ("actor_warmup", "critic_warmup", "max_failed_search_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected a share between 0 and 1, found {getattr(self, name)}")
