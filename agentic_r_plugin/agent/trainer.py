"""verl's synchronous PPO trainer with what Agentic-R adds around each step.

Losses, advantages and updates are verl's own. Added are: metrics of the trajectories, two log files, the removal of
trajectories whose search failed, a fixed order of the batch (so that a resumed step equals the uninterrupted one), and
a stop with a clear error where verl would go on: a loss that is not finite, trajectories that never arrived, too many
failed searches.

Configuration is read from `config.agentic_r`, which `launch` adds to verl's own:
`run_dir`, `max_failed_search_share`, `rollouts_per_step`, `poll_interval_s`, `keep_checkpoints`.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from transfer_queue import KVBatchMeta
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from agentic_r_plugin.agent.metrics import StepLog, not_finite, plain, trajectory_metrics
from agentic_r_plugin.errors import TrainingError
from agentic_r_plugin.store import read_json, write_json

T = TypeVar("T")

NAME = "agentic_r_sync"
"""Value of `trainer.v1.trainer_mode` that picks this trainer."""


@register_trainer(NAME)
class AgenticPPOTrainer(PPOTrainerSync):
    """PPO with verl's sync trainer; see the module."""

    def __init__(self, config: DictConfig) -> None:
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl compares this name to choose how it samples
        super().__init__(config)
        self.settings = config.agentic_r
        self.replay_buffer.poll_interval = self.settings.poll_interval_s
        run_dir = Path(self.settings.run_dir)
        self.metrics_log = StepLog(run_dir / "metrics.jsonl")
        self.rollout_log = StepLog(run_dir / "rollouts.jsonl")
        self.trajectories: list[dict[str, Any]] = []
        self.step_metrics: dict[str, Any] = {}

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> KVBatchMeta:
        """One PPO step.

        Raises:
            TrainingError: a loss or gradient norm is not finite; nothing of this step is saved.
        """
        batch = super().step(metrics, timing_raw)
        bad = not_finite(metrics)
        if bad:
            raise TrainingError(
                f"step {self.global_steps}: {', '.join(bad)} not finite; nothing of it was saved. Train again with "
                "lower learning rates (actor_lr, critic_lr), from this run's agent or from one of its checkpoints"
            )
        self.step_metrics = plain(metrics) | trajectory_metrics(self.trajectories)
        return batch

    def _balance_batch(
        self,
        batch: KVBatchMeta,
        metrics: dict[str, Any],
        logging_prefix: str = "global_seqlen",
        keep_minibatch: bool = False,
    ) -> KVBatchMeta:
        return super()._balance_batch(self._valid_in_order(batch), metrics, logging_prefix, keep_minibatch)

    def _valid_in_order(self, batch: KVBatchMeta) -> KVBatchMeta:
        """The batch without trajectories whose search failed, in an order that depends on the trajectories only.

        verl then fills the batch up to whole mini-batches with its own padding, which its losses and metrics skip; so
        every mini-batch holds at least one real trajectory.
        """
        wanted = ["extra_fields", "response_mask"]
        fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=wanted)
        extra = [dict(item) for item in list(fields["extra_fields"])]
        trained = [int(mask.sum()) for mask in fields["response_mask"].unbind()]
        expected = self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n
        check_trajectories(extra, expected, self.settings.max_failed_search_share, self.global_steps)
        check_masks(extra, trained, self.global_steps)
        self.trajectories = sorted(extra, key=_place)
        failed = [key for key, item in zip(batch.keys, extra, strict=True) if item["search_failed"]]
        if failed:
            tq.kv_clear(keys=failed, partition_id=batch.partition_id)
        rows = [row for row in zip(batch.keys, batch.tags, extra, strict=True) if not row[2]["search_failed"]]
        rows.sort(key=lambda row: _place(row[2]))
        size = self.config.actor_rollout_ref.actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n
        rows = by_length_within(rows, size, length=lambda row: row[1]["seq_len"])
        return KVBatchMeta(
            partition_id=batch.partition_id,
            keys=[key for key, _, _ in rows],
            tags=[tag for _, tag, _ in rows],
            fields=batch.fields,
            extra_info=batch.extra_info,
        )

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict[str, float], global_steps: int, epoch: int
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        metrics.update(trajectory_metrics(self.trajectories))
        shown = self.trajectories[: self.settings.rollouts_per_step]
        self.rollout_log.append({"step": global_steps, **item["trajectory"]} for item in shown)
        self.metrics_log.append([{"step": global_steps, **plain(metrics)}])

    # --- validation ---------------------------------------------------------------------------------------------------

    def _validate(self) -> dict[str, float]:
        """verl's validation; before the first step its numbers become line 0 of `metrics.jsonl`.

        Raises:
            TrainingError: more searches failed than `max_failed_search_share`.
        """
        metrics = super()._validate()
        failed = [value for name, value in metrics.items() if "/search_failed/mean" in name]
        if failed and max(failed) > self.settings.max_failed_search_share:
            raise TrainingError(_too_many("validation", max(failed), self.settings.max_failed_search_share))
        if self.global_steps == 0:
            self.metrics_log.append([{"step": 0, **plain(metrics)}])
        return metrics

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """verl's checkpoint, with this step's metrics beside it; then old checkpoints go."""
        root = Path(self.config.trainer.default_local_dir)
        folder = root / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "metrics.json", {"step": self.global_steps, **self.step_metrics})
        super()._save_checkpoint()
        if self.settings.keep_checkpoints > 0:
            for step in checkpoint_steps(root)[: -self.settings.keep_checkpoints]:
                shutil.rmtree(root / f"global_step_{step}")

    def _drop_unfinished(self) -> None:
        """Remove folders of later steps than the checkpoint in use: a kill while saving left them in pieces."""
        root = Path(self.config.trainer.default_local_dir)
        for step in checkpoint_steps(root):
            if step > self.global_steps:
                shutil.rmtree(root / f"global_step_{step}")

    def _load_checkpoint(self) -> None:
        """verl's loading; the logs then lose the steps after the checkpoint, which will be done again."""
        super()._load_checkpoint()
        self._drop_unfinished()
        self.metrics_log.keep_until(self.global_steps)
        self.rollout_log.keep_until(self.global_steps)
        if self.global_steps and self.global_steps not in {record["step"] for record in self.metrics_log.read()}:
            # The run was killed after the checkpoint and before its step's line.
            folder = Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}"
            self.metrics_log.append([read_json(folder / "metrics.json")])


def by_length_within(rows: Sequence[T], size: int, length: Callable[[T], int]) -> list[T]:
    """Rows of each mini-batch by length, so that a micro-batch pads little; no row changes its mini-batch.

    >>> by_length_within(["ccc", "a", "bb", "dd", "e"], 3, len)
    ['a', 'bb', 'ccc', 'e', 'dd']
    """
    starts = range(0, len(rows), size)
    return [row for start in starts for row in sorted(rows[start : start + size], key=length)]


def checkpoint_steps(root: Path) -> list[int]:
    """Steps of the checkpoint folders under `root`, rising."""
    return sorted(int(folder.name.rpartition("_")[2]) for folder in root.glob("global_step_*") if folder.is_dir())


def check_trajectories(trajectories: Sequence[dict[str, Any]], expected: int, max_share: float, step: int) -> None:
    """Stop where a step would silently learn from fewer trajectories than it should.

    Raises:
        TrainingError: some never arrived (their agent loop raised), or too many searches failed.
    """
    if len(trajectories) < expected:
        raise TrainingError(
            f"step {step}: {expected - len(trajectories)} of {expected} trajectories did not arrive because their "
            "agent loop raised an error; the training log shows it ('Error in _run_prompt')"
        )
    share = sum(item["search_failed"] for item in trajectories) / len(trajectories)
    if share > max_share or share == 1:
        raise TrainingError(_too_many(f"step {step}", share, max_share))


def check_masks(trajectories: Sequence[dict[str, Any]], trained: Sequence[int], step: int) -> None:
    """The tokens verl is about to train on are those the agent loop chose, trajectory by trajectory.

    Args:
        trained: sum of each trajectory's mask, as it stands in verl's batch.

    Raises:
        TrainingError: a number differs.
    """
    for item, found in zip(trajectories, trained, strict=True):
        chosen = item["trained_tokens"]
        if found != chosen:
            raise TrainingError(
                f"step {step}: {chosen} tokens of trajectory {item['trajectory']['id']!r} are to be trained on, and "
                f"verl would train on {found}; the response mask was changed on the way"
            )


def _too_many(where: str, share: float, max_share: float) -> str:
    return (
        f"{where}: the search of {share:.0%} of the trajectories failed, more than the {max_share:.0%} allowed "
        "(max_failed_search_share). Look at the retrieval service, then go on with --resume"
    )


def _place(extra_fields: dict[str, Any]) -> tuple[int, ...]:
    return tuple(extra_fields["place"])


_TaskRunner: Any = TaskRunnerV1.__ray_metadata__.modified_class  # type: ignore[attr-defined]


@ray.remote
class AgenticTaskRunner(_TaskRunner):
    """verl's task runner in a process that knows our trainer."""

    def run(self, config: DictConfig) -> None:
        """As verl's. Ray sends this class by value, so the module that registers the trainer is imported here."""
        importlib.import_module("agentic_r_plugin.agent.trainer")
        super().run(config)
