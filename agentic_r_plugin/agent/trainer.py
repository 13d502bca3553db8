"""verl's PPO trainers, extended with what Agentic-R adds around each step.

Losses, advantages and updates are verl's own. This module adds trajectory metrics, two log files, and the stability
rule. It removes trajectories whose search failed, and shuffles the batch by seed and step, so that mini-batches mix the
data sets and a resumed step equals the uninterrupted one. It stops with a clear error where verl would continue: a
non-finite loss (the batch is saved), missing trajectories, or too many failed searches.

There is one class per verl mode: `agentic_r_sync`, `agentic_r_colocate_async` and `agentic_r_separate_async` are the
values of `trainer.v1.trainer_mode`. Settings are read from `config.agentic_r`, which `launch` adds to verl's own:
`run_dir`, `seed`, `max_failed_search_share`, `rollouts_per_step`, `keep_checkpoints`, `stability`.

This is the only module that depends on private or unstable parts of verl's trainers (their private methods,
TransferQueue, the replay buffer). `tests/agent/verl_members.py` lists each and can check another version of verl.
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import ray
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf, open_dict
from transfer_queue import KVBatchMeta
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from agentic_r_plugin.agent import culprit
from agentic_r_plugin.agent.checkpoints import checkpoint_steps
from agentic_r_plugin.agent.export import shard_files
from agentic_r_plugin.agent.metrics import RolloutLog, not_finite, plain, rollout_line, trajectory_metrics
from agentic_r_plugin.agent.stability import CollapseError, StabilityRule, judge, to_keep
from agentic_r_plugin.agent.step_batch import (
    BatchRow,
    by_length_within,
    check_masks,
    check_trajectories,
    drawn,
    too_many_failed,
    trainable,
)
from agentic_r_plugin.errors import TrainingError
from agentic_r_plugin.store import StepLog, read_json, write_json

_Base = PPOTrainer if TYPE_CHECKING else object

POLL_INTERVAL_S = 0.05
"""Seconds between two looks for finished trajectories; verl waits 2, which is longer than a step of a small agent."""

_EACH_ALONE = ("gae", "remax", "reinforce_plus_plus")
"""verl's advantage estimators that do not compare the trajectories of one question."""

LAST_STEP = "last_step.json"
"""File of the run folder with the metrics of the last trained step."""


class AgenticTrainer(_Base):  # type: ignore[misc, valid-type]
    """Additions shared by all of verl's trainers; see the module docstring."""

    mode: ClassVar[str]
    """verl's name of the trainer mode."""

    def __init__(self, config: DictConfig) -> None:
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.mode  # verl compares this name to choose the sampling mode
        super().__init__(config)
        self.settings = config.agentic_r
        self.replay_buffer.poll_interval = POLL_INTERVAL_S
        self.lost = LostGroups(
            self.replay_buffer, int(self.settings.max_failed_search_share * config.data.train_batch_size)
        )
        self.rule = StabilityRule(**OmegaConf.to_container(self.settings.stability))  # type: ignore[arg-type]
        run_dir = Path(self.settings.run_dir)
        self.metrics_log = StepLog(run_dir / "metrics.jsonl")
        self.rollout_log = RolloutLog(run_dir / "rollouts")
        self.checkpoint_callback: CheckpointCallback = WholeAndStable(self.checkpoint_callback)
        self.trajectories: list[dict[str, Any]] = []
        self.step_metrics: dict[str, Any] = {}
        self.unlogged: dict[str, Any] | None = None
        """Missing metrics line of the loaded step (after a kill), held back until the step's validation has run."""

    # --- One step -----------------------------------------------------------------------------------------------------

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> KVBatchMeta:
        """Run one PPO step, with one update (sync) or several.

        Raises:
            TrainingError: a loss or gradient norm is not finite (the batch is saved, the step is not), or too many
                trajectories are missing.
        """
        # With separate_async a step samples several batches; both collect over all of them.
        self.trajectories = []
        self.lost.count = 0
        batch: KVBatchMeta = super().step(metrics, timing_raw)
        # Checked here, because verl saves the checkpoint after this method.
        bad = not_finite(metrics)
        if bad:
            folder = Path(self.settings.run_dir) / "culprits" / f"step_{self.global_steps}"
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(culprit.FIELDS))
            fields = {name: list(data[name].unbind()) for name in culprit.FIELDS if name in data}
            culprit.write_culprit(folder, batch.keys, fields, self.trajectories, metrics, step=self.global_steps)
            raise TrainingError(
                f"step {self.global_steps}: {', '.join(bad)} not finite; the step was not saved, its batch is in "
                f"{folder} (report.json says where numbers are not finite). Train again with lower learning rates "
                "(actor_lr, critic_lr), from this run's agent or from one of its checkpoints"
            )
        self.step_metrics = plain(metrics) | trajectory_metrics(self.trajectories)
        shown = self.trajectories[: self.settings.rollouts_per_step]  # a random sample: `_arrived` shuffled them
        self.rollout_log.write(self.global_steps, [rollout_line(item, self.global_steps) for item in shown])
        # Before the checkpoint: a kill between checkpoint and metrics line must not lose the line.
        write_json(Path(self.settings.run_dir) / LAST_STEP, {"step": self.global_steps, **self.step_metrics})
        return batch

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """verl's method; with LoRA it marks the batch `no_lora_adapter`, which must not reach the critic."""
        batch = super()._compute_ref_log_prob(batch, metrics)
        batch.extra_info.pop("no_lora_adapter", None)
        return batch

    def _balance_batch(
        self,
        batch: KVBatchMeta,
        metrics: dict[str, Any],
        logging_prefix: str = "global_seqlen",
        keep_minibatch: bool = False,
    ) -> KVBatchMeta:
        # Before verl's own method, which pads the batch to full mini-batches and divides it over the workers.
        return super()._balance_batch(self._valid_in_order(batch), metrics, logging_prefix, keep_minibatch)

    def _valid_in_order(self, batch: KVBatchMeta) -> KVBatchMeta:
        """The trajectories to train on, in the order in which verl forms mini-batches.

        Failed trajectories are removed. The rest is shuffled by seed and step, because the order of arrival is random,
        and the data set's order would separate the data sets.

        verl then pads the batch to full mini-batches; its losses and metrics skip the padding. Every mini-batch
        therefore holds at least one real trajectory.
        """
        arrived = self._arrived(batch)
        # Metrics and logs cover failed trajectories too, so all are recorded before any is removed.
        self.trajectories += [row.extra for row in arrived]
        several = self.config.actor_rollout_ref.rollout.n > 1
        rows = trainable(arrived, compared=several and self.config.algorithm.adv_estimator not in _EACH_ALONE)
        kept = {row.key for row in rows}
        # At the end of a step verl clears only the keys that it trained on; these would stay in its store.
        if removed := [key for key in batch.keys if key not in kept]:
            tq.kv_clear(keys=removed, partition_id=batch.partition_id)
        # In trajectories: `ppo_mini_batch_size` counts questions.
        size = self.config.actor_rollout_ref.actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n
        rows = by_length_within(rows, size, length=lambda row: row.tag["seq_len"])
        return KVBatchMeta(
            partition_id=batch.partition_id,
            keys=[row.key for row in rows],
            tags=[row.tag for row in rows],
            fields=batch.fields,
            extra_info=batch.extra_info,
        )

    def _arrived(self, batch: KVBatchMeta) -> list[BatchRow]:
        """All trajectories of the batch, checked and shuffled by seed and step.

        Raises:
            TrainingError: trajectories are missing, too many searches failed, or a mask was changed.
        """
        wanted = ["extra_fields", "response_mask"]
        fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=wanted)
        extra = [dict(item) for item in list(fields["extra_fields"])]
        prompts = self.config.data.train_batch_size // self.parameter_sync_step
        expected = prompts * self.config.actor_rollout_ref.rollout.n
        check_trajectories(extra, expected, self.settings.max_failed_search_share, self.global_steps)
        check_masks(extra, [int(mask.sum()) for mask in fields["response_mask"].unbind()], self.global_steps)
        rows = [BatchRow(*row) for row in zip(batch.keys, batch.tags, extra, strict=True)]
        return sorted(rows, key=lambda row: drawn(row.place, self.settings.seed, self.global_steps))

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict[str, float], global_steps: int, epoch: int
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        metrics.update(trajectory_metrics(self.trajectories))
        # The step is judged before it is logged, so that its own line can say whether training is stable.
        verdict = judge([*self.metrics_log.read(), {"step": global_steps, **plain(metrics)}], self.rule)
        metrics["agentic_r/stable"] = float(verdict.doubtful_from is None)
        # Before a collapse is raised: `worker.choose` judges the run by these lines.
        self.metrics_log.append([{"step": global_steps, **plain(metrics)}])
        if global_steps in verdict.reasons:
            print(f"step {global_steps} is unstable: {'; '.join(verdict.reasons[global_steps])}", flush=True)
        if verdict.collapse is not None and self.rule.on_collapse == "stop":
            raise CollapseError(f"{verdict.describe()}; training was stopped at step {global_steps}")

    # --- Validation ---------------------------------------------------------------------------------------------------

    def _validate(self) -> dict[str, float]:
        """Run verl's validation; before the first step its metrics become line 0 of `metrics.jsonl`.

        After a resume, the metrics may complete the line of the last step.

        Raises:
            TrainingError: more searches failed than `max_failed_search_share` allows.
        """
        metrics = super()._validate()
        failed = max((value for name, value in metrics.items() if "/search_failed/mean" in name), default=0.0)
        if failed > self.settings.max_failed_search_share:
            raise too_many_failed("validation", failed, self.settings.max_failed_search_share)
        if self.global_steps == 0:
            self.metrics_log.append([{"step": 0, **plain(metrics)}])
        if self.unlogged is not None:
            self.metrics_log.append([self.unlogged | plain(metrics)])
            self.unlogged = None
        return metrics

    # --- Resume -------------------------------------------------------------------------------------------------------

    def on_init_end(self) -> None:
        """After verl has loaded its checkpoint: drop what belongs to later steps, which will be repeated."""
        root = Path(self.config.trainer.default_local_dir)
        for step in checkpoint_steps(root):
            if step > self.global_steps:  # a kill while saving left it incomplete
                shutil.rmtree(root / f"global_step_{step}")
        self.metrics_log.keep_until(self.global_steps)
        self.rollout_log.keep_until(self.global_steps)
        # Only these modes restore trajectories from a checkpoint.
        if self.mode != "sync":
            self.lost.ignore_present()
        if self.global_steps and not self.metrics_log.has(self.global_steps):
            self._complete_last_step()
        super().on_init_end()

    def _complete_last_step(self) -> None:
        """Write the missing metrics line of a step that was killed after its checkpoint was saved.

        verl validates after saving, so a validation that was due is missing too. It is repeated through
        `val_before_train`; after the last step, `val_only` makes verl validate without training.
        """
        trainer = self.config.trainer
        # The file is of this step, because no later step starts before this one's line is written.
        line = read_json(Path(self.settings.run_dir) / LAST_STEP)
        last = self.global_steps >= self.total_training_steps
        # verl's own condition for a validation.
        if trainer.test_freq > 0 and (last or self.global_steps % trainer.test_freq == 0):
            self.unlogged = line
            with open_dict(self.config):
                trainer.val_before_train, trainer.val_only = True, last
        else:
            self.metrics_log.append([line])


class WholeAndStable(CheckpointCallback):
    """After each save: checks that the checkpoint is whole, and removes old ones except the last stable one.

    Args:
        configured: the callback of `trainer.checkpoint_callback_class`, which is called first.
    """

    def __init__(self, configured: CheckpointCallback) -> None:
        super().__init__()
        self.configured = configured

    def on_save(
        self, trainer: AgenticTrainer, global_step: int, checkpoint_dir: str, async_save: bool = False, **more: Any
    ) -> None:
        """Called by verl once the checkpoint is written and named as the newest.

        Raises:
            TrainingError: shards written by other machines are missing here.
        """
        self.configured.on_save(
            trainer=trainer, global_step=global_step, checkpoint_dir=checkpoint_dir, async_save=async_save, **more
        )
        folder = Path(checkpoint_dir)
        for model in ("actor", "critic") if trainer.use_critic else ("actor",):
            shard_files(folder / model)
        keep = trainer.settings.keep_checkpoints
        if keep > 0:
            # verl saves before it logs, so this step's line is not in the log yet.
            verdict = judge([*trainer.metrics_log.read(), {"step": global_step, **trainer.step_metrics}], trainer.rule)
            steps = checkpoint_steps(folder.parent)
            for step in set(steps) - to_keep(steps, verdict, keep):
                shutil.rmtree(folder.with_name(f"global_step_{step}"))


@register_trainer("agentic_r_sync")
class AgenticPPOTrainer(AgenticTrainer, PPOTrainerSync):  # type: ignore[misc]
    """verl's synchronous trainer: each step samples, trains, and then sends its weights to the rollout engine."""

    mode = "sync"


@register_trainer("agentic_r_colocate_async")
class AgenticColocateAsyncTrainer(AgenticTrainer, PPOTrainerColocateAsync):  # type: ignore[misc]
    """Trainer and rollout share accelerators; unfinished trajectories continue after the weights change."""

    mode = "colocate_async"


@register_trainer("agentic_r_separate_async")
class AgenticSeparateAsyncTrainer(AgenticTrainer, PPOTrainerSeparateAsync):  # type: ignore[misc]
    """The rollout has its own accelerators and never pauses."""

    mode = "separate_async"


class LostGroups:
    """Counts the question groups that verl's replay buffer drops because an agent loop raised an error.

    The asynchronous trainers replace such a group with the next question, without limit. In the synchronous trainer its
    trajectories are missing from the step, which `check_trajectories` detects.

    Args:
        buffer: verl's replay buffer; it is patched to raise `TrainingError` when a step loses too many groups.
        most: maximum number of groups that a step may lose.
    """

    def __init__(self, buffer: Any, most: int) -> None:
        self.buffer, self.most, self.count = buffer, most, 0
        self.ignored: frozenset[str] = frozenset()
        self._evict = buffer._evict_terminal_groups
        buffer._evict_terminal_groups = self._evict_and_count

    def ignore_present(self) -> None:
        """Do not count failed groups restored from a checkpoint: the cause may be fixed by now."""
        tags = (tq.kv_list("train") or {}).get("train", {})
        self.ignored = frozenset(key for key, tag in tags.items() if tag.get("status") == "failure")

    def _evict_and_count(self, global_steps: int, partition_id: str, eviction_reasons: tuple[Any, ...]) -> Any:
        if partition_id == "train":  # a failed validation is judged by `_validate`
            self.count += len(eviction_reasons[2] - self.ignored)  # verl's order: stale, filtered, failed groups
        if self.count > self.most:
            raise TrainingError(
                f"step {global_steps}: the agent loops of {self.count} questions raised an error, more than the "
                f"{self.most} a step may lose (max_failed_search_share of batch_size); the training log shows it "
                "('Error in _run_prompt')"
            )
        return self._evict(global_steps, partition_id, eviction_reasons)


# The plain class behind verl's Ray actor: Ray allows no subclass of an actor class.
_TaskRunner: Any = TaskRunnerV1.__ray_metadata__.modified_class  # type: ignore[attr-defined]


@ray.remote
class AgenticTaskRunner(_TaskRunner):
    """verl's task runner, with our trainers registered in its process."""

    def run(self, config: DictConfig) -> None:
        """Run verl's task. Ray pickles this class by value, so the module that registers the trainers is imported."""
        importlib.import_module("agentic_r_plugin.agent.trainer")
        super().run(config)


class LocalTaskRunner:
    """verl's task runner in the calling process, with the interface of a Ray actor that `run_ppo` expects.

    On one machine the actor is a second process that imports all of verl (7 to 14 CPU seconds) while the first waits.
    """

    remote = classmethod(lambda cls: cls())

    @property
    def run(self) -> SimpleNamespace:
        """Its `remote(config)` runs verl's task to the end."""
        # `run_ppo` calls `ray.get` on the result, so it must be an object reference.
        return SimpleNamespace(remote=lambda config: ray.put(_TaskRunner().run(config)))
