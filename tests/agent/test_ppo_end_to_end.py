"""Real PPO in verl, with search over HTTP: three steps at once, and the same with a resume after the second.

The service refuses some queries for good, so the batches also hold trajectories that are left out of the loss.
verl takes about a minute to start; both runs are shared by all tests here. `tests/test_loop.py` kills a run in its last
validation.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentic_r_plugin.agent.cpu.rollout import weight_sums
from agentic_r_plugin.agent.export import merged_weights
from agentic_r_plugin.agent.launch import TrainAgentConfig, run
from agentic_r_plugin.agent.metrics import RolloutLog
from agentic_r_plugin.answers import exact_match
from agentic_r_plugin.errors import ManifestMismatchError, TrainingError
from tests.agent.tiny_world import LIMITS, Service, read_jsonl, serving

STEPS, BATCH, SAMPLES = 3, 4, 2


@pytest.fixture(scope="module")
def half_broken_service() -> Iterator[Service]:
    """A separate service, which refuses about every second query, always the same ones."""
    with serving() as running:
        running.refuse_every = 2
        yield running


@pytest.fixture(scope="module")
def config(
    agent_dir: Path, question_file: Path, half_broken_service: Service, tmp_path_factory: pytest.TempPathFactory
) -> TrainAgentConfig:
    return TrainAgentConfig(
        model=str(agent_dir), questions=str(question_file), validation=str(question_file), validation_questions=4,
        retrieval_url=half_broken_service.url, out=str(tmp_path_factory.mktemp("ppo") / "whole"), protocol="compact",
        limits=LIMITS, topk=1, steps=STEPS, batch_size=BATCH, samples=SAMPLES, mini_batch_size=2, micro_batch_size=4,
        actor_lr=3e-4, critic_lr=3e-4, save_every=1, keep_checkpoints=0, validate_every=0, rollouts_per_step=100,
        max_failed_search_share=1.0, cpu=True, threads=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(config: TrainAgentConfig) -> Path:
    """A run of three steps without interruption."""
    run(config)
    return Path(config.out)


@pytest.fixture(scope="module")
def resumed(whole: Path, config: TrainAgentConfig) -> Path:
    """The same run, resumed from the worst places for a kill: step 2 saved but not logged, step 3 half saved."""
    folder = whole.with_name("resumed")
    shutil.copytree(whole, folder)
    for name in ("agent", "critic", "checkpoints/global_step_3/actor"):
        shutil.rmtree(folder / name)
    (folder / "done.json").unlink()
    (folder / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0] + lines[1] + lines[3] + '{"step": 4, "cut o')
    assert json.loads((folder / "last_step.json").read_text())["step"] == STEPS
    (folder / "last_step.json").write_text(lines[2])
    run(replace(config, out=str(folder)), resume=True)
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    return read_jsonl(folder / "metrics.jsonl")


def rollouts(folder: Path) -> list[dict[str, Any]]:
    log = RolloutLog(folder / "rollouts")
    return [line for step in log.steps() for line in log.read(step)]


def weights(folder: Path, step: int, role: str) -> dict[str, torch.Tensor]:
    return merged_weights(folder / "checkpoints" / f"global_step_{step}" / role)


def test_every_step_has_one_line_with_our_metrics_and_verls(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines[1:]:
        assert line["agentic_r/trajectories"] == BATCH * SAMPLES
        assert 0 < line["agentic_r/masked_token_share"] < 1
        assert line["actor/grad_norm"] > 0
        assert line["critic/grad_norm"] > 0
    assert {"val-core/towns/acc/mean@1", "val-aux/towns/searches/mean@1", "val-aux/towns/search_failed/mean@1"} <= set(
        lines[0]
    )
    assert "val-core/towns/acc/mean@1" in lines[3]
    assert "val-core/towns/acc/mean@1" not in lines[1]


def test_metrics_are_those_of_the_logged_trajectories(whole: Path) -> None:
    for line in metrics(whole)[1:]:
        step = [item for item in rollouts(whole) if item["step"] == line["step"]]
        valid = [item for item in step if item["stop_reason"] != "search_failed"]
        assert len(step) == BATCH * SAMPLES
        assert line["agentic_r/failed_searches"] == len(step) - len(valid)
        assert line["agentic_r/em"] == pytest.approx(sum(item["em"] for item in valid) / len(valid))
        assert line["critic/score/mean"] == pytest.approx(line["agentic_r/em"])
        assert all(item["em"] == exact_match(item["answer"], item["golden_answers"]) for item in step)
    assert sum(line["agentic_r/failed_searches"] for line in metrics(whole)[1:]) > 0
    assert sum(len(item["turns"]) for item in rollouts(whole)) > 0


def test_the_masked_share_is_what_the_environment_wrote(whole: Path, agent_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(agent_dir)  # one token a byte or tag: the text gives the tokens back
    for line in metrics(whole)[1:]:
        shares = []
        for item in rollouts(whole):
            if item["step"] != line["step"] or item["stop_reason"] == "search_failed" or "\ufffd" in item["text"]:
                continue
            blocks = re.findall(r"\n\n<information>.*?</information>\n\n|\n\nInvalid\.\n\n", item["text"], re.DOTALL)
            by_environment = sum(len(tokenizer.encode(block)) for block in blocks)
            assert len(tokenizer.encode(item["text"])) == by_environment + item["generated_tokens"]
            shares.append(by_environment / (by_environment + item["generated_tokens"]))
        if len(shares) == BATCH * SAMPLES - line["agentic_r/failed_searches"]:
            assert line["agentic_r/masked_token_share"] == pytest.approx(sum(shares) / len(shares))


def test_every_tensor_of_actor_and_critic_moves_at_every_step(whole: Path) -> None:
    for role in ("actor", "critic"):
        for step in (1, 2):
            before, after = weights(whole, step, role), weights(whole, step + 1, role)
            still = [name for name in before if torch.equal(before[name], after[name])]
            assert not still, (role, step, still)


def test_the_rollout_engine_holds_the_trained_weights(whole: Path) -> None:
    sums = re.findall(r"weights of step (\d+) in place, (\{.*?\})", (whole / "train.log").read_text())
    assert [int(step) for step, _ in sums] == [0, 1, 2, 3]
    for step, text in sums[1:]:
        held = json.loads(text.replace("'", '"'))
        trained = weight_sums(weights(whole, int(step), "actor").items())
        assert held["sum"] == pytest.approx(trained["sum"], rel=1e-12)
        assert held["tensors"] == trained["tensors"]


def test_the_exported_agent_and_critic_are_the_last_checkpoint(whole: Path) -> None:
    exported = AutoModelForCausalLM.from_pretrained(whole / "agent").state_dict()
    for name, tensor in weights(whole, STEPS, "actor").items():
        assert torch.equal(exported[name], tensor), name
    assert (whole / "critic" / "model.safetensors").is_file()
    agent = json.loads((whole / "agent" / "agent.json").read_text())
    assert (agent["protocol"], agent["topk"], agent["step"]) == ("compact", 1, STEPS)
    assert agent["limits"]["max_searches"] == LIMITS.max_searches
    assert json.loads((whole / "done.json").read_text())["step"] == STEPS


def test_a_resumed_step_equals_the_uninterrupted_one(whole: Path, resumed: Path) -> None:
    assert [line["step"] for line in metrics(resumed)] == [0, 1, 2, 3]
    assert metrics(resumed)[2]["agentic_r/em"] == metrics(whole)[2]["agentic_r/em"]
    one, two = metrics(whole)[3], metrics(resumed)[3]
    compared = [name for name in one if not name.startswith(("timing", "perf/")) and "/perf/" not in name]
    for name in compared:
        # abs: some are differences of float32 numbers close to 1. Those of rollout_corr compare the rollout engine with
        # the trainer over sums of hundreds of log-probabilities, whose last bits follow how requests met in batches.
        rel, smallest = (1e-3, 1e-5) if name.startswith("rollout_corr/") else (1e-4, 1e-6)
        assert two[name] == pytest.approx(one[name], rel=rel, abs=smallest), name
    assert rollouts(whole) == rollouts(resumed)
    for role in ("actor", "critic"):
        before, after = weights(whole, STEPS, role), weights(resumed, STEPS, role)
        for name in before:
            torch.testing.assert_close(before[name], after[name], rtol=1e-5, atol=1e-6)


def test_a_finished_run_is_not_done_again_and_other_settings_are_refused(
    whole: Path, config: TrainAgentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config, resume=True)
    assert "is done" in capsys.readouterr().err
    with pytest.raises(ManifestMismatchError, match="actor_lr was "):
        run(replace(config, actor_lr=1e-5), resume=True)


def test_a_training_process_that_dies_is_quoted_and_nothing_counts_as_done(
    config: TrainAgentConfig, tmp_path: Path
) -> None:
    broken = replace(config, out=str(tmp_path / "run"), verl=["ray_kwargs.ray_init.num_gpus=-1"])
    with pytest.raises(TrainingError, match=r"ended with code 1.*train\.log(.|\n)*must be nonnegative"):
        run(broken)
    assert not (tmp_path / "run" / "done.json").exists()
    assert not (tmp_path / "run" / "agent").exists()
