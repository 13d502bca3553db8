"""The training loop shared by all trainers: steps, checkpoints, training log, early stopping.

It does not use transformers' `Trainer`, which gives the same weights at the same speed but saves no code: batches,
backward pass, schedule, measurements and stopping rules would still be ours. `Trainer` also writes checkpoints in place
(a kill can leave half of one), takes longer to write them, and refuses float16 on a CPU.

Legend: B queries and p passages of this process, P distinct passages of the batch, D dimensions.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentic_r_plugin.errors import ConfigError, TrainingError
from agentic_r_plugin.progress import progress
from agentic_r_plugin.retriever import dev as dev_set
from agentic_r_plugin.retriever.adapters import Adapters
from agentic_r_plugin.retriever.batches import Batch, Example, epoch_batches, num_batches
from agentic_r_plugin.retriever.distributed import average_gradients, gather_columns, share, sum_columns
from agentic_r_plugin.retriever.encoding import TextEncoder, tokenize
from agentic_r_plugin.retriever.gradient_cache import backward
from agentic_r_plugin.retriever.loss import Loss, accuracy, similarities, targets
from agentic_r_plugin.retriever.settings import TrainRetrieverConfig, rate_share
from agentic_r_plugin.retriever.trackers import Trackers
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.store import StepLog, atomic_path

log = logging.getLogger(__name__)

STATE, BEST, METRICS = "checkpoint.pt", "best.pt", "metrics.jsonl"


class Training:
    """Model, optimizer and current step of one training run.

    Args:
        loss: loss over the scores of a batch (`retriever.loss`).
        rank: rank of this process among `world` processes.
    """

    def __init__(
        self, config: TrainRetrieverConfig, corpus: Corpus, retriever: Retriever, loss: Loss, rank: int, world: int
    ) -> None:
        self.config, self.corpus, self.retriever, self.model = config, corpus, retriever, retriever.model
        self.loss, self.rank, self.world = loss, rank, world
        self.trackers = Trackers(config.loggers)
        self.step, self.last_loss = 0, math.nan
        self.best: dict[str, Any] = {"step": 0, "value": -math.inf, "misses": 0}
        self.out = Path(config.out)
        self.metrics_log = StepLog(self.out / METRICS)
        self.adapters = Adapters(self.model, config) if config.lora_rank else None
        self.encoder = TextEncoder(
            self.model, precision=config.precision, packing=config.packing, attention_dropout=config.attention_dropout
        )
        on_cpu = self.model.device.type == "cpu"
        self.mini_batch_tokens = config.mini_batch_tokens or (2048 if on_cpu else 8192)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
        self.scaler = torch.amp.GradScaler(self.model.device.type, enabled=config.precision == "float16")

    # --- resume

    def restore(self) -> None:
        """Load the checkpoint if there is one, and drop log lines of later steps."""
        if (self.out / STATE).is_file():
            state = torch.load(self.out / STATE, map_location="cpu", weights_only=True)
            self._load_weights(state["weights"])
            # Earlier versions had a second group of parameters, with weight decay.
            if len(state["optimizer"]["param_groups"]) > 1:
                raise TrainingError(f"{self.out} was started by an earlier version; remove it or choose another out")
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.last_loss, self.best = state["step"], state["loss"], state["best"]
            log.info("resuming from step %d", self.step)
        if self.rank == 0:
            self.metrics_log.keep_until(self.step)

    def save_state(self) -> None:
        """Save everything that the next step depends on."""
        if self.rank == 0:
            state = {
                "weights": self._weights(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "loss": self.last_loss,
                "best": self.best,
            }
            with atomic_path(self.out / STATE) as temporary:
                torch.save(state, temporary)

    def _weights(self) -> dict[str, Tensor]:
        return {name: item.detach() for name, item in self.model.named_parameters() if item.requires_grad}

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        trained = self._weights()
        if trained.keys() != weights.keys():
            raise TrainingError(f"{self.out} holds a checkpoint with other parameters; remove it or choose another out")
        for name, item in trained.items():
            item.copy_(weights[name])

    # --- the loop

    def fit(
        self, examples: list[Example], dev: list[Example], elsewhere: tuple[Corpus, list[Example]] | None = None
    ) -> None:
        """Run all remaining steps. The model then has the last weights, or with early stopping those that were kept.

        Args:
            dev: held-out groups; empty: not measured.
            elsewhere: held-out groups of another set, with their corpus.
        """
        per_epoch = num_batches(len(examples), self.config.batch_size, self.world)
        total = per_epoch * self.config.epochs
        last = min(total, self.config.max_steps or total)
        every = self.config.dev_steps or per_epoch
        self.model.train()
        with progress(
            total=last, initial=self.step, desc="train-retriever", unit="step", shown=self.rank == 0
        ) as shown:
            if self.step == 0:
                self._measure(dev, elsewhere)
            for epoch, batch in self._remaining(examples, per_epoch, last):
                # Before the step: a resumed training may have been over when its checkpoint was saved.
                if self._is_over():
                    break
                line = self._train_step(batch, total) | {"epoch": epoch + 1}
                self._log(line)
                shown.update()
                shown.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
                # Before the checkpoint, which must hold the result (`best`): a resume does not measure this step again.
                if self.step % every == 0 or self.step == last:
                    self._measure(dev, elsewhere)
                if self.step % self.config.checkpoint_steps == 0 and self.step < last:
                    self.save_state()
        if self._keeps_best:
            self._load_weights(torch.load(self.out / BEST, map_location="cpu", weights_only=True))
        self.encoder.close()
        # After the best weights are loaded, because these are weights of the adapters.
        if self.adapters is not None:
            self.adapters.merge()
        self.model.eval()

    @property
    def _keeps_best(self) -> bool:
        return self.config.patience is not None or self.config.elsewhere_groups is not None

    @property
    def kept_step(self) -> int:
        """The step whose weights the model has after `fit`."""
        return int(self.best["step"]) if self._keeps_best else self.step

    def _is_over(self) -> bool:
        patience = self.config.patience
        return bool(self.best.get("lost") or (patience is not None and self.best["misses"] >= patience))

    def _remaining(self, examples: list[Example], per_epoch: int, last: int) -> Iterator[tuple[int, Batch]]:
        for epoch in range(self.step // per_epoch, self.config.epochs):
            batches = epoch_batches(
                examples,
                epoch=epoch,
                seed=self.config.seed,
                batch_size=self.config.batch_size,
                group_size=self.config.group_size,
                cross_device=self.config.cross_device,
                rank=self.rank,
                world=self.world,
            )
            # Batches before the checkpoint are drawn and skipped, so that a resumed epoch continues unchanged.
            for place, batch in enumerate(batches, start=epoch * per_epoch):
                if place >= last:
                    return
                if place >= self.step:
                    yield epoch, batch

    def _train_step(self, batch: Batch, total: int) -> dict[str, Any]:
        started = time.perf_counter()
        # `total` is of all epochs: `max_steps` ends the training early, but does not shorten the schedule.
        rate = self.config.learning_rate * rate_share(self.config, self.step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss, correct, tokens = self.accumulate(batch)
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {loss}; lower learning_rate, or use precision=float32"
            )
        # Average before unscaling and clipping: every process then clips by the same norm and takes the same step, or
        # skips it after an overflow (float16) in any of them.
        average_gradients(self.model.parameters(), self.world)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step, self.last_loss = self.step + 1, loss
        return {
            "step": self.step,
            "loss": loss,
            "accuracy": correct,
            "learning_rate": rate,
            "grad_norm": norm.item() if torch.isfinite(norm) else None,  # float16 overflows until its scale settles
            "slots": sum(batch.counts),
            "passages": len(batch.rows),
            "tokens": tokens,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def accumulate(self, batch: Batch) -> tuple[float, float, int]:
        """Backpropagate the mean loss through the texts that this process encodes.

        Returns the loss, the share of queries whose positive scores highest, and the number of tokens of its texts.
        """
        # Without cross_device each process encodes all passages of its examples.
        world, rank = (self.world, self.rank) if self.config.cross_device else (1, 0)
        columns = share(len(batch.rows), rank, world)
        retriever = self.retriever
        queries = tokenize(retriever, [retriever.query_text(item.request) for item in batch.examples], "query")
        contents = [self.corpus[batch.rows[column]].contents for column in columns]
        passages = tokenize(retriever, contents, "passage")
        known = targets(batch, mask_false_negatives=self.config.mask_false_negatives)
        found: dict[str, float] = {}

        def vector_loss(vectors_ND: Tensor) -> tuple[Tensor, Tensor]:
            queries_BD = vectors_ND[: len(queries)].requires_grad_()
            # The gathered vectors carry no graph. `sum_columns` below brings this process the gradients that the
            # losses of all processes give its passages; `average_gradients` then divides by N once.
            passages_PD = gather_columns(vectors_ND[len(queries) :], len(batch.rows), world).detach().requires_grad_()
            scores_BP = similarities(queries_BD, passages_PD, self.config.temperature)
            here = known.to(scores_BP)
            loss = self.loss(scores_BP, here)
            found["accuracy"] = accuracy(scores_BP.detach(), here)
            # Scaled before the encoder's backward pass, where small float16 gradients would become 0.
            of_queries_BD, of_passages_PD = torch.autograd.grad(self.scaler.scale(loss), (queries_BD, passages_PD))
            return loss.detach(), torch.cat((of_queries_BD, sum_columns(of_passages_PD, rank, world)))

        loss = backward(
            self.encoder,
            [*queries, *passages],
            vector_loss,
            seed=f"{self.config.seed} {self.step} {self.rank}",  # by step: a resumed run draws the same dropout
            mini_batch_tokens=self.mini_batch_tokens,
            kept_tokens=4 * self.mini_batch_tokens if self.config.kept_tokens is None else self.config.kept_tokens,
        )
        return loss.item(), found["accuracy"], sum(map(len, queries)) + sum(map(len, passages))

    # --- the curve

    def _measure(self, dev: list[Example], elsewhere: tuple[Corpus, list[Example]] | None) -> None:
        """Log the metrics of the held-out groups; with early stopping, save the weights if they are the best so far."""
        if not dev and elsewhere is None:
            return
        self.model.eval()
        found: dict[str, float] = {}
        if dev:
            pools = ("dev", "corpus") if self.config.dev_corpus else ("dev",)
            found |= dev_set.measure(self.retriever, self.corpus, dev, pools=pools, rank=self.rank, world=self.world)
        if elsewhere is not None:
            there = dev_set.measure(self.retriever, *elsewhere, rank=self.rank, world=self.world)
            found |= {name.replace("dev_", "elsewhere_", 1): value for name, value in there.items()}
        self.model.train()
        self._log({"step": self.step} | found)
        if self._keeps_best:
            self._keep(found)

    def _keep(self, found: Mapping[str, float]) -> None:
        """Save the weights if they are the best so far; note if the loss on the other set ends training."""
        config = self.config
        there = f"elsewhere_{config.dev_metric.partition('_')[2]}"
        needed = [*([config.dev_metric] if config.patience else []), *([there] if config.elsewhere_groups else [])]
        if not found.keys() >= set(needed):
            raise ConfigError(f"dev_metric {config.dev_metric!r}: expected one of {', '.join(dev_set.METRICS)}")
        if config.elsewhere_groups:
            # The first measurement, before any training, is the reference.
            self.best.setdefault("elsewhere", found[there])
            if found[there] < self.best["elsewhere"] - config.elsewhere_loss:
                self.best["lost"] = True
                log.info("%s fell to %.4f; keeping the weights of step %d", there, found[there], self.best["step"])
                return
        # Without patience no metric has to rise: the latest weights before the loss are kept.
        value = found[config.dev_metric] if config.patience else float(self.step)
        if value > self.best["value"]:
            self.best |= {"step": self.step, "value": value, "misses": 0}
            if self.rank == 0:
                with atomic_path(self.out / BEST) as temporary:
                    torch.save(self._weights(), temporary)
        else:
            self.best["misses"] += 1

    def _log(self, line: dict[str, Any]) -> None:
        if self.rank == 0:
            self.metrics_log.append([line])
            self.trackers.log(line)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated by torch on an accelerator, resident memory of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
