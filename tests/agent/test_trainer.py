"""What the trainer adds around verl's step; the whole of it runs in `test_ppo_end_to_end.py`."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transfer_queue
from omegaconf import OmegaConf
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.v1.replay_buffer import ReplayBufferAsync
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, get_trainer_cls
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from agentic_r_plugin.agent import worker
from agentic_r_plugin.agent.checkpoints import checkpoint_steps
from agentic_r_plugin.agent.metrics import RolloutLog
from agentic_r_plugin.agent.stability import CollapseError, StabilityRule
from agentic_r_plugin.agent.step_batch import by_length_within
from agentic_r_plugin.agent.trainer import AgenticPPOTrainer, LostGroups, WholeAndStable
from agentic_r_plugin.config import to_dict
from agentic_r_plugin.errors import TrainingError
from agentic_r_plugin.store import StepLog, read_json, write_json


def trainer_in(folder: Path, **settings: Any) -> AgenticPPOTrainer:
    """A trainer with its logs, without verl's workers."""
    made = AgenticPPOTrainer.__new__(AgenticPPOTrainer)
    made.global_steps = 7
    made.settings = SimpleNamespace(
        run_dir=str(folder), rollouts_per_step=1, keep_checkpoints=1, max_failed_search_share=0.0, **settings
    )
    made.rule = StabilityRule(window=1, patience=2, on_collapse="stop")
    made.metrics_log, made.rollout_log = StepLog(folder / "metrics.jsonl"), RolloutLog(folder / "rollouts")
    made.config = OmegaConf.create({"trainer": {"default_local_dir": str(folder / "checkpoints")}})
    made.trajectories, made.step_metrics, made.unlogged = [], {}, None
    made.lost = SimpleNamespace(count=0)  # type: ignore[assignment]
    made.use_critic = True
    return made


def ordering(batch: int, *, mini_batch: int, step: int = 1, seed: int = 0, samples: int = 1, updates: int = 1) -> Any:
    """A trainer with what `_valid_in_order` looks at: PPO, no failed search allowed."""
    made: Any = AgenticPPOTrainer.__new__(AgenticPPOTrainer)
    made.parameter_sync_step, made.global_steps, made.trajectories = updates, step, []
    made.settings = SimpleNamespace(max_failed_search_share=0.0, seed=seed)
    made.config = OmegaConf.create(
        {"data": {"train_batch_size": batch}, "algorithm": {"adv_estimator": "gae"},
         "actor_rollout_ref": {"rollout": {"n": samples}, "actor": {"ppo_mini_batch_size": mini_batch}}}
    )  # fmt: skip
    return made


def outcome(em: int) -> dict[str, Any]:
    """The agent loop's `extra_fields` of one trajectory."""
    trajectory = {"id": "q", "text": "t", "golden_answers": ["x"], "em": em}
    return {
        "em": em, "f1": em, "searches": 1, "malformed_turns": 0, "search_failed": 0, "masked_token_share": 0.5,
        "generated_tokens": 5, "trained_tokens": 2, "stop_reason": "answered", "trajectory": trajectory, "prompt": "p",
        "segments": [],
    }  # fmt: skip


def test_a_loss_that_is_not_finite_stops_and_leaves_its_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    batch = SimpleNamespace(keys=["a_0_0"], partition_id="train")

    def step(self: Any, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        metrics.update({"actor/pg_loss": math.nan, "critic/vf_loss": 0.5})
        self.trajectories += [outcome(1)]
        return batch

    def rows(keys: list[str], partition_id: str, select_fields: list[str]) -> dict[str, torch.Tensor]:
        assert (keys, partition_id) == (["a_0_0"], "train") and "advantages" in select_fields
        return {"advantages": torch.nested.as_nested_tensor([torch.tensor([math.inf, 1.0])], layout=torch.jagged)}

    monkeypatch.setattr(PPOTrainerSync, "step", step)
    monkeypatch.setattr(transfer_queue, "kv_batch_get", rows)
    with pytest.raises(TrainingError, match=r"step 7: actor/pg_loss not finite; the step was not saved, its batch is"):
        trainer_in(tmp_path).step({}, {})
    report = read_json(tmp_path / "culprits" / "step_7" / "report.json")
    assert report["fields"]["advantages"]["not_finite_in"] == ["a_0_0"]


def test_a_collapse_stops_the_training_once_it_is_certain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(PPOTrainer, "_compute_metrics", lambda *_, **__: None)
    trainer = trainer_in(tmp_path)

    def log(step: int, em: int) -> dict[str, Any]:
        metrics: dict[str, Any] = {}
        trainer.trajectories = [outcome(em)]
        trainer._compute_metrics(None, metrics, {}, global_steps=step, epoch=0)  # type: ignore[arg-type]
        return metrics

    assert log(1, 1)["agentic_r/stable"] == 1.0
    assert log(2, 0)["agentic_r/stable"] == 0.0
    with pytest.raises(CollapseError, match=r"collapse at step 2: reward 0\.000, best 1\.000; .* stopped at step 3"):
        log(3, 0)
    assert [line["step"] for line in trainer.metrics_log.read()] == [1, 2, 3]


def test_a_saved_step_has_its_rollouts_before_its_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def step(self: Any, metrics: dict[str, Any], timing_raw: dict[str, float]) -> Any:
        self.trajectories += [outcome(0), outcome(1)]

    monkeypatch.setattr(PPOTrainerSync, "step", step)
    trainer = trainer_in(tmp_path)
    trainer.step({}, {})
    assert [line["score"] for line in trainer.rollout_log.read(7)] == [0.0]
    assert trainer.step_metrics["agentic_r/em"] == 0.5
    assert read_json(tmp_path / "last_step.json") == {"step": 7, **trainer.step_metrics}


@pytest.mark.parametrize(
    ("total", "test_freq", "validates", "ends"),
    [(7, 50, True, True), (9, 7, True, False), (9, 50, False, False), (7, -1, False, False)],
)
def test_a_step_that_was_saved_but_not_logged_gets_its_line_with_the_validation_it_was_due(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, total: int, test_freq: int, validates: bool, ends: bool
) -> None:
    trainer = trainer_in(tmp_path)
    trainer.total_training_steps = total
    trainer.config.trainer.update({"test_freq": test_freq, "val_before_train": False, "val_only": False})
    write_json(tmp_path / "last_step.json", {"step": 7, "agentic_r/em": 0.5})
    for step in (6, 7, 8):
        (tmp_path / "checkpoints" / f"global_step_{step}").mkdir(parents=True)
    trainer.metrics_log.append([{"step": 6}, {"step": 8}])
    synchronised = []
    monkeypatch.setattr(PPOTrainerSync, "on_init_end", lambda self: synchronised.append(self))
    monkeypatch.setattr(PPOTrainer, "_validate", lambda self: {"val-core/towns/acc/mean@1": 0.25})
    trainer.on_init_end()
    assert synchronised == [trainer]
    assert checkpoint_steps(tmp_path / "checkpoints") == [6, 7]  # 8 was not saved to its end
    settings = trainer.config.trainer
    assert (settings.val_before_train, settings.val_only) == (validates, ends)
    line = {"step": 7, "agentic_r/em": 0.5}
    if validates:
        assert [record["step"] for record in trainer.metrics_log.read()] == [6]  # a kill now changes nothing
        trainer._validate()
        line["val-core/towns/acc/mean@1"] = 0.25
    assert trainer.metrics_log.read() == [{"step": 6}, line]
    trainer._validate()
    assert trainer.metrics_log.read() == [{"step": 6}, line]


def test_a_run_whose_last_line_is_missing_is_not_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = OmegaConf.create(
        {"trainer": {"total_training_steps": 2}, "agentic_r": {"stability": to_dict(StabilityRule())}}
    )
    OmegaConf.save(config, tmp_path / "verl.yaml")
    (tmp_path / "checkpoints" / "global_step_2").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    log, started = StepLog(tmp_path / "metrics.jsonl"), []

    def run_verl(config: Any) -> None:
        started.append(1)
        log.append([{"step": 2, "agentic_r/em": 1.0}])

    monkeypatch.setattr(worker, "_run_verl", run_verl)
    monkeypatch.setattr(worker, "export_model", lambda *_: None)
    log.append([{"step": 1, "agentic_r/em": 1.0}])
    worker.train(tmp_path)
    worker.train(tmp_path)
    assert started == [1]


def test_the_last_stable_checkpoint_outlives_newer_ones(tmp_path: Path) -> None:
    trainer, own = trainer_in(tmp_path), OwnCallback()
    for step, em in ((1, 1.0), (2, 1.0), (3, 0.0), (4, 0.0)):
        trainer.step_metrics = {"agentic_r/em": em}
        saved(trainer, step, ranks=(0, 1), own=own)
        trainer.metrics_log.append([{"step": step, "agentic_r/em": em}])
    assert own.saved == [1, 2, 3, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["global_step_2", "global_step_4"]
    config = OmegaConf.create({"agentic_r": {"stability": to_dict(trainer.rule)}})
    assert worker.choose(tmp_path, config, stopped=True) == 2
    record = read_json(tmp_path / "stability.json")
    assert (record["checkpoint"], record["collapse"], record["stopped"]) == (2, 3, True)
    assert record["unstable"] == {"3": ["reward 0.000, best 1.000"], "4": ["reward 0.000, best 1.000"]}


class OwnCallback(CheckpointCallback):
    """A callback that a user names in `trainer.checkpoint_callback_class`."""

    def __init__(self) -> None:
        self.saved: list[int] = []

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, **_: Any) -> None:
        assert (Path(checkpoint_dir) / "critic").is_dir()
        self.saved.append(global_step)


def saved(trainer: AgenticPPOTrainer, step: int, *, ranks: tuple[int, ...], own: CheckpointCallback) -> None:
    """A checkpoint as two ranks of verl's engine leave it, as far as they write to this machine's disk, announced."""
    folder = Path(trainer.config.trainer.default_local_dir) / f"global_step_{step}"
    for model in ("actor", "critic"):
        write_json(folder / model / "fsdp_config.json", {"world_size": 2})
        for rank in ranks:
            (folder / model / f"model_world_size_2_rank_{rank}.pt").touch()
    WholeAndStable(own).on_save(trainer=trainer, global_step=step, checkpoint_dir=str(folder), async_save=False)


def test_shards_on_another_machines_disk_are_missed_at_the_first_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step_7/actor: model_world_size_2_rank_1\.pt is missing.*a shared disk"):
        saved(trainer_in(tmp_path), 7, ranks=(0,), own=OwnCallback())


def test_with_lora_the_critic_is_not_asked_to_leave_adapters_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def reference(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        batch.extra_info.update({"temperature": 1.0, "no_lora_adapter": True})
        return batch

    monkeypatch.setattr(PPOTrainer, "_compute_ref_log_prob", reference)
    batch = transfer_queue.KVBatchMeta(partition_id="train", keys=["a"], tags=[{}], extra_info={})
    assert trainer_in(tmp_path)._compute_ref_log_prob(batch, {}).extra_info == {"temperature": 1.0}


def test_a_collapse_before_the_first_checkpoint_says_so_in_the_error_and_in_the_file(tmp_path: Path) -> None:
    rule = StabilityRule(window=1, patience=2)
    StepLog(tmp_path / "metrics.jsonl").append(
        [{"step": step, "agentic_r/em": em} for step, em in enumerate([1, 0, 0])]
    )
    config = OmegaConf.create({"agentic_r": {"stability": to_dict(rule)}})
    with pytest.raises(TrainingError, match=r"collapse at step 1: .* before the first checkpoint: .*save_every"):
        worker.choose(tmp_path, config, stopped=True)
    record = read_json(tmp_path / "stability.json")
    assert (record["checkpoint"], record["collapse"], record["stopped"]) == (None, 1, True)


@pytest.mark.parametrize(
    ("mode", "verls"),
    [
        ("sync", PPOTrainerSync),
        ("colocate_async", PPOTrainerColocateAsync),
        ("separate_async", PPOTrainerSeparateAsync),
    ],
)
def test_each_of_verls_modes_has_a_trainer_that_verl_sees_under_its_own_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, verls: type
) -> None:
    seen = []

    def init(self: Any, config: Any) -> None:
        seen.append(config.trainer.v1.trainer_mode)
        self.replay_buffer = SimpleNamespace(_evict_terminal_groups=None)
        self.checkpoint_callback = own

    own = OwnCallback()
    monkeypatch.setattr(verls, "__init__", init)
    ours = get_trainer_cls(f"agentic_r_{mode}")
    config = OmegaConf.create(
        {
            "trainer": {"v1": {"trainer_mode": f"agentic_r_{mode}"}},
            "data": {"train_batch_size": 8},
            "agentic_r": {"run_dir": str(tmp_path), "max_failed_search_share": 0.25,
                          "stability": to_dict(StabilityRule())},
        }
    )  # fmt: skip
    made: Any = ours(config)
    assert issubclass(ours, verls) and seen == [mode]
    assert made.replay_buffer.poll_interval == 0.05 and made.rule == StabilityRule()
    assert made.lost.most == 2 and made.checkpoint_callback.configured is own


def test_agent_loops_that_go_on_failing_stop_an_asynchronous_run(monkeypatch: pytest.MonkeyPatch) -> None:
    queue: dict[str, dict[str, Any]] = {}

    def ask(questions: int) -> None:
        assert len(asked) < 100, "verl asks for new questions without end"
        asked.append(questions)
        queue.update({f"{len(asked)}.{number}": failed for number in range(questions)})

    failed = {"is_prompt": True, "status": "failure", "global_steps": 1}
    asked: list[int] = []
    monkeypatch.setattr(transfer_queue, "kv_list", lambda partition_id=None: {"train": dict(queue)})
    monkeypatch.setattr(transfer_queue, "kv_clear", lambda partition_id, keys: [queue.pop(key, None) for key in keys])
    buffer = ReplayBufferAsync("separate_async", OmegaConf.create(), None, "drop", OmegaConf.create(), refill_fn=ask)
    queue.update({"restored.0": failed, "restored.1": failed, "restored.2": failed, "restored.3": failed})
    lost = LostGroups(buffer, most=3)
    lost.ignore_present()
    with pytest.raises(TrainingError, match=r"step 5: the agent loops of 4 questions raised an error, more than the 3"):
        buffer.sample(global_steps=5, partition_id="train", batch_size=2)
    assert asked == [4]


def test_an_asynchronous_step_expects_the_trajectories_of_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = ordering(4, mini_batch=2, updates=2)
    items = [outcome(1) | {"place": [place, 0]} for place in (1, 0)]
    fields = {
        "extra_fields": items,
        "response_mask": torch.nested.as_nested_tensor([torch.ones(2), torch.ones(2)], layout=torch.jagged),
    }
    monkeypatch.setattr(transfer_queue, "kv_batch_get", lambda **_: fields)
    batch = transfer_queue.KVBatchMeta(partition_id="train", keys=["b", "a"], tags=[{"seq_len": 3}, {"seq_len": 3}])
    assert sorted(trainer._valid_in_order(batch).keys) == ["a", "b"]
    assert trainer._valid_in_order(batch).keys == trainer._valid_in_order(batch).keys
    assert len(trainer.trajectories) == 6  # of all updates of the step


def test_mini_batches_and_shown_rollouts_mix_the_data_sets_and_are_drawn_again_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size, shown = 128, 16
    rows = list(range(2 * size))  # of the data set: the first half is one benchmark, the second half another

    def step_of(arrived: list[int], step: int, seed: int = 0) -> tuple[list[int], list[int]]:
        trainer = ordering(2 * size, mini_batch=size, step=step, seed=seed)
        fields = {
            "extra_fields": [outcome(1) | {"place": [row, 0]} for row in arrived],
            "response_mask": torch.nested.as_nested_tensor([torch.ones(2)] * len(arrived), layout=torch.jagged),
        }
        monkeypatch.setattr(transfer_queue, "kv_batch_get", lambda **_: fields)
        tags = [{"seq_len": row % 7} for row in arrived]
        batch = transfer_queue.KVBatchMeta(partition_id="train", keys=[str(row) for row in arrived], tags=tags)
        keys = [int(key) for key in trainer._valid_in_order(batch).keys]
        return keys, [item["place"][0] for item in trainer.trajectories][:shown]

    keys, first = step_of(rows, step=1)
    assert sorted(keys) == rows
    assert 0.35 < sum(row < size for row in keys[:size]) / size < 0.65
    assert 3 < sum(row < size for row in first) < 13
    assert step_of(rows[::-1], step=1) == (keys, first)  # whatever the order of arrival
    assert set(step_of(rows, step=2)[0][:size]) != set(keys[:size])
    assert set(step_of(rows, step=1, seed=1)[0][:size]) != set(keys[:size])


def test_grpo_leaves_out_a_trajectory_whose_group_lost_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = ordering(2, mini_batch=2, samples=2)
    trainer.settings.max_failed_search_share = 0.5
    places = {"a": [0, 0], "b": [0, 1], "c": [1, 0], "d": [1, 1]}
    items = [
        outcome(1) | {"place": place, "search_failed": int(key == "d"), "trained_tokens": 2 * (key != "d")}
        for key, place in places.items()
    ]
    masks = [torch.full((2,), float(key != "d")) for key in places]
    fields = {"extra_fields": items, "response_mask": torch.nested.as_nested_tensor(masks, layout=torch.jagged)}
    cleared: list[str] = []
    monkeypatch.setattr(transfer_queue, "kv_batch_get", lambda **_: fields)
    monkeypatch.setattr(transfer_queue, "kv_clear", lambda keys, partition_id: cleared.extend(keys))
    batch = transfer_queue.KVBatchMeta(partition_id="train", keys=list(places), tags=[{"seq_len": 3}] * 4)
    for estimator, kept in (("gae", ["a", "b", "c"]), ("grpo", ["a", "b"])):
        trainer.config.algorithm.adv_estimator = estimator
        cleared.clear()
        assert (sorted(trainer._valid_in_order(batch).keys), cleared) == (kept, sorted(places.keys() - set(kept)))


def test_rows_of_a_mini_batch_are_put_in_order_of_length() -> None:
    rows = [(9, "a"), (3, "b"), (5, "c"), (2, "d"), (8, "e")]
    ordered = by_length_within(rows, 3, length=lambda row: row[0])
    assert ordered == [(3, "b"), (5, "c"), (9, "a"), (2, "d"), (8, "e")]
