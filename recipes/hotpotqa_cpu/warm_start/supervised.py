"""Supervised fine-tuning of a Hugging Face causal language model on the agent's tokens.

The model processes one trajectory at a time, without padding and with logits only for the trained tokens, and gradients
are accumulated over an optimiser step. Autocast uses bfloat16 where the device supports it. Checkpoints let an
interrupted run continue with the same batches.

Legend: T tokens of one trajectory, M of them written by the agent, V vocabulary.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from agentic_r_plugin import compute
from agentic_r_plugin.errors import ConfigError, TrainingError
from agentic_r_plugin.protocol import Session
from agentic_r_plugin.store import atomic_path


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
    batch_size: int = field(default=6, metadata={"help": "trajectories an optimiser step"})
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


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Measurements of one optimiser step."""

    step: int
    loss: float
    """Mean cross entropy over the agent's tokens."""
    learning_rate: float
    grad_norm: float
    tokens: int
    model_tokens: int
    seconds: float


def fine_tune(
    model: Any,
    epochs: Sequence[Sequence[Example]],
    settings: FineTuneSettings,
    *,
    seed: int,
    checkpoint: Path,
    on_step: Callable[[StepRecord, int], None] = lambda record, total: None,
) -> list[StepRecord]:
    """Train the model in place, resuming from `checkpoint` if that file exists.

    Args:
        model: causal language model of transformers, in float32, on its device.
        epochs: examples of each epoch; each epoch is shuffled with a seed derived from `seed`.
        on_step: called with the record of each step and the total number of steps.

    Raises:
        TrainingError: no examples, or a non-finite loss or gradient norm.
    """
    batches = [batch for number, examples in enumerate(epochs) for batch in _batches(examples, settings, seed + number)]
    if not batches:
        raise TrainingError("no demonstration to learn from")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
    )
    records = _restore(checkpoint, model, optimizer)
    model.train()
    for step in range(len(records), len(batches)):
        started = time.monotonic()
        rate = learning_rate(settings, step, len(batches))
        loss, norm = _step(model, optimizer, batches[step], settings, rate)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(f"step {step + 1}: loss {loss}, gradient norm {norm}; lower the learning rate")
        record = StepRecord(
            step=step + 1, loss=loss, learning_rate=rate, grad_norm=norm, tokens=sum(len(e.ids) for e in batches[step]),
            model_tokens=sum(sum(e.mask) for e in batches[step]), seconds=time.monotonic() - started,
        )  # fmt: skip
        records.append(record)
        on_step(record, len(batches))
        if record.step % settings.save_every_steps == 0 and record.step < len(batches):
            _save(checkpoint, model, optimizer, records)
    return records


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


def _step(
    model: Any, optimizer: torch.optim.Optimizer, batch: Sequence[Example], settings: FineTuneSettings, rate: float
) -> tuple[float, float]:
    """Take one optimiser step; return the mean loss of the agent's tokens and the gradient norm before clipping."""
    num_targets = sum(sum(example.mask[1:]) for example in batch)
    total = 0.0
    for example in batch:
        loss = token_loss(model, example, precision=settings.precision)
        (loss / num_targets).backward()
        total += float(loss.detach())
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return total / num_targets, norm


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


def _save(checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer, records: Sequence[StepRecord]) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "records": [vars(record) for record in records],
    }
    with atomic_path(checkpoint) as temporary:
        torch.save(state, temporary)


def _restore(checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer) -> list[StepRecord]:
    if not checkpoint.exists():
        return []
    state = torch.load(checkpoint, map_location=model.device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return [StepRecord(**record) for record in state["records"]]
