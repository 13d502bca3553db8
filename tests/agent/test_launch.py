"""What `train-agent` refuses before it starts anything, and the configuration it gives to verl."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

from agentic_r_plugin.agent import dataset, launch, verl_config
from agentic_r_plugin.agent.accelerator import accelerator_overrides
from agentic_r_plugin.agent.checkpoints import checkpoint_steps, latest_step, name_latest
from agentic_r_plugin.agent.cpu import detect
from agentic_r_plugin.agent.cpu.overrides import cpu_overrides
from agentic_r_plugin.agent.launch import TrainAgentConfig, progress_line, run
from agentic_r_plugin.agent.prepare import check_service, prepare, run_output, validation_questions
from agentic_r_plugin.agent.step_batch import check_masks, check_trajectories
from agentic_r_plugin.config import load_config
from agentic_r_plugin.errors import (
    AgenticRError,
    ConfigError,
    ManifestMismatchError,
    OutputExistsError,
    RecordError,
    SearchError,
    SearchUnavailableError,
    TrainingError,
)
from agentic_r_plugin.ray_cluster import our_fault
from agentic_r_plugin.storage.claim import Output
from agentic_r_plugin.store import StepLog, write_json
from tests.agent.tiny_world import LIMITS, Service
from tests.search import loopback


@pytest.fixture
def config(tmp_path: Path, agent_dir: Path, question_file: Path, service: Service) -> TrainAgentConfig:
    return TrainAgentConfig(
        model=str(agent_dir), questions=str(question_file), retrieval_url=service.url, out=str(tmp_path / "run"),
        protocol="compact", limits=LIMITS, topk=1, steps=2, batch_size=4, mini_batch_size=2, micro_batch_size=2,
        cpu=True,
    )  # fmt: skip


def test_a_service_of_others_is_good_for_training_when_its_search_is(config: TrainAgentConfig) -> None:
    answers = [{"result": [[{"document": {"contents": "x"}}]]}, {"result": [[]]}]
    for answer, found in zip(answers, ("1 of 1", "0 of 1"), strict=True):
        good = loopback.response(200, json.dumps(answer).encode())
        with loopback.Misbehaving([good, loopback.response(404, b"<html>")]) as other:
            answer = check_service(replace(config, retrieval_url=other.url), probe="Who?")
        assert answer == f"{other.url}, without a fingerprint, {found} passages for 'Who?'"


def test_the_first_search_has_as_much_time_as_the_searches_of_the_training(config: TrainAgentConfig) -> None:
    def slow(connection: Any) -> None:
        time.sleep(0.5)
        connection.sendall(loopback.response(200, b'{"result": [[{"id": "1", "contents": "x"}]]}'))

    with (
        loopback.Misbehaving([slow, slow]) as other,
        pytest.raises(SearchUnavailableError, match=r"no whole answer within 0\.2 s"),
    ):
        check_service(replace(config, retrieval_url=other.url, search_timeout_s=0.2), probe="Who?")
    with loopback.Misbehaving([slow, loopback.response(404, b"")]) as other:
        assert "1 of 1" in check_service(replace(config, retrieval_url=other.url, search_timeout_s=5.0), probe="Who?")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "/nowhere"}, ConfigError, "model: /nowhere does not exist"),
        ({"questions": "/nowhere.jsonl"}, ConfigError, "questions: /nowhere.jsonl does not exist"),
        ({"protocol": "unknown"}, ConfigError, "unknown agent_protocol 'unknown'; registered: .*compact"),
        ({"batch_size": 64, "mini_batch_size": 64}, ConfigError, "12 questions are fewer than batch_size=64"),
        ({"retrieval_url": "http://127.0.0.1:9"}, SearchUnavailableError, "127.0.0.1:9/retrieve"),
        ({"limits": replace(LIMITS, max_tokens=20)}, ConfigError, "raise the limit"),
        ({"verl": ["actor_rollout_ref.actor.no_such_key=1"]}, ConfigError, "no_such_key"),
    ],
)
def test_what_cannot_work_is_said_at_once_and_nothing_is_written(
    config: TrainAgentConfig, change: dict[str, object], error: type[AgenticRError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(replace(config, **change))  # type: ignore[arg-type]
    assert not Path(config.out).exists()


def test_a_model_folder_without_a_model_and_a_broken_question_are_named(
    config: TrainAgentConfig, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"not a Hugging Face model folder"):
        run(replace(config, model=str(tmp_path / "empty")))
    broken = tmp_path / "questions.jsonl"
    broken.write_text('{"id": "a", "question": "Q", "golden_answers": ["x"]}\n{"id": \n')
    with pytest.raises(RecordError, match=r"questions\.jsonl:2"):
        run(replace(config, questions=str(broken)))
    assert not Path(config.out).exists()


def test_a_service_that_wants_a_token_is_searched_with_it_before_anything_starts(
    config: TrainAgentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOWN_TOKEN", "s3cret")
    monkeypatch.setenv("OTHER_TOKEN", "0ther")
    monkeypatch.delenv("NO_TOKEN", raising=False)
    with loopback.serving(loopback.EchoBackend(), token="s3cret") as url:
        prepared = prepare(replace(config, retrieval_url=url, retrieval_token_env="TOWN_TOKEN"))
        for variable, error, message in (
            ("", SearchError, r"/retrieve: .*HTTP 401.* none was sent; set retrieval_token_env to the variable"),
            ("OTHER_TOKEN", SearchError, "HTTP 401.* the one in OTHER_TOKEN is wrong"),
            ("NO_TOKEN", ConfigError, "environment variable NO_TOKEN is not set"),
        ):
            with pytest.raises(error, match=message):
                run(replace(config, retrieval_url=url, retrieval_token_env=variable))
    assert not Path(config.out).exists()
    assert OmegaConf.create(prepared.loop)[0].retrieval_token_env == "TOWN_TOKEN"
    assert "s3cret" not in prepared.loop + OmegaConf.to_yaml(prepared.verl) + str(prepared.environment)


def test_a_resume_may_name_another_variable_for_the_token(config: TrainAgentConfig) -> None:
    named = replace(config, retrieval_token_env="TOWN_TOKEN")
    assert run_output(named).made_from == run_output(config).made_from


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1"),
        ({"mini_batch_size": 3}, "batch_size=4 must be a multiple of mini_batch_size=3"),
        ({"actor_lr": 0.0}, "actor_lr"),
        ({"max_failed_search_share": 1.5}, "max_failed_search_share"),
        ({"lora_rank": 8, "mode": "separate_async", "rollout_nodes": 1}, "lora_rank=8: expected 0 with mode=separate"),
    ],
)
def test_impossible_numbers_are_refused(config: TrainAgentConfig, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": 3}, r"the 3 devices \(devices x nodes\) must divide the 4 trajectories of a mini-batch"),
        ({"devices": 2, "tensor_parallel": 4}, "tensor_parallel=4 must divide the 2 devices"),
        ({"micro_batch_size": 3}, "micro_batch_size=3 must divide the 4 trajectories of a mini-batch that a device"),
    ],
)
def test_devices_that_cannot_share_a_mini_batch_are_refused(
    config: TrainAgentConfig, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        accelerator_overrides(replace(config, mini_batch_size=4, **change))  # type: ignore[arg-type]


def test_a_run_on_one_machine_joins_no_cluster_and_a_cluster_learns_that_there_are_accelerators(
    config: TrainAgentConfig,
) -> None:
    alone = prepare(replace(config, cpu=False, mini_batch_size=4, micro_batch_size=4)).verl
    assert alone.ray_kwargs.ray_init.address == "local"
    assert alone.ray_kwargs.ray_init.runtime_env.env_vars.AGENTIC_R_CPU == "0"
    assert prepare(replace(config, cpu=True)).verl.ray_kwargs.ray_init.address == "local"
    shared = accelerator_overrides(replace(config, nodes=2, mini_batch_size=4, micro_batch_size=2))
    assert "+ray_kwargs.ray_init.address=auto" in shared


def test_the_critics_passes_are_as_large_as_the_actors(config: TrainAgentConfig) -> None:
    packed = prepare(replace(config, cpu=False, micro_batch_tokens=512)).verl
    assert packed.actor_rollout_ref.actor.ppo_max_token_len_per_gpu == 512
    assert packed.critic.ppo_infer_max_token_len_per_gpu == 512
    counted = prepare(replace(config, cpu=False, mini_batch_size=4, micro_batch_size=2)).verl
    assert counted.critic.ppo_infer_max_token_len_per_gpu == 2 * LIMITS.max_tokens
    on_cpu = prepare(replace(config, cpu=True)).verl
    assert on_cpu.critic.ppo_infer_max_token_len_per_gpu == on_cpu.actor_rollout_ref.actor.ppo_max_token_len_per_gpu


def test_a_run_that_ran_out_of_memory_goes_on_with_settings_that_take_less(config: TrainAgentConfig) -> None:
    rollout = "actor_rollout_ref.rollout"
    begun = replace(config, verl=["critic.cliprange_value=0.2", f"{rollout}.gpu_memory_utilization=0.8"])
    less = replace(
        begun,
        micro_batch_tokens=256,
        offload=True,
        verl=["critic.cliprange_value=0.2", f"{rollout}.gpu_memory_utilization=0.5"],
    )
    assert run_output(less).made_from == run_output(begun).made_from
    other = replace(begun, verl=["critic.cliprange_value=0.3", *begun.verl[1:]])
    assert run_output(other).made_from != run_output(begun).made_from


def test_an_existing_output_needs_resume_and_the_same_settings(config: TrainAgentConfig) -> None:
    out = Path(config.out)
    with run_output(replace(config, topk=2)).claim(resume=False) as held:
        held.begin()
    with pytest.raises(OutputExistsError, match="--resume"):
        run(config)
    with pytest.raises(ManifestMismatchError, match="topk was 2, now 1"):
        run(config, resume=True)
    assert [file.name for file in out.iterdir()] == [".manifest.json"]


def test_a_start_that_was_cut_off_is_known_by_its_settings(
    config: TrainAgentConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, calls = Path(config.out), []

    def killed(*_: object) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "write_parquet", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    other = tmp_path / "other" / "train.jsonl"
    other.parent.mkdir()
    other.write_text(Path(config.questions).read_text().replace("?", "!"))
    with pytest.raises(ManifestMismatchError, match="questions was "):
        run(replace(config, questions=str(other)), resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(config, resume=True)
    assert (calls, (out / ".manifest.json").is_file()) == ([1, 1], True)


def test_a_folder_of_something_else_is_not_taken_for_a_run(config: TrainAgentConfig) -> None:
    out = Path(config.out)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ManifestMismatchError, match="what it was made from is unknown"):
        run(config, resume=True)
    assert [file.name for file in out.iterdir()] == ["notes.txt"]


def test_a_dry_run_passes_for_a_critic_that_is_still_to_be_written(
    config: TrainAgentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run(replace(config, value_head="zero", dry_run=True))
    printed = capsys.readouterr().out
    assert f"path: {config.out}/critic-start" in printed and "ok      verl's own checks: passed" in printed
    assert not Path(config.out).exists()


def test_what_verl_cannot_build_is_one_of_the_dry_runs_lines(
    config: TrainAgentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="dry run: 1 of 11 checks failed"):
        run(replace(config, dry_run=True, verl=["critic.model.path=/nowhere"]))
    assert "FAILED  verl's own checks: verl refuses the configuration: " in capsys.readouterr().out


def test_a_dry_run_on_a_machine_with_an_accelerator_misses_the_engine_and_a_torch_for_it(
    config: TrainAgentConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find_spec(name, *a))
    elsewhere = replace(config, dry_run=True, cpu=False)
    monkeypatch.setattr(detect, "accelerator", lambda: "")
    run(elsewhere)  # it may be for the machines that train
    assert "ok      rollout engine: vllm: not installed here" in capsys.readouterr().out
    monkeypatch.setattr(detect, "accelerator", lambda: "nvidia")
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(ConfigError, match="dry run: 1 of 12 checks failed"):
        run(elsewhere)
    assert "FAILED  rollout engine: torch with CUDA, vllm: not installed here" in capsys.readouterr().out


def test_the_configuration_can_be_filled_from_the_command_line(config: TrainAgentConfig) -> None:
    overrides = [f"{name}={getattr(config, name)}" for name in ("model", "questions", "retrieval_url", "out")]
    filled = load_config(TrainAgentConfig, overrides=[*overrides, "limits.max_searches=3", "kl_loss=true"])
    assert (filled.limits.max_searches, filled.kl_loss, filled.batch_size) == (3, True, 512)
    with pytest.raises(ConfigError, match="no value for"):
        load_config(TrainAgentConfig)


def test_verl_is_given_what_the_paper_says_and_never_cuts_anything(config: TrainAgentConfig) -> None:
    paper = TrainAgentConfig(model=config.model, questions="q", retrieval_url="u", out=config.out)
    composed = verl_config.compose(paper, machine=[], num_questions=10_000, prompt_lengths=[40, 60], fresh=True)
    actor, rollout = composed.actor_rollout_ref.actor, composed.actor_rollout_ref.rollout
    assert (composed.algorithm.adv_estimator, composed.algorithm.gamma, composed.algorithm.lam) == ("gae", 1, 1)
    assert (composed.algorithm.use_kl_in_reward, composed.algorithm.kl_ctrl.kl_coef) == (True, 0.001)
    assert (actor.optim.lr, actor.optim.lr_warmup_steps_ratio) == (1e-6, 0.285)
    assert (composed.critic.optim.lr, composed.critic.optim.lr_warmup_steps_ratio) == (1e-5, 0.015)
    assert (composed.data.train_batch_size, actor.ppo_mini_batch_size, rollout.temperature) == (512, 256, 1.0)
    assert (composed.trainer.total_training_steps, composed.trainer.save_freq) == (500, 50)
    assert (actor.loss_agg_mode, composed.critic.loss_agg_mode) == ("token-mean", "token-mean")
    assert (rollout.prompt_length, rollout.response_length, rollout.max_model_len) == (60, 4096 - 40, 4096)
    assert composed.trainer.total_epochs * (10_000 // 512) >= 500
    assert composed.trainer.v1.trainer_mode == "agentic_r_sync"
    assert composed.reward.custom_reward_function.path == "pkg://agentic_r_plugin.agent.verl_reward"


def test_without_flash_attn_actor_reference_and_critic_train_with_torchs_own_attention(
    config: TrainAgentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def used(**changes: Any) -> set[str]:
        composed = prepare(replace(config, cpu=False, **changes)).verl
        models = (composed.actor_rollout_ref.model, composed.critic.model)
        return {model.override_config.get("attn_implementation", "flash_attention_2") for model in models}

    assert used() == {"packed_causal"}  # flash-attn is not installed here
    assert used(attention="sdpa") == {"sdpa"}
    own = [
        f"+{model}.override_config.attn_implementation=eager" for model in ("actor_rollout_ref.model", "critic.model")
    ]
    assert used(verl=own) == {"eager"}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: name == "flash_attn" or find(name, *at))
    assert used() == {"flash_attention_2"}
    assert used(attention="packed_causal") == {"packed_causal"}


def test_what_only_flash_attn_can_do_is_refused_without_it(config: TrainAgentConfig) -> None:
    for override, message in (
        ("actor_rollout_ref.actor.ulysses_sequence_parallel_size=2", r"actor: ulysses.*=2 needs flash-attn"),
        ("critic.fsdp.ulysses_sequence_parallel_size=2", r"critic: ulysses.*=2 needs flash-attn"),
        ("critic.model.use_remove_padding=false", "takes packed rows"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(replace(config, cpu=False, verl=[override]))


def test_sglang_which_cannot_be_installed_with_verl_is_refused_before_the_start(config: TrainAgentConfig) -> None:
    with pytest.raises(
        ConfigError, match=r"engine=sglang: .* transformers 5\.6\.0, which verl excludes\. Use engine=vllm"
    ):
        prepare(replace(config, engine="sglang", cpu=False))


def test_sglang_reads_text_and_leaves_the_last_token_its_room(
    config: TrainAgentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find_spec("math" if name == "sglang" else name))
    chosen = replace(config, engine="sglang", cpu=False, attention="packed_causal")
    composed = prepare(chosen).verl.actor_rollout_ref.rollout
    assert (composed.name, composed.skip_tokenizer_init) == ("sglang", False)
    assert composed.max_model_len - (LIMITS.max_tokens - 1) - 1 == 1  # verl's room for the last token of a trajectory
    with pytest.raises(ConfigError, match="engine='trtllm': expected one of vllm, sglang"):
        replace(config, engine="trtllm")


def test_the_users_overrides_win_over_the_machines_and_ours(config: TrainAgentConfig) -> None:
    composed = verl_config.compose(
        replace(config, verl=["actor_rollout_ref.actor.grad_clip=0.5", "+data.my_key=1", "critic.strategy=fsdp"]),
        machine=cpu_overrides(),
        num_questions=12,
        prompt_lengths=[30],
        fresh=True,
    )
    assert (composed.actor_rollout_ref.actor.grad_clip, composed.data.my_key) == (0.5, 1)
    assert (composed.critic.strategy, composed.actor_rollout_ref.actor.strategy) == ("fsdp", "fsdp2")
    assert composed.trainer.device == "cpu"


def test_the_agent_loop_is_named_by_the_yaml_file_alone(config: TrainAgentConfig) -> None:
    (entry,) = OmegaConf.create(verl_config.agent_loop_yaml(config))
    assert entry.name == verl_config.LOOP_NAME
    assert (entry.topk, entry.seed, entry.limits.max_tokens) == (1, 0, 160)
    from verl.experimental.agent_loop import agent_loop

    import agentic_r_plugin.agent.agent_loop

    assert agentic_r_plugin.agent.agent_loop.SearchAgentLoop.__name__ == "SearchAgentLoop"
    assert verl_config.LOOP_NAME not in agent_loop._agent_loop_registry


def test_the_training_processes_are_given_whether_to_take_the_cpu(config: TrainAgentConfig) -> None:
    for cpu, switch in ((True, "1"), (False, "0")):
        assert prepare(replace(config, cpu=cpu)).environment["AGENTIC_R_CPU"] == switch


def test_requests_carry_seeds_on_the_cpu_and_on_accelerators(config: TrainAgentConfig) -> None:
    for cpu in (True, False):
        assert OmegaConf.create(prepare(replace(config, cpu=cpu, seed=7)).loop)[0].seed == 7


@pytest.mark.parametrize(("mode", "drawn"), [("sync", 7), ("colocate_async", None), ("separate_async", None)])
def test_requests_that_may_be_aborted_and_go_on_carry_no_seed_unless_one_is_set(
    config: TrainAgentConfig, mode: str, drawn: int | None
) -> None:
    chosen = replace(config, cpu=False, seed=7, mode=mode, rollout_nodes=int(mode == "separate_async"))
    for sampling_seed, expected in ((-1, drawn), (5, 5), (None, None)):
        (loop,) = OmegaConf.create(verl_config.agent_loop_yaml(replace(chosen, sampling_seed=sampling_seed)))
        assert loop.seed == expected


def test_the_validation_subset_is_drawn_from_the_whole_file(config: TrainAgentConfig) -> None:
    def ids(most: int, seed: int = 0) -> list[str]:
        chosen = replace(config, validation=config.questions, validation_questions=most, seed=seed)
        return [item.record.id for item in validation_questions(chosen) or []]

    whole = ids(0)
    assert len(ids(5)) == 5 and set(ids(5)) < set(whole) and ids(5) != whole[:5]
    assert ids(5, seed=1) == ids(5)  # runs of several seeds are compared on the same questions


def outcome(failed: int = 0, generated: int = 5) -> dict[str, object]:
    return {"search_failed": failed, "trained_tokens": 0 if failed else generated, "trajectory": {"id": "q"}}


def test_missing_trajectories_and_too_many_failed_searches_stop_the_run() -> None:
    check_trajectories([outcome()] * 9 + [outcome(failed=1)], 10, 0.1, step=3)
    with pytest.raises(TrainingError, match="step 3: 1 of 10 trajectories did not arrive"):
        check_trajectories([outcome()] * 9, 10, 0.1, step=3)
    with pytest.raises(TrainingError, match="the search of 20% of the trajectories failed, more than the 10% allowed"):
        check_trajectories([outcome()] * 8 + [outcome(failed=1)] * 2, 10, 0.1, step=3)
    with pytest.raises(TrainingError, match="100%"):
        check_trajectories([outcome(failed=1)] * 2, 2, 1.0, step=3)


def test_a_mask_that_is_not_the_models_tokens_stops_the_run() -> None:
    check_masks([outcome(), outcome(failed=1)], [5, 0], step=1)
    with pytest.raises(TrainingError, match=r"trajectory 'q': the agent loop selected 5 tokens for .* batch has 6"):
        check_masks([outcome()], [6], step=1)


def test_the_newest_checkpoint_is_the_one_verl_finished(tmp_path: Path) -> None:
    assert latest_step(tmp_path) == 0
    for step in (10, 2, 9):
        (tmp_path / "checkpoints" / f"global_step_{step}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("9")
    assert checkpoint_steps(tmp_path / "checkpoints") == [2, 9, 10]
    name_latest(tmp_path)
    assert latest_step(tmp_path) == 9


def test_a_kill_while_verl_names_the_newest_checkpoint_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "global_step_10").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").touch()
    assert latest_step(tmp_path) == 10
    name_latest(tmp_path)
    assert find_latest_ckpt_path(str(tmp_path / "checkpoints")) == str(tmp_path / "checkpoints" / "global_step_10")


def test_a_fault_is_found_behind_rays_wrapping() -> None:
    inner = TrainingError("loss")
    wrapped = RuntimeError("ray")
    wrapped.cause = inner  # type: ignore[attr-defined]
    assert our_fault(wrapped) is inner
    assert our_fault(ValueError("x")) is None


def test_after_a_resume_the_steps_done_again_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: TrainAgentConfig, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    log = StepLog(run_dir / "metrics.jsonl")
    log.append([{"step": step, "agentic_r/em": 0.0} for step in range(6)])
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3")

    class Training:
        returncode = 0

        def poll(self) -> int:
            log.append([{"step": 4, "agentic_r/em": 0.5}])
            return 0

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: Training())
    monkeypatch.setattr(launch, "end", lambda *_, **__: None)
    write_json(run_dir / ".manifest.json", {"made_from": {}})
    with Output(out=run_dir, made_from={}, done="done.json", folder=True).claim(resume=True) as held:
        launch._train(held, config, {})
    assert capsys.readouterr().err == "step 4/2  EM 0.500\n"


def test_a_step_is_reported_in_one_line() -> None:
    record = {"step": 0, "val-core/towns/acc/mean@1": 0.5}
    assert progress_line(record, 3) == "step 0/3  validation EM 0.500"


CHILD = """
import os, time
from agentic_r_plugin.child import die_with
die_with(os.getppid())
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"


def test_the_training_process_ends_with_the_one_that_started_it() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait(10)
    deadline = time.monotonic() + 10
    while alive(child):
        assert time.monotonic() < deadline, "the training process outlived the process that started it"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False
