"""The recipe at the scale of the paper: its files are ones their commands take, and the loop can be planned."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from agentic_r_plugin.cli import COMMANDS, main
from agentic_r_plugin.config import load_config
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.iterate import IterateConfig
from agentic_r_plugin.loop.checks import check_settings
from agentic_r_plugin.loop.forecast import Scale, phases_of, table
from agentic_r_plugin.loop.phases import Phases
from agentic_r_plugin.loop.settings import PlanConfig

RECIPE = Path(__file__).parents[2] / "recipes" / "agentic_r"
LOOP = RECIPE / "loop.yaml"
GIVEN = {
    "trajectories": ["in_=q", "out=o"],
    "candidates": ["in_=t", "out=o"],
    "sub_answers": ["in_=t", "out=o"],
    "relevance": ["candidates=c", "out=o", "corpus=c"],
    "correctness": ["candidates=c", "out=o", "corpus=c", "relevance=r"],
    "groups": ["candidates=c", "relevance=r", "correctness=g", "out=o"],
}


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_every_data_configuration_is_one_its_command_takes(name: str):
    config_class, _ = COMMANDS[name.replace("_", "-")].load()
    load_config(config_class, RECIPE / f"data_{name}.yaml", GIVEN[name])


def test_no_data_configuration_is_left_unchecked():
    assert {path.stem for path in RECIPE.glob("data_*.yaml")} == {f"data_{name}" for name in GIVEN}


def test_the_loop_composes_every_phase_on_a_node_and_with_the_overrides_for_a_cluster():
    _, _, cluster = LOOP.read_text().partition("# On a Ray cluster")
    _, _, command = cluster.partition("\n\n")[0].partition("agentic-r iterate")
    overrides = [word for word in command.replace("#", " ").replace("\\", " ").split() if "=" in word]
    assert len(overrides) == 10
    for given in ([], overrides):
        phases = Phases(load_config(IterateConfig, LOOP, given))
        check_settings(phases)
        rollouts = phases.stage(1, "correctness", "models/agent", "http://127.0.0.1:1")
        assert (rollouts.llm.backend, rollouts.llm.model, rollouts.runner.kind) == ("vllm", "models/agent", "ray")
        assert rollouts.runner.workers == (32 if given else 8) and rollouts.corpus == "data/wiki18_100w.jsonl"
        judged = phases.stage(1, "relevance", "models/agent", "http://127.0.0.1:1")
        assert rollouts.search.options == ({"token_env": "RETRIEVAL_TOKEN"} if given else {})
        assert judged.llm.model == "models/Qwen2.5-72B-Instruct" and judged.llm.options["tensor_parallel_size"] == 8


def test_the_loop_trains_with_the_memory_values_of_the_tuned_recipe_and_evaluates_on_every_accelerator():
    loop, tuned = OmegaConf.load(LOOP), OmegaConf.load(RECIPE / "ppo_7b.yaml")
    for key in ("devices", "micro_batch_tokens", "max_concurrent_searches", "verl"):
        assert loop.train_agent[key] == tuned[key]
    assert loop.evaluate.settings.agent.replicas == loop.correctness.runner.workers == tuned.devices


def test_a_dry_run_prints_the_plan_and_then_every_missing_path(capsys: pytest.CaptureFixture, tmp_path: Path):
    assert main(["iterate", "--config", str(LOOP), "--dry-run", f"out={tmp_path / 'run'}"]) == 1
    said = capsys.readouterr()
    assert "169,232 questions" in said.out and "348,618 queries" in said.out
    assert "Correctness without pruning: 6,972,360 rollouts" in said.out and "plan.*" in said.out
    assert "119.7 hours on 8 GPUs" in said.out and "is 120 hours" in (RECIPE / "README.md").read_text()
    for missing in ("train.jsonl", "wiki18_100w.jsonl", "models/Qwen2.5-7B", "relevance.llm.model"):
        assert missing in said.err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_what_is_there_succeeds_and_writes_nothing(capsys: pytest.CaptureFixture, tmp_path: Path):
    (tmp_path / "agent").mkdir()
    lines = [json.dumps({"id": f"q{i}", "question": "Q", "golden_answers": ["a"]}) + "\n" for i in range(40)]
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    (tmp_path / "corpus.jsonl").write_text('{"id": "p", "contents": "x"}\n' * 1000)
    arguments = [
        f"agent={tmp_path / 'agent'}",
        f"benchmark={tmp_path}",
        f"out={tmp_path / 'run'}",
        "retriever=builtin:minilm",
    ]
    assert main(["iterate", "--dry-run", *arguments]) == 0
    said = capsys.readouterr().out
    assert re.search(r"trajectories +40 questions +40 ", said) and re.search(r"index +1,000 passages", said)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"plan\.gpus: expected above 0"):
        load_config(IterateConfig, None, [*arguments, "plan.gpus=0"])
    with pytest.raises(ConfigError, match="gpu_count"):
        load_config(IterateConfig, None, [*arguments, "plan.gpu_count=2"])


def test_the_forecast_is_what_its_assumptions_say():
    plan = PlanConfig(
        gpus=2, queries_per_question=2, rollouts_per_query=3, calls_per_rollout=2, turn_prompt_tokens=1000,
        turn_cached_share=0.5, turn_generated_tokens=100, agent_prompt_tokens_per_s=1000,
        agent_generated_tokens_per_s=100, judge_gpus=4, judge_prompt_tokens_per_s=1000,
        judge_generated_tokens_per_s=100, passage_tokens=100, judge_generated_tokens=50,
    )  # fmt: skip
    scale = Scale(questions=100, passages=3600, ppo_steps=1, ppo_batch=4, candidates=20, window=10)
    found = {phase.name: phase for phase in phases_of(scale, plan)}
    correctness, relevance = found["correctness"], found["relevance"]
    assert (correctness.units, correctness.rollouts) == (200, 600)
    assert (correctness.prompt_tokens, correctness.generated_tokens) == (600 * 2 * 500, 600 * 2 * 100)
    assert correctness.gpu_hours == pytest.approx((600 + 1200) / 3600)
    assert (relevance.prompt_tokens, relevance.generated_tokens) == (400 * 1350, 400 * 50)
    assert relevance.gpu_hours == pytest.approx((540 + 200) * 4 / 3600)
    assert "Correctness without pruning: 4,000 rollouts" in table([scale], plan)
    assert "sub-answers" not in found


def test_the_forecast_adds_up_iterations_of_different_ppo_and_the_index_before_them():
    # An hour a step, an hour an index. Data: trajectories 150 + 300 s, relevance 2960 s, correctness 1800 s, training
    # on 60 groups twice 240 s; in all 5450 s = 1.51 h.
    plan = PlanConfig(
        gpus=2, ppo_step_s=1800, encoded_passages_per_s=1, trained_groups_per_s=0.5, positive_share=0.3,
        queries_per_question=2, rollouts_per_query=3, calls_per_rollout=2, turn_prompt_tokens=1000,
        turn_cached_share=0.5, turn_generated_tokens=100, agent_prompt_tokens_per_s=1000,
        agent_generated_tokens_per_s=100, judge_gpus=4, judge_prompt_tokens_per_s=1000,
        judge_generated_tokens_per_s=100, passage_tokens=100, judge_generated_tokens=50,
    )  # fmt: skip
    first = Scale(questions=100, passages=3600, ppo_steps=12, ppo_batch=4, candidates=20, window=10)
    later = replace(first, ppo_steps=6)
    printed = table([first, later, later], plan)
    assert "Iteration 1: 14.5 GPU hours, 7.3 hours on 2 GPUs" in printed
    assert printed.count("From iteration") == 1
    assert "From iteration 2 on: train-agent 6 steps, 24 rollouts; 8.5 GPU hours an iteration." in printed
    assert "All 3, with the index before them: 32.5 GPU hours" in printed  # 14.514 + 2 * 8.514 + 1
    assert "All 1, with the index before them: 15.5 GPU hours" in table([first], plan)


def test_the_two_training_sets_become_one_benchmark_with_unique_ids(tmp_path: Path):
    for name, splits in (("hotpotqa", ("train", "dev")), ("triviaqa", ("train", "dev", "test"))):
        (tmp_path / name).mkdir()
        for split in splits:
            rows = [{"id": f"{split}_{number}", "question": f"{name}?", "golden_answers": ["ä"]} for number in range(2)]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(RECIPE / "data_questions.sh"), str(tmp_path), str(tmp_path / "both")]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "both" / "train.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [
        "hotpotqa/train_0", "hotpotqa/train_1", "triviaqa/train_0", "triviaqa/train_1",
    ]  # fmt: skip
    assert rows[0]["golden_answers"] == ["ä"]
    assert len((tmp_path / "both" / "test.jsonl").read_text().splitlines()) == 2
