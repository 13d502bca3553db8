"""Settings of the retriever trainers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, options_of, setting
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.hub import HubConfig
from agentic_r_plugin.query import DEFAULT_FORMULATION

MAX_LENGTH = 512
"""Maximum length of a text in tokens (method section 3)."""

PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class TrainedModelConfig(HubConfig):
    """Settings of a command that trains a model for others to use."""

    loggers: list[str] = setting(
        "also log to wandb, tensorboard (OUT/runs), trackio, mlflow, …", FREE, default_factory=list
    )
    datasets: list[str] = setting(
        "names on the hub of the data behind the training, for the card", FREE, default_factory=list
    )


@dataclass(frozen=True, kw_only=True)
class TrainRetrieverConfig(TrainedModelConfig):
    """Settings of `agentic-r train-retriever`; the defaults are the paper's.

    One default differs: gradient checkpointing is off, because gradient caching already bounds the memory and gives the
    same gradients.
    """

    REMOVED: ClassVar[Mapping[str, Any]] = {
        "schedule": "linear", "weight_decay": 0.0, "order": "shuffled", "gradient_caching": True
    }  # fmt: skip

    groups: str = setting("training groups (agentic-r groups)", BY_CONTENTS)
    corpus: str = setting("corpus the groups' passages are in", BY_CONTENTS)
    out: str = setting("checkpoint folder to write", FREE)
    retriever: str = setting("model to start from, or builtin:minilm", BY_CONTENTS, default="intfloat/e5-base-v2")
    preset: str = setting(
        "prefixes and pooling of a family: auto, plain, e5, bge, minilm, decoder, instruct, bge_zh, "
        "bge_m3, contriever, nomic",
        default="auto",
    )
    pooling: str = setting("mean, cls, lasttoken; auto: the model's or the preset's", default="auto")
    query_prompt: str | None = setting("prefix of queries, in place of the preset's", default=None)
    passage_prompt: str | None = setting("prefix of passages, in place of the preset's", default=None)
    trainer: str = setting("registered retriever_trainer: contrastive, replug, llm_embedder", default="contrastive")
    options: dict[str, Any] = setting(
        "options of another package's trainer; ours have none",
        options_of("retriever_trainer", "trainer"),
        LATER,
        default_factory=dict,
    )
    formulation: str | None = setting(
        f"registered query_formulation; none: the checkpoint's record, else {DEFAULT_FORMULATION}", default=None
    )
    epochs: int = setting("passes over the groups", default=2)
    learning_rate: float = setting("peak, of AdamW; it then falls linearly to 0", default=2e-5)
    warmup_ratio: float = setting("share of the steps that warm up", default=0.1)
    max_grad_norm: float = setting("gradients are clipped to this norm", default=1.0)
    batch_size: int = setting("queries per device and step", default=32)
    group_size: int = setting("passages of a group that are used, positive included", default=16)
    temperature: float = setting("temperature of the softmax over cosines", default=0.01)
    cross_device: bool = setting("use the passages of other devices as negatives, too", default=True)
    mask_false_negatives: bool = setting(
        "never use a query's known positives (same id or text) as negatives; off as in the paper", default=False
    )
    relevance: str | None = setting(
        "relevance file; replug and llm_embedder learn from its scores", BY_CONTENTS, default=None
    )
    correctness: str | None = setting(
        "correctness file (--exhaustive), added to the scores of replug, llm_embedder", BY_CONTENTS, default=None
    )
    teacher_temperature: float = setting("temperature of the softmax over the scores", default=0.1)
    query_max_length: int | None = setting(
        f"maximum tokens of a query; none: as the checkpoint records, else {MAX_LENGTH}", default=None
    )
    passage_max_length: int | None = setting(
        f"maximum tokens of a passage; none: as the checkpoint records, else {MAX_LENGTH}", default=None
    )
    mini_batch_tokens: int | None = setting(
        "tokens of one forward pass (gradient caching); none: 2048 on the CPU, else 8192", default=None
    )
    kept_tokens: int | None = setting("tokens of a step encoded only once; none: 4 mini-batches", default=None)
    packing: bool = setting("concatenate texts instead of padding them, if the model supports it", default=True)
    attention_dropout: float | None = setting(
        "attention dropout in training; none: the model's own, but 0 for texts packed on CUDA, whose kernel has no "
        "dropout (done.json records the value in use)",
        default=None,
    )
    gradient_checkpointing: bool = setting("recompute activations: less memory, more time", default=False)
    precision: str = setting("float32, bfloat16, float16 (autocast), auto: bfloat16 where native", default="auto")
    lora_rank: int = setting("train adapters of this rank (LoRA), merged at the end; 0: all", default=0)
    lora_alpha: float = setting("adapters are scaled by alpha / rank", default=32.0)
    interpolation: float = setting(
        "weights to write: 1: the trained ones, 0: the initial ones, between: a mixture", LATER, default=1.0
    )
    device: str = setting("auto: cuda where there is one, else cpu", FREE, default="auto")
    processes: int = setting("processes on this node, one per device; ignored under torchrun", default=1)
    seed: int = setting("seed of order, drawn negatives and dropout", default=0)
    max_steps: int | None = setting("stop after N steps", default=None)
    checkpoint_steps: int = setting("steps between two resume points", FREE, default=100)
    dev_groups: str | None = setting("held-out groups to measure on", BY_CONTENTS, default=None)
    dev_steps: int | None = setting("steps between two measurements; none: an epoch", default=None)
    dev_corpus: bool = setting("also search the whole corpus when measuring", default=False)
    dev_metric: str = setting("metric for early stopping", default="dev_ndcg_at_10")
    patience: int | None = setting("stop after N measurements without a better one; the best is kept", default=None)
    elsewhere_groups: str | None = setting(
        "held-out groups of another set: stop when dev_metric on it has fallen by more than elsewhere_loss, and keep "
        "the weights from before",
        BY_CONTENTS,
        LATER,
        default=None,
    )
    elsewhere_corpus: str | None = setting("corpus of elsewhere_groups; none: corpus", BY_CONTENTS, LATER, default=None)
    elsewhere_loss: float = setting("how far dev_metric may fall on elsewhere_groups", LATER, default=0.01)

    def __post_init__(self) -> None:
        for name in (
            "epochs", "learning_rate", "batch_size", "temperature", "teacher_temperature", "checkpoint_steps",
            "max_grad_norm", "processes",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, found {getattr(self, name)}")
        for name in (
            "query_max_length", "passage_max_length", "mini_batch_tokens", "max_steps", "dev_steps", "patience",
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name in ("kept_tokens", "lora_rank"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} must not be below 0, found {getattr(self, name)}")
        if self.group_size < 2 or not 0 <= self.warmup_ratio < 1:
            raise ConfigError("expected group_size of at least 2 and 0 <= warmup_ratio < 1")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r}: expected {', '.join(PRECISIONS)}")
        if not 0 <= (self.attention_dropout or 0) < 1:
            raise ConfigError(
                f"attention_dropout must be a share of at least 0 and below 1, found {self.attention_dropout}"
            )
        if not 0 <= self.interpolation <= 1:
            raise ConfigError(f"interpolation must be a share from 0 to 1, found {self.interpolation}")
        if not self.dev_groups and (self.patience or self.dev_corpus):
            raise ConfigError("patience and dev_corpus need dev_groups, the held-out groups to measure on")
        if self.elsewhere_corpus and not self.elsewhere_groups:
            raise ConfigError("elsewhere_corpus needs elsewhere_groups, the held-out groups of the other set")
        if self.elsewhere_loss < 0:
            raise ConfigError(f"elsewhere_loss must not be below 0, found {self.elsewhere_loss}")


def rate_share(config: TrainRetrieverConfig, step: int, total: int) -> float:
    """Fraction of the peak learning rate at `step`, counted from 0: a linear rise, then a linear fall to 0."""
    warmup = math.ceil(total * config.warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)  # above 0 in the first step
    return 1 - (step - warmup) / max(1, total - warmup)
