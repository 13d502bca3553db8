"""Settings of the retriever trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.query import DEFAULT_FORMULATION

MAX_LENGTH = 512
"""Tokens (method section 3)."""


@dataclass(frozen=True, kw_only=True)
class TrainRetrieverConfig:
    """Settings of `agentic-r train-retriever`; the defaults are the paper's."""

    groups: str = field(metadata={"help": "training groups (agentic-r groups)"})
    corpus: str = field(metadata={"help": "corpus the groups' passages are in"})
    out: str = field(metadata={"help": "checkpoint folder to write"})
    retriever: str = field(default="intfloat/e5-base-v2", metadata={"help": "model to start from, or builtin:minilm"})
    preset: str = field(default="auto", metadata={"help": "prefixes of an untrained model: auto, e5, bge, plain"})
    trainer: str = field(default="contrastive", metadata={"help": "registered retriever_trainer"})
    formulation: str = field(default=DEFAULT_FORMULATION, metadata={"help": "registered query_formulation"})
    epochs: int = field(default=2, metadata={"help": "passes over the groups"})
    learning_rate: float = field(default=2e-5, metadata={"help": "peak, of AdamW"})
    warmup_ratio: float = field(default=0.1, metadata={"help": "share of the steps that warm up"})
    schedule: str = field(default="linear", metadata={"help": "after warming up: linear, cosine or constant"})
    weight_decay: float = field(default=0.0, metadata={"help": "of AdamW, on matrices"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    batch_size: int = field(default=32, metadata={"help": "queries per device and step"})
    group_size: int = field(default=16, metadata={"help": "passages of a group that are used, positive included"})
    temperature: float = field(default=0.01, metadata={"help": "of the softmax over cosines"})
    query_max_length: int = field(default=MAX_LENGTH, metadata={"help": "tokens; recorded in the checkpoint"})
    passage_max_length: int = field(default=MAX_LENGTH, metadata={"help": "tokens; recorded in the checkpoint"})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "less memory, more time"})
    encode_batch: int | None = field(
        default=None, metadata={"help": "texts of one forward pass, sorted by length; 16 on the CPU, else 64"}
    )
    precision: str = field(default="auto", metadata={"help": "float32, bfloat16 (autocast), auto: where native"})
    device: str = field(default="auto", metadata={"help": "auto: cuda where there is one, else cpu"})
    seed: int = field(default=0, metadata={"help": "of order, drawn negatives and dropout"})
    max_steps: int | None = field(default=None, metadata={"help": "stop after so many steps"})
    checkpoint_steps: int = field(default=100, metadata={"help": "steps between two resume points"})
    dev_groups: str | None = field(default=None, metadata={"help": "groups to measure recall on after each epoch"})

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batch_size", "temperature", "checkpoint_steps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, found {getattr(self, name)}")
        if self.encode_batch is not None and self.encode_batch < 1:
            raise ConfigError(f"encode_batch must be at least 1, found {self.encode_batch}")
        if self.group_size < 2 or not 0 <= self.warmup_ratio < 1:
            raise ConfigError("expected group_size of at least 2 and 0 <= warmup_ratio < 1")
        if self.schedule not in _SCHEDULES:
            raise ConfigError(f"schedule {self.schedule!r}: expected {', '.join(_SCHEDULES)}")


_SCHEDULES = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "constant": lambda share: 1.0,
}
"""Share of the steps after warming up that are done -> share of the peak learning rate."""


def rate_share(config: TrainRetrieverConfig, step: int, total: int) -> float:
    """Share of the peak learning rate at `step`, counted from 0."""
    warmup = math.ceil(total * config.warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return _SCHEDULES[config.schedule]((step - warmup) / max(1, total - warmup))
