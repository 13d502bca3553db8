"""The parts of verl that agent training builds on have the shape it was written for."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, get_trainer_cls
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.rollout.llm_server import LLMServerClient

from agentic_r_plugin.agent.trainer import AgenticPPOTrainer


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_release_is_the_one_the_hooks_were_written_for() -> None:
    assert version("verl") == "0.9.1"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("step", ["self", "metrics", "timing_raw"]),
        ("_compute_ref_log_prob", ["self", "batch", "metrics"]),
        ("_balance_batch", ["self", "batch", "metrics", "logging_prefix", "keep_minibatch"]),
        ("_compute_metrics", ["self", "batch", "metrics", "timing_raw", "global_steps", "epoch"]),
        ("_validate", ["self"]),
        ("_save_checkpoint", ["self"]),
        ("_load_checkpoint", ["self"]),
    ],
)
def test_every_method_the_trainer_overrides_is_there_with_the_same_parameters(method: str, expected: list[str]) -> None:
    assert parameters(getattr(PPOTrainer, method)) == expected
    assert parameters(getattr(AgenticPPOTrainer, method)) == expected


def test_the_order_of_a_step_is_the_one_the_trainer_relies_on() -> None:
    step = inspect.getsource(PPOTrainer._step_once)
    assert step.index("_balance_batch") < step.index("_compute_old_log_prob") < step.index("_compute_advantage")
    fit = inspect.getsource(PPOTrainer.fit)
    assert fit.index("self.step(") < fit.index("self._save_checkpoint()") < fit.index("self._compute_metrics(")
    save = inspect.getsource(PPOTrainer._save_checkpoint)
    assert save.index("self.actor_rollout_wg.save_checkpoint") < save.index("latest_checkpointed_iteration.txt")


def test_the_critics_micro_batches_are_sized_by_the_key_that_is_set_for_them() -> None:
    source = inspect.getsource(PPOTrainer)
    assert "critic_cfg.engine.max_token_len_per_gpu = critic_cfg.ppo_infer_max_token_len_per_gpu" in source
    assert "critic_cfg.engine.infer_max_token_len_per_gpu = critic_cfg.ppo_infer_max_token_len_per_gpu" in source


def test_verl_calls_a_steps_updates_and_metrics_as_the_trainer_overrides_them() -> None:
    step = inspect.getsource(PPOTrainer.step)
    assert "self.parameter_sync_step" in step and "self._step_once(" in step
    assert "train_batch_size // self.parameter_sync_step" in step


def test_our_trainer_is_registered_and_is_verls_synchronous_one() -> None:
    assert get_trainer_cls("agentic_r_sync") is AgenticPPOTrainer
    assert issubclass(AgenticPPOTrainer, PPOTrainerSync)


def test_the_agent_loop_is_called_and_answers_as_before() -> None:
    assert parameters(AgentLoopBase.run) == ["self", "sampling_params", "kwargs"]
    assert {"request_id", "prompt_ids", "sampling_params"} <= set(parameters(LLMServerClient.generate))
    assert {
        "prompt_ids", "response_ids", "response_mask", "response_logprobs", "num_turns", "metrics", "extra_fields",
    } <= set(AgentLoopOutput.model_fields)  # fmt: skip


def test_the_task_runner_can_be_extended() -> None:
    assert parameters(run_ppo) == ["config", "task_runner_class"]
    assert parameters(TaskRunnerV1.__ray_metadata__.modified_class.run)[:2] == ["self", "config"]
