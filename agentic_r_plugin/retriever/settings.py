"""Settings of the retriever trainers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.hub import HubConfig
from agentic_r_plugin.query import DEFAULT_FORMULATION

MAX_LENGTH = 512
"""Maximum length of a text in tokens (method section 3)."""

PRECISIONS = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class TrainedModelConfig(HubConfig):
    """Settings of a command that trains a model for others to use."""

    loggers: list[str] = field(
        default_factory=list, metadata={"help": "also log to wandb, tensorboard (OUT/runs), trackio, mlflow, …", **FREE}
    )
    datasets: list[str] = field(
        default_factory=list,
        metadata={"help": "names on the hub of the data behind the training, for the card", **FREE},
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

    groups: str = field(metadata={"help": "training groups (agentic-r groups)", **BY_CONTENTS})
    corpus: str = field(metadata={"help": "corpus the groups' passages are in", **BY_CONTENTS})
    out: str = field(metadata={"help": "checkpoint folder to write", **FREE})
    retriever: str = field(
        default="intfloat/e5-base-v2", metadata={"help": "model to start from, or builtin:minilm", **BY_CONTENTS}
    )
    preset: str = field(
        default="auto",
        metadata={
            "help": "prefixes and pooling of a family: auto, plain, e5, bge, minilm, decoder, instruct, bge_zh, "
            "bge_m3, contriever, nomic"
        },
    )
    pooling: str = field(default="auto", metadata={"help": "mean, cls, lasttoken; auto: the model's or the preset's"})
    query_prompt: str | None = field(default=None, metadata={"help": "prefix of queries, in place of the preset's"})
    passage_prompt: str | None = field(default=None, metadata={"help": "prefix of passages, in place of the preset's"})
    trainer: str = field(
        default="contrastive", metadata={"help": "registered retriever_trainer: contrastive, replug, llm_embedder"}
    )
    formulation: str | None = field(
        default=None,
        metadata={"help": f"registered query_formulation; none: the checkpoint's record, else {DEFAULT_FORMULATION}"},
    )
    epochs: int = field(default=2, metadata={"help": "passes over the groups"})
    learning_rate: float = field(default=2e-5, metadata={"help": "peak, of AdamW; it then falls linearly to 0"})
    warmup_ratio: float = field(default=0.1, metadata={"help": "share of the steps that warm up"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    batch_size: int = field(default=32, metadata={"help": "queries per device and step"})
    group_size: int = field(default=16, metadata={"help": "passages of a group that are used, positive included"})
    temperature: float = field(default=0.01, metadata={"help": "of the softmax over cosines"})
    cross_device: bool = field(default=True, metadata={"help": "other devices' passages are negatives too"})
    mask_false_negatives: bool = field(
        default=False,
        metadata={"help": "a query's known positives, by id or text, are none of its negatives; off as in the paper"},
    )
    relevance: str | None = field(
        default=None, metadata={"help": "relevance file; replug and llm_embedder learn from its scores", **BY_CONTENTS}
    )
    correctness: str | None = field(
        default=None,
        metadata={
            "help": "correctness file (--exhaustive), added to the scores of replug, llm_embedder",
            **BY_CONTENTS,
        },
    )
    teacher_temperature: float = field(default=0.1, metadata={"help": "of the softmax over the scores"})
    query_max_length: int | None = field(
        default=None, metadata={"help": f"tokens, recorded; none: the checkpoint's record, else {MAX_LENGTH}"}
    )
    passage_max_length: int | None = field(
        default=None, metadata={"help": f"tokens, recorded; none: the checkpoint's record, else {MAX_LENGTH}"}
    )
    mini_batch_tokens: int | None = field(
        default=None, metadata={"help": "tokens of one forward pass (gradient caching); 2048 on the CPU, else 8192"}
    )
    kept_tokens: int | None = field(
        default=None,
        metadata={"help": "tokens of a step encoded once, the others twice; 4 mini-batches"},
    )
    packing: bool = field(default=True, metadata={"help": "texts of a mini-batch without padding, where it is exact"})
    attention_dropout: float | None = field(
        default=None,
        metadata={
            "help": "of attention, in training; none: the model's own, but 0 for texts packed on CUDA: its kernel has "
            "no dropout (done.json says what was used)"
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "within a mini-batch, for one that does not fit; more time"}
    )
    precision: str = field(
        default="auto", metadata={"help": "float32, bfloat16, float16 (autocast), auto: bfloat16 where native"}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "train adapters of this rank (LoRA), merged at the end; 0: all"}
    )
    lora_alpha: float = field(default=32.0, metadata={"help": "adapters count alpha / rank"})
    interpolation: float = field(
        default=1.0,
        metadata={
            "help": "weights written: 1 the trained ones, 0 those training started from, between: a mixture",
            **LATER,
        },
    )
    device: str = field(default="auto", metadata={"help": "auto: cuda where there is one, else cpu", **FREE})
    processes: int = field(
        default=1, metadata={"help": "of this node, one per device; started by torchrun, it decides"}
    )
    seed: int = field(default=0, metadata={"help": "of order, drawn negatives and dropout"})
    max_steps: int | None = field(default=None, metadata={"help": "stop after N steps"})
    checkpoint_steps: int = field(default=100, metadata={"help": "steps between two resume points", **FREE})
    dev_groups: str | None = field(default=None, metadata={"help": "held-out groups to measure on", **BY_CONTENTS})
    dev_steps: int | None = field(default=None, metadata={"help": "steps between two measurements; an epoch"})
    dev_corpus: bool = field(default=False, metadata={"help": "measure by searching the whole corpus as well"})
    dev_metric: str = field(default="dev_ndcg_at_10", metadata={"help": "what early stopping watches"})
    patience: int | None = field(
        default=None, metadata={"help": "stop after N measurements without a better one; the best is kept"}
    )
    elsewhere_groups: str | None = field(
        default=None,
        metadata={
            "help": "held-out groups of another set: training stops once dev_metric has fallen there by more than "
            "elsewhere_loss, and keeps the weights from before",
            **BY_CONTENTS,
            **LATER,
        },
    )
    elsewhere_corpus: str | None = field(
        default=None, metadata={"help": "corpus of elsewhere_groups; none: corpus", **BY_CONTENTS, **LATER}
    )
    elsewhere_loss: float = field(
        default=0.01, metadata={"help": "how far dev_metric may fall below its first value there", **LATER}
    )

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
        return (step + 1) / (warmup + 1)
    return 1 - (step - warmup) / max(1, total - warmup)
