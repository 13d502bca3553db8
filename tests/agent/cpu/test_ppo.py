"""verl's own command trains on the CPU with our agent loop: weights move, and the rollout engine follows them.

`tests/agent/test_ppo_end_to_end.py` has the same with our trainer, and the resume.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from agentic_r_plugin.agent import dataset
from agentic_r_plugin.agent.cpu.overrides import UNSET, cpu_environment, cpu_overrides
from agentic_r_plugin.components import load
from tests.agent import tiny_world

SCRIPT = Path(__file__).parents[3] / "recipes" / "agentic_r" / "run_stock_verl.sh"
STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run left: its folder and output, the queries of its agents, and the engine's weights by step."""

    checkpoints: Path
    output: str
    queries: list[str]
    engine_sums: dict[int, tuple[int, float]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, agent_dir: Path, service: tiny_world.Service) -> Training:
    folder = tmp_path_factory.mktemp("stock")
    questions = [dataset.SourcedQuestion(record=question, source="towns") for question in tiny_world.questions()]
    dataset.write_parquet(folder / "train.parquet", questions, load("agent_protocol", "compact"))
    settings = {
        "data.train_batch_size": 4, "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        "actor_rollout_ref.actor.fsdp_config.param_offload": False, "critic.fsdp.param_offload": False,
        "actor_rollout_ref.actor.fsdp_config.optimizer_offload": False, "critic.fsdp.optimizer_offload": False,
        "actor_rollout_ref.actor.optim.lr": 1e-3, "critic.optim.lr": 1e-3,
        "actor_rollout_ref.actor.use_kl_loss": True,  # on top of the KL in the reward
        "trainer.total_training_steps": STEPS, "trainer.save_freq": 1, "trainer.test_freq": -1,
        "trainer.val_before_train": False,
    }  # fmt: skip
    environment = {**os.environ, **cpu_environment(num_threads=1), "PYTHONWARNINGS": "ignore"}
    for name in UNSET:
        environment.pop(name, None)
    environment |= {
        "PYTHON": sys.executable, "MODEL": str(agent_dir), "RETRIEVAL_URL": service.url, "OUT": str(folder / "run"),
        "TRAIN": str(folder / "train.parquet"), "VAL": str(folder / "train.parquet"), "PROTOCOL": "compact",
        "MAX_TOKENS": str(tiny_world.LIMITS.max_tokens), "MAX_PROMPT_TOKENS": "120",
    }  # fmt: skip
    asked = len(service.queries)
    run = subprocess.run(
        ["bash", str(SCRIPT), *(f"++{item.lstrip('+')}" for item in cpu_overrides(train_dtype="float32")),
         *(f"{key}={value}" for key, value in settings.items())],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    pattern = r"weights of step (\d+) in place, \{'tensors': (\d+), 'sum': ([-\d.e]+)\}"
    found = re.findall(pattern, run.stdout + run.stderr)
    return Training(
        checkpoints=folder / "run" / "checkpoints",
        output=run.stdout,
        queries=service.queries[asked:],
        engine_sums={int(step): (int(tensors), float(total)) for step, tensors, total in found},
    )


def weights(trained: Training, step: int, role: str) -> dict[str, torch.Tensor]:
    file = trained.checkpoints / f"global_step_{step}" / role / "model_world_size_1_rank_0.pt"
    state = torch.load(file, weights_only=False)
    return {name: getattr(tensor, "_local_tensor", tensor).double() for name, tensor in state.items()}


def test_the_loop_of_this_package_searches_and_every_step_is_saved(trained: Training) -> None:
    assert len(trained.queries) > 0
    assert (trained.checkpoints / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_every_tensor_moves_at_every_step(trained: Training, agent_dir: Path, role: str) -> None:
    steps = [weights(trained, step, role) for step in (1, 2)]
    if role == "actor":
        initial = AutoModelForCausalLM.from_pretrained(agent_dir, dtype=torch.float32).state_dict()
        steps.insert(0, {name: tensor.double() for name, tensor in initial.items()})
    for before, after in pairwise(steps):
        assert before.keys() == after.keys()
        assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_the_rollout_engine_holds_the_trainers_weights_after_every_step(trained: Training) -> None:
    assert sorted(trained.engine_sums) == [0, 1, 2]
    for step in (1, 2):
        state = weights(trained, step, "actor")
        tensors, total = trained.engine_sums[step]
        assert tensors == len(state)
        assert total == pytest.approx(sum(tensor.sum().item() for tensor in state.values()), abs=1e-6)


def test_rollout_and_trainer_agree_on_every_tokens_probability(trained: Training) -> None:
    worst = [float(value) for value in re.findall(r"training/rollout_probs_diff_max:([\d.e+-]+)", trained.output)]
    assert len(worst) == STEPS
    assert max(worst) < 1e-5
