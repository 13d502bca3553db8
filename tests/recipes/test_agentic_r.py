"""The verl recipe: every script and configuration composes against the installed verl, and `--dry-run` finds faults."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from agentic_r_plugin.agent import memory_estimate, prepare
from agentic_r_plugin.agent.dataset import read_sourced_questions
from agentic_r_plugin.agent.settings import TrainAgentConfig
from agentic_r_plugin.agent.verl_config import validate
from agentic_r_plugin.cli import build_config, main, parse_command
from agentic_r_plugin.config import load_config
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.store import write_json, write_records
from tests.agent import tiny_world

RECIPE = Path(__file__).parents[2] / "recipes" / "agentic_r"
SCRIPTS = sorted(RECIPE.glob("run_qwen*.sh"))
ADDED = ("agentic_r.", "ray_kwargs.ray_init.", "critic.ppo_infer_max_token_len_per_gpu",
         "actor_rollout_ref.model.override_config.", "critic.model.override_config.")  # fmt: skip
"""Keys that verl's own configuration does not have: ours, what goes to `ray.init` and into the models' configuration,
and one that only its code reads."""


@pytest.fixture(scope="module")
def qwen_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of Qwen2.5-7B, without weights."""
    folder = tmp_path_factory.mktemp("qwen")
    shape = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }  # fmt: skip
    write_json(folder / "config.json", shape)
    return folder


def arguments(script: Path, *overrides: str, **variables: str) -> list[str]:
    """What a script calls train-agent with."""
    run = subprocess.run(
        [str(script), *overrides], env={**os.environ, "AGENTIC_R": "echo", **variables}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    name, *rest = run.stdout.split()
    assert name == "train-agent"
    return rest


def config_of(script: Path, *overrides: str, **variables: str) -> TrainAgentConfig:
    options, found = parse_command("train-agent", TrainAgentConfig, [*arguments(script, **variables), *overrides])
    return build_config(TrainAgentConfig, options, found)


@pytest.fixture(scope="module")
def plain_keys() -> set[str]:
    """Every key of verl's own configuration."""
    import hydra

    from agentic_r_plugin.agent.verl_config import _verl_config_dir

    with hydra.initialize_config_dir(str(_verl_config_dir()), version_base=None):
        return set(leaves(OmegaConf.to_container(hydra.compose("ppo_trainer"), resolve=True)))


def leaves(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict) or not tree:
        return [prefix.removesuffix(".")]
    return [key for name, value in tree.items() for key in leaves(value, f"{prefix}{name}.")]


def test_there_is_a_script_for_each_variant() -> None:
    assert [script.stem.removeprefix("run_qwen2.5-") for script in SCRIPTS] == [
        "3b_ppo", "7b_grpo", "7b_ppo_async", "7b_ppo_iter1", "7b_ppo_iter2", "7b_ppo_lora", "7b_ppo_multinode",
    ]  # fmt: skip


@pytest.mark.parametrize("preset", ["paper", "released_code"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_composes_against_verls_schema_and_passes_its_checks(
    script: Path, preset: str, qwen_7b: Path, plain_keys: set[str]
) -> None:
    config = config_of(script, MODEL=str(qwen_7b), PRESET=preset)
    composed, _ = prepare.compose(config, num_questions=10_000, prompt_lengths=[150, 200])
    assert [key for key in leaves(OmegaConf.to_container(composed)) if key not in plain_keys
            and not key.startswith(ADDED)] == []  # fmt: skip
    assert validate(composed).startswith("passed")
    steps, searches, turn = (500, 5, 500) if preset == "paper" else (400, 4, 800)
    assert (config.steps, config.limits.max_searches, config.limits.max_response_tokens) == (steps, searches, turn)
    assert config.limits.max_observation_tokens == turn
    assert composed.trainer.total_training_steps == steps
    actor = composed.actor_rollout_ref.actor
    assert (actor.strategy, composed.actor_rollout_ref.ref.strategy, composed.critic.strategy) == ("fsdp2",) * 3
    assert actor.loss_agg_mode == "token-mean"


def test_the_variants_differ_in_what_their_names_say(qwen_7b: Path) -> None:
    by_name = {
        script.stem: prepare.compose(config_of(script, MODEL=str(qwen_7b)), num_questions=10_000, prompt_lengths=[150])[
            0
        ]
        for script in SCRIPTS
    }
    first = by_name["run_qwen2.5-7b_ppo_iter1"]
    assert (first.data.train_batch_size, first.actor_rollout_ref.actor.ppo_mini_batch_size) == (512, 256)
    assert (first.algorithm.adv_estimator, first.critic.enable, first.algorithm.kl_ctrl.kl_coef) == ("gae", True, 0.001)
    assert (first.trainer.nnodes, first.trainer.n_gpus_per_node, first.trainer.v1.trainer_mode) == (
        1, 8, "agentic_r_sync",
    )  # fmt: skip
    nodes = by_name["run_qwen2.5-7b_ppo_multinode"]
    assert (nodes.trainer.nnodes, nodes.ray_kwargs.ray_init.address) == (2, "auto")
    assert by_name["run_qwen2.5-7b_ppo_async"].trainer.v1.trainer_mode == "agentic_r_colocate_async"
    lora = by_name["run_qwen2.5-7b_ppo_lora"].actor_rollout_ref
    assert (lora.model.lora_rank, lora.rollout.load_format, lora.rollout.layered_summon) == (64, "safetensors", True)
    grpo = by_name["run_qwen2.5-7b_grpo"]
    assert (grpo.algorithm.adv_estimator, grpo.critic.enable, grpo.actor_rollout_ref.rollout.n) == ("grpo", False, 5)
    assert (grpo.actor_rollout_ref.actor.use_kl_loss, grpo.algorithm.use_kl_in_reward) == (True, False)
    assert by_name["run_qwen2.5-3b_ppo"].trainer.n_gpus_per_node == 4
    second = arguments(RECIPE / "run_qwen2.5-7b_ppo_iter2.sh")
    assert "runs/agentic_r/iteration-1/agent/agent" in second


def test_a_script_passes_the_name_of_the_variable_with_the_services_token_on() -> None:
    script = RECIPE / "run_qwen2.5-7b_ppo_multinode.sh"
    assert config_of(script).retrieval_token_env == ""
    assert config_of(script, RETRIEVAL_TOKEN_ENV="RETRIEVAL_TOKEN").retrieval_token_env == "RETRIEVAL_TOKEN"


def test_separate_async_has_its_own_rollout_machines(qwen_7b: Path) -> None:
    config = config_of(SCRIPTS[0], "mode=separate_async", "rollout_nodes=1", MODEL=str(qwen_7b))
    composed, _ = prepare.compose(config, num_questions=10_000, prompt_lengths=[150])
    assert validate(composed) == "passed"
    rollout = composed.actor_rollout_ref.rollout
    assert (rollout.nnodes, rollout.n_gpus_per_node, rollout.checkpoint_engine.backend) == (1, 4, "nccl")
    assert composed.trainer.v1.separate_async.parameter_sync_step == 512 // 256
    with pytest.raises(ConfigError, match="separate_async needs at least 1"):
        config_of(SCRIPTS[0], "mode=separate_async", MODEL=str(qwen_7b))


def test_the_cpu_variant_is_one_train_agent_takes() -> None:
    given = ["model=m", "questions=q", "retrieval_url=u", "out=o"]
    assert load_config(TrainAgentConfig, RECIPE / "cpu" / "ppo.yaml", given).cpu is True


def test_no_configuration_file_is_left_unchecked() -> None:
    used = {Path(arguments(script)[1]).name for script in SCRIPTS}
    train_agent = {path.name for path in RECIPE.glob("*.yaml") if path.name.startswith(("ppo", "grpo"))}
    assert used == train_agent


def test_the_7b_recipe_fits_and_without_offloading_it_does_not(qwen_7b: Path) -> None:
    size = memory_estimate.model_size(qwen_7b)
    assert size.parameters == 7_615_616_512

    def estimated(*overrides: str) -> memory_estimate.MemoryEstimate:
        config = config_of(RECIPE / "run_qwen2.5-7b_ppo_iter1.sh", *overrides, MODEL=str(qwen_7b))
        composed, _ = prepare.compose(config, num_questions=10_000, prompt_lengths=[150])
        return memory_estimate.estimate(composed, size, size, device_memory_gb=config.device_memory_gb)

    whole = estimated()
    assert whole.fits
    # fp32 weights and gradients, two fp32 moments, over 8 devices
    update = whole.moments["update of the actor"]
    assert update["weights"] + update["gradients"] + update["optimizer"] == pytest.approx(
        16 * size.parameters / 8 / memory_estimate.GIB
    )
    assert whole.host["actor, offloaded"] == pytest.approx(12 * size.parameters / memory_estimate.GIB)
    kept = estimated("offload=false")
    assert not kept.fits and "DOES NOT FIT" in kept.table()
    assert kept.moments["sampling"]["critic, not offloaded"] == pytest.approx(
        12 * size.parameters / 8 / memory_estimate.GIB
    )
    assert estimated("micro_batch_tokens=65536").moments["update of the actor"]["logits"] == pytest.approx(
        4 * update["logits"]
    )


def dry_run(*overrides: str, **variables: str) -> int:
    """The exit code of what the first script calls."""
    return main(
        ["train-agent", *arguments(RECIPE / "run_qwen2.5-7b_ppo_iter1.sh", "--dry-run", *overrides, **variables)]
    )


def test_a_dry_run_shows_configuration_estimate_and_checks(
    agent_dir: Path,
    question_file: Path,
    service: tiny_world.Service,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = dry_run(
        "batch_size=8", "mini_batch_size=8", MODEL=str(agent_dir), TRAIN=str(question_file), VAL=str(question_file),
        RETRIEVAL_URL=service.url, OUT=str(tmp_path / "run"),
    )  # fmt: skip
    shown, printed = capsys.readouterr()
    assert code == 0, printed[-2000:]
    assert "adv_estimator: gae" in shown and "fullest moment" in shown
    assert "ok      questions: towns 12" in shown and f"ok      retrieval service: {service.url}" in shown
    assert "FAILED" not in shown
    assert not (tmp_path / "run").exists()


def test_a_dry_run_names_everything_that_is_wrong_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = dry_run(
        "nodes=2", MODEL=str(tmp_path / "nothing"), TRAIN=str(tmp_path / "none.parquet"), VAL="",
        RETRIEVAL_URL="http://127.0.0.1:9", OUT=str(tmp_path / "run"),
    )  # fmt: skip
    shown, printed = capsys.readouterr()
    assert code == 1
    failed = [line for line in shown.splitlines() if line.startswith("FAILED")]
    assert [line.partition(":")[0].removeprefix("FAILED  ") for line in failed] == [
        "model", "questions", "prompts", "retrieval service",
    ]  # fmt: skip
    assert "the other machines cannot reach a loopback address" in failed[3]
    assert "4 of 10 checks failed" in printed


def test_flashrags_data_sets_become_verls_files(tmp_path: Path) -> None:
    for name, split in (("hotpotqa", "train"), ("triviaqa", "train"), ("nq", "test")):
        write_records(tmp_path / "data" / name / f"{split}.jsonl", tiny_world.questions())
    command = [sys.executable, str(RECIPE / "prepare_data.py"), "--data-dir", str(tmp_path / "data")]
    command += ["--out", str(tmp_path / "out"), "--validation", "nq:test", "--validation-per-set", "5"]
    subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=tmp_path)
    train = read_sourced_questions(tmp_path / "out" / "train.parquet")
    assert [item.source for item in train] == ["hotpotqa"] * 12 + ["triviaqa"] * 12
    assert train[12].record.id == "triviaqa/train/q0"
    assert train[0].record.golden_answers == tiny_world.questions()[0].golden_answers
    assert len(read_sourced_questions(tmp_path / "out" / "validation.parquet")) == 5
    again = [*command[:6], "--overwrite", "--train", "musique:train"]
    missing = subprocess.run(again, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert missing.returncode == 1 and "split 'train': no " in missing.stderr
