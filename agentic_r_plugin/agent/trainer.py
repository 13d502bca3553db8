"""verl's PPO trainers with what Agentic-R adds around each step.

Losses, advantages and updates are verl's own. Added are: metrics of the trajectories, two log files, the removal of
trajectories whose search failed, an order of the batch drawn by seed and step (so that mini-batches mix the data sets
and a resumed step equals the uninterrupted one), the stability rule, and a stop with a clear error where verl would go
on: a loss that is not finite (its batch is saved), trajectories that never arrived, too many failed searches.

One class for each of verl's modes: `agentic_r_sync`, `agentic_r_colocate_async` and `agentic_r_separate_async` are the
values of `trainer.v1.trainer_mode`. Configuration is read from `config.agentic_r`, which `launch` adds to verl's own:
`run_dir`, `seed`, `max_failed_search_share`, `rollouts_per_step`, `poll_interval_s`, `keep_checkpoints`, `stability`.

This is the only module that builds on what verl keeps to itself or may take away (its v1 trainers, their private
methods, TransferQueue, the replay buffer); `tests/agent/verl_members.py` names each, and can look at another verl.
"""

from __future__ import annotations

import importlib
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import ray
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf, open_dict
from transfer_queue import KVBatchMeta
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from agentic_r_plugin.agent import culprit
from agentic_r_plugin.agent.agent_loop import request_seed
from agentic_r_plugin.agent.export import shard_files
from agentic_r_plugin.agent.metrics import (
    RolloutLog,
    StepLog,
    checkpoint_steps,
    not_finite,
    plain,
    rollout_line,
    trajectory_metrics,
)
from agentic_r_plugin.agent.stability import CollapseError, StabilityRule, judge, to_keep
from agentic_r_plugin.errors import TrainingError
from agentic_r_plugin.store import read_json, write_json

T = TypeVar("T")

_Base = PPOTrainer if TYPE_CHECKING else object


class AgenticTrainer(_Base):  # type: ignore[misc, valid-type]
    """What is added to each of verl's trainers; see the module."""

    mode: ClassVar[str]
    """verl's name of the trainer."""

    def __init__(self, config: DictConfig) -> None:
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.mode  # verl compares this name to choose how it samples
        super().__init__(config)
        self.settings = config.agentic_r
        self.replay_buffer.poll_interval = self.settings.poll_interval_s
        self.lost = LostGroups(
            self.replay_buffer, int(self.settings.max_failed_search_share * config.data.train_batch_size)
        )
        self.rule = StabilityRule(**OmegaConf.to_container(self.settings.stability))  # type: ignore[arg-type]
        run_dir = Path(self.settings.run_dir)
        self.metrics_log = StepLog(run_dir / "metrics.jsonl")
        self.rollout_log = RolloutLog(run_dir / "rollouts")
        self.trajectories: list[dict[str, Any]] = []
        self.step_metrics: dict[str, Any] = {}
        self.unlogged: dict[str, Any] | None = None
        """Line of the loaded step that a kill kept from being written, while it waits for the step's validation."""

    # --- one step -----------------------------------------------------------------------------------------------------

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> KVBatchMeta:
        """One PPO step, of one update (sync) or several.

        Raises:
            TrainingError: a loss or gradient norm is not finite; its batch is saved, the step is not. Or too many
                trajectories did not arrive.
        """
        self.trajectories = []
        self.lost.count = 0
        batch: KVBatchMeta = super().step(metrics, timing_raw)
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
        shown = self.trajectories[: self.settings.rollouts_per_step]
        self.rollout_log.write(self.global_steps, [rollout_line(item, self.global_steps) for item in shown])
        return batch

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """verl's. With LoRA it marks the batch as one for the actor without adapters; the critic, next, has none."""
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
        return super()._balance_batch(self._valid_in_order(batch), metrics, logging_prefix, keep_minibatch)

    def _valid_in_order(self, batch: KVBatchMeta) -> KVBatchMeta:
        """The batch without trajectories whose search failed, in an order drawn by the seed and the step.

        GRPO compares the trajectories of a question: where one alone is left, it goes, too.

        verl takes mini-batches in the order it is given, and the order in which trajectories arrive is chance; the data
        set's order would make them by data set.

        verl then fills the batch up to whole mini-batches with its own padding, which its losses and metrics skip; so
        every mini-batch holds at least one real trajectory.
        """
        wanted = ["extra_fields", "response_mask"]
        fields = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=wanted)
        extra = [dict(item) for item in list(fields["extra_fields"])]
        trained = [int(mask.sum()) for mask in fields["response_mask"].unbind()]
        prompts = self.config.data.train_batch_size // self.parameter_sync_step
        expected = prompts * self.config.actor_rollout_ref.rollout.n
        check_trajectories(extra, expected, self.settings.max_failed_search_share, self.global_steps)
        check_masks(extra, trained, self.global_steps)

        def order(item: dict[str, Any]) -> tuple[int, tuple[int, ...]]:
            return drawn(_place(item), self.settings.seed, self.global_steps)

        self.trajectories += sorted(extra, key=order)
        rows = [row for row in zip(batch.keys, batch.tags, extra, strict=True) if not row[2]["search_failed"]]
        if self.config.algorithm.adv_estimator == "grpo":
            left = Counter(_place(item)[0] for _, _, item in rows)
            rows = [row for row in rows if left[_place(row[2])[0]] > 1]
        kept = {key for key, _, _ in rows}
        if removed := [key for key in batch.keys if key not in kept]:
            tq.kv_clear(keys=removed, partition_id=batch.partition_id)
        rows.sort(key=lambda row: order(row[2]))
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
        verdict = judge([*self.metrics_log.read(), {"step": global_steps, **plain(metrics)}], self.rule)
        metrics["agentic_r/stable"] = float(verdict.doubtful_from is None)
        self.metrics_log.append([{"step": global_steps, **plain(metrics)}])
        if global_steps in verdict.reasons:
            print(f"step {global_steps} is unstable: {'; '.join(verdict.reasons[global_steps])}", flush=True)
        if verdict.collapse is not None and self.rule.on_collapse == "stop":
            raise CollapseError(f"{verdict.describe()}; training was stopped at step {global_steps}")

    # --- validation ---------------------------------------------------------------------------------------------------

    def _validate(self) -> dict[str, float]:
        """verl's validation; before the first step its numbers become line 0 of `metrics.jsonl`.

        After a resume they may be what the last step's line still lacks.

        Raises:
            TrainingError: more searches failed than `max_failed_search_share`.
        """
        metrics = super()._validate()
        failed = [value for name, value in metrics.items() if "/search_failed/mean" in name]
        if failed and max(failed) > self.settings.max_failed_search_share:
            raise TrainingError(_too_many("validation", max(failed), self.settings.max_failed_search_share))
        if self.global_steps == 0:
            self.metrics_log.append([{"step": 0, **plain(metrics)}])
        if self.unlogged is not None:
            self.metrics_log.append([self.unlogged | plain(metrics)])
            self.unlogged = None
        return metrics

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """verl's checkpoint, with this step's metrics beside it; then old checkpoints go, but never the last stable.

        Raises:
            TrainingError: shards of other machines are not here.
        """
        root = Path(self.config.trainer.default_local_dir)
        folder = root / f"global_step_{self.global_steps}"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "metrics.json", {"step": self.global_steps, **self.step_metrics})
        super()._save_checkpoint()
        for model in ("actor", "critic") if self.use_critic else ("actor",):
            shard_files(folder / model)
        if self.settings.keep_checkpoints > 0:
            verdict = judge([*self.metrics_log.read(), {"step": self.global_steps, **self.step_metrics}], self.rule)
            steps = checkpoint_steps(root)
            for step in set(steps) - to_keep(steps, verdict, self.settings.keep_checkpoints):
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
        if self.mode != "sync":
            self.lost.ignore_present()
        if self.global_steps and not self.metrics_log.has(self.global_steps):
            self._complete_last_step()

    def _complete_last_step(self) -> None:
        """After a kill between a checkpoint and its step's line: the line, with the validation if one was due.

        verl validates after it has saved. It does so before it trains, and then not at all, if it is told to.
        """
        trainer = self.config.trainer
        line = read_json(Path(trainer.default_local_dir) / f"global_step_{self.global_steps}" / "metrics.json")
        last = self.global_steps >= self.total_training_steps
        if trainer.test_freq > 0 and (last or self.global_steps % trainer.test_freq == 0):
            self.unlogged = line
            with open_dict(self.config):
                trainer.val_before_train, trainer.val_only = True, last
        else:
            self.metrics_log.append([line])


@register_trainer("agentic_r_sync")
class AgenticPPOTrainer(AgenticTrainer, PPOTrainerSync):  # type: ignore[misc]
    """verl's synchronous trainer: a step samples, trains, and then hands over its weights."""

    mode = "sync"


@register_trainer("agentic_r_colocate_async")
class AgenticColocateAsyncTrainer(AgenticTrainer, PPOTrainerColocateAsync):  # type: ignore[misc]
    """Trainer and rollout share accelerators; trajectories that are under way go on after the weights changed."""

    mode = "colocate_async"


@register_trainer("agentic_r_separate_async")
class AgenticSeparateAsyncTrainer(AgenticTrainer, PPOTrainerSeparateAsync):  # type: ignore[misc]
    """Rollout has accelerators of its own and never stops."""

    mode = "separate_async"


def by_length_within(rows: Sequence[T], size: int, length: Callable[[T], int]) -> list[T]:
    """Rows of each run of `size` by length, so that a micro-batch pads little.

    On one worker such a run is a mini-batch. verl deals the rows of a batch out to several workers by length, and takes
    each worker's share of a mini-batch from those it got, in this order; there rows near a boundary may change sides.

    >>> by_length_within(["ccc", "a", "bb", "dd", "e"], 3, len)
    ['a', 'bb', 'ccc', 'e', 'dd']
    """
    starts = range(0, len(rows), size)
    return [row for start in starts for row in sorted(rows[start : start + size], key=length)]


def drawn(place: tuple[int, ...], seed: int, step: int) -> tuple[int, tuple[int, ...]]:
    """Sort key that puts a step's trajectories into an order of chance, the same one when the step is done again.

    >>> sorted([(0, 0), (1, 0), (2, 0), (3, 0)], key=lambda place: drawn(place, 0, 1))
    [(3, 0), (0, 0), (2, 0), (1, 0)]
    """
    return request_seed(seed, step, *place), place


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


class LostGroups:
    """Counts the question groups that verl's replay buffer replaces because an agent loop raised an error.

    The asynchronous trainers replace such a group by the next question, without end; in the synchronous one the step
    lacks its trajectories, which `check_trajectories` sees.

    Args:
        buffer: verl's replay buffer; from now on it raises where a step loses too many.
        most: groups that a step may lose.
    """

    def __init__(self, buffer: Any, most: int) -> None:
        self.buffer, self.most, self.count = buffer, most, 0
        self.ignored: frozenset[str] = frozenset()
        self._evict = buffer._evict_terminal_groups
        buffer._evict_terminal_groups = self._evict_and_count

    def ignore_present(self) -> None:
        """Leave out groups that a checkpoint brought along: what failed them may be mended by now."""
        self.buffer._sync_metadata_from_transfer_queue()
        self.ignored = frozenset(self.buffer.failure_keys["train"])

    def _evict_and_count(self, global_steps: int, partition_id: str, eviction_reasons: tuple[Any, ...]) -> Any:
        self.count += len(eviction_reasons[2] - self.ignored)
        if self.count > self.most:
            raise TrainingError(
                f"step {global_steps}: the agent loops of {self.count} questions raised an error, more than the "
                f"{self.most} a step may lose (max_failed_search_share of batch_size); the training log shows it "
                "('Error in _run_prompt')"
            )
        return self._evict(global_steps, partition_id, eviction_reasons)


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
