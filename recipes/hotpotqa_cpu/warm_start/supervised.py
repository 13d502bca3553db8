"""Supervised fine-tuning of a causal language model on the agent's tokens, with transformers' `Trainer`.

The model processes one trajectory at a time, without padding and with logits only for the trained tokens, and gradients
are accumulated over an optimiser step. Autocast uses bfloat16 where the device supports it. An interrupted run resumes
from its last checkpoint with the same batches.

Legend: T tokens of one trajectory, M of them written by the agent, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from agentic_r_plugin import compute
from agentic_r_plugin.errors import ConfigError, TrainingError
from agentic_r_plugin.retriever.reranker import Progress, last_whole_checkpoint
from agentic_r_plugin.session import Session


@dataclass(frozen=True, kw_only=True)
class Example:
    """One trajectory to learn from."""

    ids: tuple[int, ...]
    """[T] ids of prompt and response."""
    mask: tuple[int, ...]
    """[T] 1 for tokens written by the agent."""

    @classmethod
    def from_session(cls, session: Session) -> Example:
        """Make an example of a finished session, from its prompt to its last token."""
        return cls(ids=tuple(session.ids), mask=(0,) * len(session.prompt_ids) + tuple(session.response_mask))


@dataclass(frozen=True, kw_only=True)
class FineTuneSettings:
    """Optimisation: AdamW, linear warm-up, cosine decay to zero."""

    epochs: int = field(default=1, metadata={"help": "passes over the demonstrations"})
    batch_size: int = field(default=6, metadata={"help": "trajectories per optimiser step"})
    learning_rate: float = field(default=1e-4, metadata={"help": "highest learning rate"})
    warmup_share: float = field(default=0.1, metadata={"help": "share of the steps with a rising learning rate"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW weight decay"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient norm is clipped to this"})
    precision: str = field(
        default="auto", metadata={"help": "autocast to float32 (none) or bfloat16; auto: as the device is fast"}
    )
    save_every_steps: int = field(default=10, metadata={"help": "steps between checkpoints for a resume"})

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "save_every_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"precision: expected auto, float32 or bfloat16, found {self.precision!r}")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate: expected more than 0, found {self.learning_rate}")


def fine_tune(
    model: Any, epochs: Sequence[Sequence[Example]], settings: FineTuneSettings, *, seed: int, folder: Path
) -> list[dict[str, Any]]:
    """Train the model in place, resuming from the last checkpoint in `folder`.

    Args:
        model: causal language model of transformers, in float32, on its device.
        epochs: examples of each epoch; each epoch is shuffled with a seed derived from `seed`.

    Returns:
        A line per step: `step`, `loss` (mean cross entropy over the agent's tokens), `grad_norm`, `learning_rate`.

    Raises:
        TrainingError: no examples, or a non-finite loss or gradient norm.
    """
    batches = [batch for number, examples in enumerate(epochs) for batch in _batches(examples, settings, seed + number)]
    if not batches:
        raise TrainingError("no demonstration to learn from")
    # The schedule gives the rate itself, so the optimizer's own rate is 1. All parameters decay.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=settings.weight_decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(settings, step, len(batches)))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=len(batches),
        per_device_train_batch_size=1,  # an item of the data is the batch of a step
        train_sampling_strategy="sequential",
        max_grad_norm=settings.max_grad_norm,
        save_steps=settings.save_every_steps,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        use_cache=True,  # of the model that is written
        use_cpu=model.device.type == "cpu",
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would split a trajectory
    trainer = _Trainer(
        settings.precision,
        model=model,
        args=arguments,
        train_dataset=batches,
        data_collator=lambda items: {"batch": items[0]},
        optimizers=(optimizer, schedule),
        callbacks=[Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    return [line for line in trainer.state.log_history if "loss" in line]


class _Trainer(Trainer):
    """One trajectory after the other, with the loss averaged over the agent's tokens of the whole batch."""

    def __init__(self, precision: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.precision = precision

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        num_targets = sum(sum(example.mask[1:]) for example in inputs["batch"])
        total = 0.0
        for example in inputs["batch"]:
            loss = token_loss(model, example, precision=self.precision)
            (loss / num_targets).backward()
            total += float(loss.detach())
        return torch.tensor(total / num_targets, device=self.args.device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the library's estimate needs padded tensors


def learning_rate(settings: FineTuneSettings, step: int, num_steps: int) -> float:
    """Learning rate of a step (counted from 0): linear warm-up, then cosine decay.

    >>> settings = FineTuneSettings(learning_rate=1.0, warmup_share=0.2)
    >>> [round(learning_rate(settings, step, 10), 2) for step in (0, 1, 2, 5, 9)]
    [0.5, 1.0, 1.0, 0.69, 0.04]
    """
    warmup = max(1, round(settings.warmup_share * num_steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    share = (step - warmup) / max(1, num_steps - warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def _batches(examples: Sequence[Example], settings: FineTuneSettings, seed: int) -> Iterator[list[Example]]:
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    for start in range(0, len(shuffled), settings.batch_size):
        yield shuffled[start : start + settings.batch_size]


def token_loss(model: Any, example: Example, *, precision: str) -> torch.Tensor:
    """Cross entropy summed over the agent's tokens, a scalar."""
    device = model.device
    # The logits at position t - 1 predict token t; the first token has no prediction and is never a target.
    ids_1T = torch.tensor([example.ids], device=device)
    target_M = torch.tensor(example.mask[1:], device=device).nonzero().squeeze(1) + 1
    bfloat16 = compute.resolve(precision, device) == "bfloat16"
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
        logits_1MV = model(input_ids=ids_1T, logits_to_keep=target_M - 1, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits_1MV[0].float(), ids_1T[0, target_M], reduction="sum")
