"""The parts of verl that agent training builds on have the shape it was written for."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, get_trainer_cls
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.rollout.llm_server import LLMServerClient

from agentic_r_plugin.agent import trainer
from agentic_r_plugin.agent.trainer import AgenticPPOTrainer
from tests.agent import verl_members


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_release_is_the_one_the_hooks_were_written_for() -> None:
    assert version("verl") == "0.9.1"


def test_everything_the_trainer_builds_on_is_there_with_the_same_parameters() -> None:
    assert verl_members.differences() == []
    for method, expected in verl_members.OVERRIDDEN.items():
        assert parameters(getattr(AgenticPPOTrainer, method)) == expected


def test_another_verl_is_looked_at_where_a_checkout_is_named() -> None:
    """VERL_CHECKOUT=FOLDER: what differs there from what the trainer builds on."""
    checkout = os.environ.get("VERL_CHECKOUT")
    if checkout is None:
        pytest.skip("VERL_CHECKOUT names no checkout of verl")
    script = Path(verl_members.__file__)
    environment = {**os.environ, "PYTHONPATH": checkout, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "", run.stdout + run.stderr[-2000:]


def test_one_module_alone_touches_what_verl_keeps_to_itself() -> None:
    package = Path(trainer.__file__).parents[1]
    private = {name.rpartition(".")[2] for name in verl_members.CALLED} & {
        "_evict_terminal_groups", "_sync_metadata_from_transfer_queue", "_balance_batch", "_compute_ref_log_prob",
        "_compute_metrics", "_save_checkpoint", "_load_checkpoint",
    }  # fmt: skip
    private |= {"transfer_queue", "__ray_metadata__", "replay_buffer"}
    users = set()
    for file in package.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {item.name for node in ast.walk(tree) if isinstance(node, ast.Import) for item in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        if names & private:
            users.add(file.relative_to(package).as_posix())
    assert users == {"agent/trainer.py"}


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
