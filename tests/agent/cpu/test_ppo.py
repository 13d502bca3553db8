"""Stock verl trains with PPO on the CPU: weights move, the rollout engine follows, a resumed run goes on the same."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from agentic_r_plugin.agent.cpu.overrides import UNSET, cpu_environment, cpu_overrides

CHAT_TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return solution_str.count(ground_truth) / max(1, len(solution_str))
"""
NUM_STEPS, BATCH = 3, 8


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of 0.2 million parameters, questions of random words, and a reward that counts a letter."""
    folder = tmp_path_factory.mktemp("ppo")
    rng = random.Random(0)
    words = ["".join(rng.choice("bcdfglmnprst") + rng.choice("aeiou") for _ in range(3)) for _ in range(200)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([" ".join(rng.choices(words, k=12)) for _ in range(500)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    rows = [
        {
            "data_source": "letters",
            "prompt": [{"role": "user", "content": " ".join(rng.choices(words, k=3 + index % 9))}],
            "reward_model": {"style": "rule", "ground_truth": "a"},
            "extra_info": {"index": index},
        }
        for index in range(BATCH * NUM_STEPS)
    ]
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")
    (folder / "reward.py").write_text(REWARD)
    return folder


@dataclass(frozen=True, kw_only=True)
class Training:
    """What one run left: its output, and the sums that the rollout engine reported, by step."""

    output: str
    engine_sums: dict[int, tuple[int, float]]


def train(task: Path, *overrides: str) -> Training:
    settings = {
        "data.train_files": task / "train.parquet", "data.val_files": task / "train.parquet",
        "data.train_batch_size": BATCH, "data.max_prompt_length": 64, "data.max_response_length": 32,
        "actor_rollout_ref.model.path": task / "model", "critic.model.path": task / "model",
        "actor_rollout_ref.actor.ppo_mini_batch_size": BATCH,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4, "critic.ppo_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": 4,
        "actor_rollout_ref.actor.optim.lr": 1e-3, "critic.optim.lr": 1e-3,
        "actor_rollout_ref.actor.use_kl_loss": True, "algorithm.use_kl_in_reward": True,
        "algorithm.adv_estimator": "gae", "reward.custom_reward_function.path": task / "reward.py",
        "trainer.total_training_steps": NUM_STEPS, "trainer.total_epochs": NUM_STEPS, "trainer.save_freq": 1,
        "trainer.test_freq": -1, "trainer.val_before_train": False, "trainer.logger": "[console]",
    }  # fmt: skip
    environment = {**os.environ, **cpu_environment(num_threads=1), "PYTHONWARNINGS": "ignore"}
    for name in UNSET:
        environment.pop(name, None)
    run = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *cpu_overrides(train_dtype="fp32"),
         *(f"{key}={value}" for key, value in settings.items()), *overrides],
        cwd=task, env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    pattern = r"weights of step (\d+) in place, \{'tensors': (\d+), 'sum': ([-\d.e]+)\}"
    found = re.findall(pattern, run.stdout + run.stderr)
    return Training(
        output=run.stdout,
        engine_sums={int(step): (int(tensors), float(total)) for step, tensors, total in found},
    )


@pytest.fixture(scope="module")
def whole(task: Path) -> Training:
    return train(task, "trainer.resume_mode=disable", f"trainer.default_local_dir={task / 'whole'}")


def weights(folder: Path, role: str) -> dict[str, torch.Tensor]:
    state = torch.load(folder / role / "model_world_size_1_rank_0.pt", weights_only=False)
    return {name: getattr(tensor, "_local_tensor", tensor).double() for name, tensor in state.items()}


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_every_tensor_moves_at_every_step(whole: Training, task: Path, role: str) -> None:
    steps = [weights(task / "whole" / f"global_step_{step}", role) for step in (1, 2, 3)]
    if role == "actor":
        initial = Qwen2ForCausalLM.from_pretrained(task / "model").state_dict()
        steps.insert(0, {name: tensor.double() for name, tensor in initial.items()})
    for before, after in pairwise(steps):
        assert before.keys() == after.keys()
        still = [name for name in before if torch.equal(before[name], after[name])]
        assert still == []


def test_the_rollout_engine_holds_the_trainers_weights_after_every_step(whole: Training, task: Path) -> None:
    assert sorted(whole.engine_sums) == [0, 1, 2, 3]
    for step in (1, 2, 3):
        trained = weights(task / "whole" / f"global_step_{step}", "actor")
        tensors, total = whole.engine_sums[step]
        assert tensors == len(trained)
        assert total == pytest.approx(sum(tensor.sum().item() for tensor in trained.values()), abs=1e-6)


def test_rollout_and_trainer_agree_on_every_tokens_probability(whole: Training) -> None:
    worst = [float(value) for value in re.findall(r"training/rollout_probs_diff_max:([\d.e+-]+)", whole.output)]
    assert len(worst) == NUM_STEPS
    assert max(worst) < 1e-5


def test_a_resumed_run_reaches_the_same_weights(whole: Training, task: Path) -> None:
    resumed = train(
        task, "trainer.resume_mode=resume_path", f"trainer.default_local_dir={task / 'resumed'}",
        f"trainer.resume_from_path={task / 'whole' / 'global_step_2'}",
    )  # fmt: skip
    assert sorted(resumed.engine_sums) == [2, 3]
    assert resumed.engine_sums[2] == whole.engine_sums[2]
    for role in ("actor", "critic"):
        before, there = (weights(task / "whole" / f"global_step_{step}", role) for step in (2, 3))
        here = weights(task / "resumed" / "global_step_3", role)
        moved = max((there[name] - before[name]).abs().max().item() for name in there)
        apart = max((there[name] - here[name]).abs().max().item() for name in there)
        assert moved > 5e-4  # the learning rate is 1e-3
        assert apart < 1e-5  # rounding: trajectories come in another order
