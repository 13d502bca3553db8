"""The training loop: steps, checkpoints, the curve.

Legend: N texts, D dimensions.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from agentic_r_plugin.errors import TrainingError
from agentic_r_plugin.retriever.batches import Batch, Example, epoch_batches, num_batches
from agentic_r_plugin.retriever.loss import allowed_passages, gather_passages, info_nce, masked_scores
from agentic_r_plugin.retriever.settings import TrainRetrieverConfig, rate_share
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever, autocast
from agentic_r_plugin.store import atomic_path, dump_line, read_lines

log = logging.getLogger(__name__)

STATE, METRICS = "checkpoint.pt", "metrics.jsonl"


class Run:
    """Model, optimizer and position of one training."""

    def __init__(
        self, config: TrainRetrieverConfig, corpus: Corpus, retriever: Retriever, rank: int, world: int
    ) -> None:
        self.config, self.corpus, self.retriever, self.model = config, corpus, retriever, retriever.model
        self.rank, self.world, self.step, self.last_loss = rank, world, 0, math.nan
        self.out = Path(config.out)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        matrices = [p for p in self.model.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.model.parameters() if p.requires_grad and p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
        )

    # --- resume

    def restore(self) -> None:
        """Go on from the checkpoint, where there is one; drop later lines of the curve."""
        if (self.out / STATE).is_file():
            state = torch.load(self.out / STATE, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.last_loss = state["step"], state["loss"]
            log.info("going on from step %d", self.step)
        if self.rank == 0:
            kept = (
                [data for _, data in read_lines(self.out / METRICS) if data["step"] <= self.step] if self.step else []
            )
            with atomic_path(self.out / METRICS) as temporary:
                temporary.write_bytes(b"".join(map(dump_line, kept)))

    def save_state(self) -> None:
        """Everything the next step depends on."""
        if self.rank == 0:
            with atomic_path(self.out / STATE) as temporary:
                state = {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "step": self.step,
                    "loss": self.last_loss,
                }
                torch.save(state, temporary)

    # --- the loop

    def fit(self, examples: list[Example], dev: list[Example]) -> None:
        """All remaining steps."""
        per_epoch = num_batches(len(examples), self.config.batch_size, self.world)
        total = per_epoch * self.config.epochs
        last = min(total, self.config.max_steps or total)
        self.model.train()
        with tqdm(
            total=last, initial=self.step, desc="train-retriever", unit="step", disable=self.rank > 0
        ) as progress:
            if self.step == 0:
                self._measure_dev(dev)
            for epoch, batch in self._remaining(examples, per_epoch, last):
                line = self._train_step(batch, total) | {"epoch": epoch + 1}
                self._log(line)
                progress.update()
                progress.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
                if self.step % per_epoch == 0 or self.step == last:
                    self._measure_dev(dev)
                if self.step % self.config.checkpoint_steps == 0 and self.step < last:
                    self.save_state()
        self.model.eval()

    def _remaining(self, examples: list[Example], per_epoch: int, last: int) -> Iterator[tuple[int, Batch]]:
        for epoch in range(self.step // per_epoch, self.config.epochs):
            batches = epoch_batches(
                examples,
                epoch=epoch,
                seed=self.config.seed,
                batch_size=self.config.batch_size,
                group_size=self.config.group_size,
                rank=self.rank,
                world=self.world,
            )
            for place, batch in enumerate(batches, start=epoch * per_epoch):
                if place >= last:
                    return
                if place >= self.step:
                    yield epoch, batch

    def _train_step(self, batch: Batch, total: int) -> dict[str, Any]:
        started = time.perf_counter()
        rate = self.config.learning_rate * rate_share(self.config, self.step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed((self.config.seed * 1_000_003 + self.step) * 4096 + self.rank)  # dropout, same after a resume
        self.optimizer.zero_grad(set_to_none=True)
        loss, correct = self._loss(batch)
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {loss.item()}; lower learning_rate, or use precision=float32"
            )
        loss.backward()
        self._average_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.step, self.last_loss = self.step + 1, loss.item()
        return {
            "step": self.step,
            "loss": self.last_loss,
            "accuracy": correct,
            "learning_rate": rate,
            "grad_norm": norm.item(),
            "passages": len(batch.rows),
            "seconds": round(time.perf_counter() - started, 3),
        }

    def _loss(self, batch: Batch) -> tuple[Tensor, float]:
        """Mean loss of the batch, and the share of queries whose positive scores highest."""
        queries = self._encode_queries(list(batch.examples))
        passages, rows = gather_passages(self._encode_passages(list(batch.rows)), batch.rows)
        positives, allowed = allowed_passages(
            rows, [item.positive for item in batch.examples], [item.same_query for item in batch.examples]
        )
        positives, allowed = positives.to(queries.device), allowed.to(queries.device)
        scores = masked_scores(queries, passages, allowed, self.config.temperature)
        loss = info_nce(scores, positives)
        return loss, (scores.argmax(dim=1) == positives).float().mean().item()

    def _encode_queries(self, examples: list[Example]) -> Tensor:
        record = self.retriever.record
        texts = [self.retriever.query_text(item.request) for item in examples]
        return self._encode(texts, record.query_prompt, record.query_max_length)

    def _encode_passages(self, rows: list[int]) -> Tensor:
        record = self.retriever.record
        return self._encode(
            [self.corpus[row].contents for row in rows], record.passage_prompt, record.passage_max_length
        )

    def _encode(self, texts: list[str], prompt: str, max_length: int) -> Tensor:
        """(N, D) float32 vectors with gradients, in the order of the texts."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        size = self.config.encode_batch or (16 if self.model.device.type == "cpu" else 64)
        parts = []
        for start in range(0, len(order), size):
            chunk = [texts[i] for i in order[start : start + size]]
            limits = {"text": {"max_length": max_length, "truncation": True}}
            features = self.model.preprocess(chunk, prompt=prompt or None, processing_kwargs=limits)
            features = {
                key: item.to(self.model.device) if hasattr(item, "to") else item for key, item in features.items()
            }
            with autocast(self.model.device, self.config.precision):
                parts.append(self.model(features)["sentence_embedding"].float())
        back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=parts[0].device)
        return torch.cat(parts)[back]

    def _average_gradients(self) -> None:
        if self.world > 1:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.world

    # --- the curve

    def _measure_dev(self, dev: list[Example]) -> None:
        """Recall of the positive among all passages of the dev groups; leaves the random state as it was."""
        if not dev or self.rank > 0:
            return
        self.model.eval()
        rows = list(dict.fromkeys(row for item in dev for row in (item.positive, *item.negatives)))
        passages = self.retriever.encode_passages([self.corpus[row] for row in rows])
        scores = self.retriever.encode_queries([item.request for item in dev]) @ passages.T
        ranks = [int((scores[i] > scores[i, rows.index(item.positive)]).sum()) for i, item in enumerate(dev)]
        self._log(
            {"step": self.step} | {f"dev_recall_at_{k}": sum(r < k for r in ranks) / len(dev) for k in (1, 3, 10)}
        )
        self.model.train()

    def _log(self, line: dict[str, Any]) -> None:
        if self.rank == 0:
            with (self.out / METRICS).open("ab") as stream:
                stream.write(dump_line(line))
