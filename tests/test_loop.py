"""The whole loop on a CPU with the shipped agent: killed twice, taken up again, and whole at the end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from agentic_r_plugin.comparison.source import SourceRun
from agentic_r_plugin.config import load_config
from agentic_r_plugin.errors import ConfigError, ManifestMismatchError, OutputExistsError
from agentic_r_plugin.iterate import IterateConfig, Loop, opened, run
from agentic_r_plugin.loop import costs
from agentic_r_plugin.loop.checks import check_files, check_settings
from agentic_r_plugin.loop.forecast import forecast
from agentic_r_plugin.loop.phases import Phases
from agentic_r_plugin.records import Group
from agentic_r_plugin.storage.claim import companion
from agentic_r_plugin.store import read_lines, read_records, write_json
from tests.evaluation.evaluation_toy import write_benchmark

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "quickstart" / "loop.yaml"

SMALL = {
    "iterations": 1,
    "world": {
        "train_questions": 16, "dev_questions": 4, "test_questions": 8, "people": 40, "works": 24, "companies": 8,
        "schools": 8, "prizes": 6, "towns": 14, "rivers": 6, "newspapers": 10,
    },
    "train_agent": {
        "steps": 2, "batch_size": 8, "mini_batch_size": 8, "micro_batch_size": 8, "actor_lr": 1e-4, "critic_lr": 5e-4,
        "save_every": 1, "keep_checkpoints": 1, "validate_every": 0,
    },
    "trajectories": {"batch_size": 4},
    "correctness": {"batch_size": 2},
    "train_retriever": {"max_steps": 2, "batch_size": 2, "group_size": 4, "checkpoint_steps": 1},
    "evaluate": {"resamples": 200},
}  # fmt: skip


def command(out: Path) -> list[str]:
    recipe = out.parent / "loop.json"
    recipe.write_text(json.dumps(SMALL))
    base = load_config(IterateConfig, RECIPE)
    config = {"agent": str(ROOT / base.agent), "retriever": base.retriever, "protocol": base.protocol} | SMALL
    config["train_agent"] = SMALL["train_agent"] | {"verl": base.train_agent["verl"]}
    recipe.write_text(json.dumps(config | {"limits": vars(base.limits), "relevance": dict(base.relevance)}))
    return [sys.executable, "-m", "agentic_r_plugin.cli", "iterate", "--config", str(recipe), f"out={out}", "--resume"]


def kill_when(out: Path, reached, log: Path) -> None:
    """Run the loop and kill -9 it as soon as `reached()`; nothing it started may live on."""
    with log.open("ab") as stream:
        process = subprocess.Popen(command(out), stdout=stream, stderr=stream, cwd=ROOT)
        try:
            deadline = time.monotonic() + 600
            while not reached():
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that was killed in PPO's last validation, after its last checkpoint, and again in correctness."""
    out = tmp_path_factory.mktemp("loop") / "run"
    log = out.parent / "log"
    checkpoint = out / "iteration-1" / "agent" / "checkpoints" / "latest_checkpointed_iteration.txt"
    kill_when(out, lambda: checkpoint.is_file() and checkpoint.read_text() == "2", log)
    work = out / "iteration-1" / "data" / "correctness.jsonl.work"
    kill_when(out, lambda: work.is_file() and work.stat().st_size > 0, log)
    done = subprocess.run(command(out), capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_every_phase_was_finished_once_and_said_what_it_cost(finished):
    lines = [line for _, line in read_lines(finished / "costs.jsonl")]
    assert [(line["iteration"], line["phase"]) for line in lines] == [
        (0, "world"), (0, "index"), (1, "train-agent"), (1, "trajectories"), (1, "candidates"), (1, "relevance"),
        (1, "correctness"), (1, "groups"), (1, "train-retriever"), (1, "index"), (1, "evaluate"),
    ]  # fmt: skip
    cost = {line["phase"]: line for line in lines}
    assert cost["train-agent"]["steps"] == 2 and cost["train-agent"]["rollouts"] == 16
    assert cost["trajectories"]["rollouts"] == 16 and cost["trajectories"]["generated_tokens"] > 0
    assert all(line["seconds"] >= 0 for line in lines)


def test_no_step_of_ppo_was_lost_or_repeated(finished):
    lines = [line for _, line in read_lines(finished / "iteration-1" / "agent" / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [any(key.startswith("val-core/") for key in line) for line in lines] == [True, False, True]


def test_groups_hold_passages_of_the_corpus(finished):
    corpus = {line["id"] for _, line in read_lines(finished / "benchmark" / "fictional_world" / "corpus.jsonl")}
    for group in read_records(finished / "iteration-1" / "data" / "groups.jsonl", Group):
        assert {group.positive, *group.negatives} <= corpus and group.positive not in group.negatives


def test_agents_and_retrievers_were_evaluated_and_reported(finished):
    matrix = (finished / "evaluation" / "matrix.md").read_text()
    assert all(name in matrix for name in ("agent-0", "agent-1", "retriever-0", "retriever-1"))
    assert "<html" in (finished / "report.html").read_text() and (finished / "report.md").stat().st_size > 0


def test_a_finished_run_does_nothing_again(finished):
    before = (finished / "costs.jsonl").read_bytes()
    done = subprocess.run(command(finished), capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0 and (finished / "costs.jsonl").read_bytes() == before


def test_a_run_folder_refuses_another_configuration_and_a_second_start(finished):
    config = load_config(IterateConfig, finished / "config.yaml")
    with pytest.raises(OutputExistsError, match="pass --resume to go on"):
        run(config)
    other = load_config(IterateConfig, finished / "config.yaml", ["seed=1"])
    with pytest.raises(ManifestMismatchError, match="seed"):
        run(other, resume=True)


def composed(tmp_path: Path, *overrides: str) -> Phases:
    phases = Phases(load_config(IterateConfig, RECIPE, [f"out={tmp_path / 'run'}", f"agent={tmp_path}", *overrides]))
    check_settings(phases)
    check_files(phases)
    return phases


def test_a_section_changes_single_fields_of_what_the_loop_fills_in(tmp_path):
    phases = composed(
        tmp_path, "candidates.search.timeout_s=120", "correctness.llm.dtype=float16",
        "trajectories.limits.max_searches=3", "train_agent.limits.max_searches=4",
        "evaluate.settings.agent.dtype=float16",
    )  # fmt: skip
    candidates = phases.stage(1, "candidates", "agent", "http://host:1")
    assert (candidates.search.backend, candidates.search.url, candidates.search.timeout_s) == (
        "service", "http://host:1", 120,
    )  # fmt: skip
    correctness = phases.stage(1, "correctness", "agent", "http://host:1")
    assert (correctness.llm.model, correctness.llm.dtype, correctness.llm.max_batch_tokens) == (
        "agent",
        "float16",
        65536,
    )
    trajectories = phases.stage(1, "trajectories", "agent", "http://host:1")
    assert (trajectories.limits.max_searches, trajectories.limits.max_tokens) == (3, 1600)
    trained = phases.train_agent(1, "agent", "http://host:1")
    assert (trained.limits.max_searches, trained.limits.max_tokens) == (4, 1600)
    settings = phases.planned["evaluate"].settings
    assert (settings.protocol, settings.agent.dtype, settings.agent.max_batch_tokens) == ("compact", "float16", 65536)


@contextmanager
def begun(tmp_path: Path) -> Iterator[Loop]:
    config = load_config(IterateConfig, RECIPE, [f"out={tmp_path / 'run'}", f"benchmark={tmp_path}"])
    with opened(Phases(config), resume=True) as loop:
        yield loop


CLUSTER = ("correctness.runner={kind: ray, address: auto}", "serve.host=0.0.0.0", "serve.token_env=LOOP_TOKEN")


def test_workers_on_other_machines_are_given_the_name_of_the_services_token(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOP_TOKEN", "s3cret")
    phases = composed(tmp_path, *CLUSTER, "train_agent={nodes: 2, cpu: false}", "candidates.search.url=http://other:1")
    for name in ("trajectories", "correctness"):
        found = phases.stage(1, name, "agent", "http://host:1").search
        assert (found.url, found.options) == ("http://host:1", {"token_env": "LOOP_TOKEN"})
    assert phases.stage(1, "candidates", "agent", "http://host:1").search.options == {}  # another service's
    assert phases.train_agent(2, "agent", "http://host:1").retrieval_token_env == "LOOP_TOKEN"
    assert "s3cret" not in str(phases.config)
    monkeypatch.delenv("LOOP_TOKEN")
    with pytest.raises(ConfigError, match=r"serve\.token_env: environment variable LOOP_TOKEN is not set"):
        check_files(phases)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["trajectories.runner={kind: ray, address: auto}"], r"trajectories\.runner\.address=auto"),
        (["train_agent.nodes=2"], "train_agent on several machines"),
        (["train_agent_later={mode: separate_async, rollout_nodes: 1}"], "train_agent on several machines"),
        (["correctness.runner={kind: ray, address: 'h:1'}", "serve.token_env=T"], r"correctness\.runner\.address=h:1"),
    ],
)
def test_a_service_that_other_machines_cannot_reach_is_refused(tmp_path, monkeypatch, overrides, named):
    monkeypatch.setenv("T", "s3cret")
    with pytest.raises(
        ConfigError, match=rf"serve\.host=127\.0\.0\.1: other machines .*{named}; set serve\.host=0\.0\.0\.0"
    ):
        composed(tmp_path, *overrides)


def test_stages_that_stay_here_or_search_elsewhere_need_no_open_service(tmp_path):
    far = "runner={kind: ray, address: auto}"
    composed(tmp_path, f"relevance.{far}", f"candidates.{far}", "candidates.search.url=http://other:1",
             "correctness.runner={kind: ray, address: local}", "trajectories.runner={kind: ray}")  # fmt: skip


def test_a_line_of_costs_that_was_torn_is_a_phase_not_done(tmp_path):
    file = tmp_path / "run" / "costs.jsonl"
    with begun(tmp_path) as loop:
        loop.costs.phase(0, "index", lambda: None)
    with file.open("ab") as stream:
        stream.write(b'{"iteration": 1, "phase": "train-ag')
    with begun(tmp_path) as loop:
        loop.costs.phase(1, "train-agent", lambda: None)
    assert [line["phase"] for _, line in read_lines(file)] == ["index", "train-agent"]


def test_what_a_run_was_given_may_not_change_under_it(tmp_path):
    agent, questions = tmp_path / "agent", tmp_path / "train.jsonl"
    agent.mkdir()
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.jsonl").write_text("questions")
    overrides = [f"out={tmp_path / 'run'}", f"benchmark={tmp_path}", f"agent={agent}"]
    config = load_config(IterateConfig, RECIPE, overrides)
    for resume in (False, True):
        with opened(Phases(config), resume=resume):
            pass
    questions.write_text("other questions")
    other = pytest.raises(ManifestMismatchError, match=r'contents of questions of train was "[^;]*\. Give')
    with other, opened(Phases(config), resume=True):
        pass
    questions.write_text("questions")
    (agent / "model.safetensors").write_text("weights")
    other = pytest.raises(ManifestMismatchError, match=r'contents of agent was "[^;]*\. Give')
    with other, opened(Phases(config), resume=True):
        pass


def test_what_the_evaluation_lacks_is_found_before_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate: split 'test': no .*data/nq/test\.jsonl"):
        composed(tmp_path, f"evaluate.data_dir={tmp_path / 'data'}", "evaluate.benchmarks=[nq]")
    write_benchmark(tmp_path / "data")
    where = f"evaluate.data_dir={tmp_path / 'data'}"
    composed(tmp_path, where, "evaluate.benchmarks=[toy]")
    with pytest.raises(ConfigError, match=r"evaluate: searches\.e5: 'nowhere' does not exist"):
        composed(
            tmp_path, where, "evaluate.benchmarks=[toy]", "evaluate.searches.e5=nowhere", "evaluate.cells=[agent-0:e5]"
        )


def test_a_phase_is_charged_with_its_own_time_next_to_that_of_its_workers(tmp_path):
    with begun(tmp_path) as loop:
        loop.costs.phase(1, "relevance", lambda: time.sleep(0.2), lambda: {"seconds": 900.0, "rollouts": 3})
    ((_, line),) = read_lines(tmp_path / "run" / "costs.jsonl")
    assert 0.2 <= line.pop("seconds") < 60
    assert line == {"iteration": 1, "phase": "relevance", "worker_seconds": 900.0, "rollouts": 3}


def test_a_phase_that_was_killed_is_charged_with_all_its_attempts(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "_KEEP_S", 0.05)

    def fails() -> None:
        time.sleep(0.3)
        assert loop._held.noted("attempt")["seconds"] >= 0.05  # kept while it runs: a kill -9 leaves no time for it
        raise KeyboardInterrupt

    for _ in range(2):
        with begun(tmp_path) as loop, pytest.raises(KeyboardInterrupt):
            loop.costs.phase(1, "relevance", fails)
    with begun(tmp_path) as loop:
        assert 0.6 <= loop._held.noted("attempt")["seconds"] < 60
        loop.costs.phase(1, "relevance", lambda: time.sleep(0.1))
        loop.costs.phase(1, "groups", lambda: None)
    first, second = (line["seconds"] for _, line in read_lines(tmp_path / "run" / "costs.jsonl"))
    assert 0.7 <= first < 60 and second < first


@pytest.mark.parametrize(("kept", "warns"), [(249, False), (120, True), (0, True)])
def test_a_share_of_positives_that_collapses_is_said(tmp_path, capsys, kept, warns):
    with begun(tmp_path) as loop:
        for k, report in ((1, {"read": 520, "kept": 249}), (2, {"read": 612, "kept": kept})):
            file = companion(loop.phases.data(k, "groups"), ".report.json")
            file.parent.mkdir(parents=True)
            write_json(file, report)
            loop.warn_of_collapse(k)
    shown = capsys.readouterr().err
    assert (f"[iteration 2] warning: {kept} of 612 queries have a positive" in shown) == warns
    assert ("48% in iteration 1" in shown) == warns


def test_seconds_of_another_phase_are_not_taken_over(tmp_path):
    with begun(tmp_path) as loop:
        loop._held.note(attempt={"iteration": 1, "phase": "relevance", "seconds": 1e6})
        loop.costs.phase(2, "relevance", lambda: None)
    ((_, line),) = read_lines(tmp_path / "run" / "costs.jsonl")
    assert line["seconds"] < 1000


def test_the_forecast_knows_the_later_training_of_the_quick_start(tmp_path):
    printed = forecast(composed(tmp_path, "plan={train_questions: 600, corpus_passages: 5400000}"))
    recipe = load_config(IterateConfig, RECIPE)
    first, later = recipe.train_agent["steps"], recipe.train_agent_later["steps"]
    assert re.search(rf"train-agent +{first} steps +{32 * first} ", printed)
    assert f"From iteration 2 on: train-agent {later} steps, {32 * later} rollouts" in printed
    # steps of 300 s on 8 accelerators, and three indexes of an hour each
    (hours,) = re.findall(r"All 2, with the index before them: ([\d.]+) GPU hours", printed)
    assert 0 < float(hours) - (first + later) * 300 * 8 / 3600 - 3 < 0.5


def test_a_loop_without_ppo_takes_the_given_agent_in_every_iteration(tmp_path):
    phases = composed(tmp_path, "train_agents=false", "plan={train_questions: 600, corpus_passages: 5400000}")
    with opened(phases, resume=False) as loop:
        assert [loop.train_agent(k, "other", "http://host:1") for k in (1, 2)] == [phases.config.agent] * 2
        loop.costs.done |= {(1, name): {} for name in phases.stages()}
        with loop.search_service(1) as url:
            assert url == ""
    assert re.search(r"train-agent +0 steps +0 ", forecast(phases))
    assert {phase for _, phase in phases.config.expected()} >= {"trajectories", "evaluate"}
    assert "train-agent" not in {phase for _, phase in phases.config.expected()}
    assert SourceRun(str(phases.folder), 1).model("agent-1", "agent") == phases.config.agent


def test_exhaustive_correctness_and_trainers_on_scores_are_given_the_files_they_need(tmp_path):
    phases = composed(tmp_path, "correctness.exhaustive=true", "train_retriever.trainer=replug")
    assert phases.stage(1, "correctness", "agent", "http://host:1").relevance == ""
    made = phases.train_retriever(2, "x", "g.jsonl")
    assert made.relevance == str(tmp_path / "run" / "iteration-2" / "data" / "relevance.jsonl")
    assert composed(tmp_path).train_retriever(2, "x", "g.jsonl").relevance is None


def test_correctness_is_pruned_for_the_groups_that_will_be_made(tmp_path):
    def preset(*settings: str) -> str:
        return composed(tmp_path, *settings).stage(1, "correctness", "agent", "http://host:1").preset

    assert preset() == "paper"
    assert preset("groups.preset=released_code") == "released_code"
    assert preset("correctness.preset=released_code") == "released_code"
    with pytest.raises(ConfigError, match="up to 3 tied candidates"):
        composed(tmp_path, "groups.preset=released_code", "correctness.preset=paper")


def test_a_loop_has_the_stages_whose_files_its_selection_reads(tmp_path):
    def stages(*settings: str) -> list[str]:
        phases = composed(tmp_path, "plan={train_questions: 600, corpus_passages: 5400000}", *settings)
        names = list(phases.stages())
        assert [name for name in ("relevance", "correctness") if re.search(rf"\n{name} +\d", forecast(phases))] == [
            name for name in names if name in ("relevance", "correctness")
        ]
        return names

    every = ["trajectories", "candidates", "relevance", "correctness", "groups"]
    assert stages() == every
    judged = [name for name in every if name != "correctness"]
    assert stages("groups.use_correctness=false") == judged
    unjudged = ("groups.use_relevance=false", "correctness.exhaustive=true")
    assert stages(*unjudged) == [name for name in every if name != "relevance"]
    assert stages("groups.use_relevance=false", "groups.preset=opened") == ["trajectories", "candidates", "groups"]
    assert stages("groups.preset=opened") == judged
    scored = "train_retriever={trainer: replug, correctness: c.jsonl}"
    assert stages("groups.preset=opened", scored) == every


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("groups.num_negativs=3", "num_negativs"),
        ("train_agent.steps=many", "steps"),
        ("iterations=0", "iterations"),
        ("relevance.scorer=gold", "gold"),
        ("relevance.scorer=listwise_judge", r"relevance\.llm\.model"),
        ("judge=true", r"sub_answers\.llm\.model"),
        ("groups.use_relevance=false", r"correctness\.exhaustive=true"),
        ("groups.threshold=50", r"below correctness\.threshold=60"),
        ("correctness={exhaustive: true, relevance: r.jsonl}", "either --relevance FILE"),
        ("groups.out=elsewhere", r"groups\.out"),
        ("train_agent.preset=released_code", r"expected paper.*limits\.max_searches=4 .*train_agent\.steps=400"),
        ("train_agent_later.preset=released_code", r"train_agent_later\.steps=400"),
        ("train_agent.preset=released", "preset='released'"),
        ("train_retriever.trainer=none", "none"),
        ("agent_from=best", "agent_from"),
        ("agent=/no/such/folder", "agent"),
        ("test_split=tset", "test_split: the generated world has the splits train, dev and test, found 'tset'"),
        ("world.test_questions=0", r"world\.test_questions: expected at least 1, for test_split=test"),
        ("protocol=compct", "compct"),
        ("expected_seconds={'1': {trajectories: abc}}", "expected_seconds: expected iteration -> phase -> seconds"),
        ("benchmark=/no/such/benchmark", "benchmark"),
    ],
)
def test_a_wrong_setting_is_found_before_anything_runs(tmp_path, override, message):
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=message):
        composed(tmp_path, override)
    assert not out.exists()


def test_what_a_phase_and_the_rest_take_here_is_estimated_from_the_pace_of_the_phases_before(tmp_path):
    expected = {"0": {"world": 1, "index": 20}, "1": {"train-agent": 60, "evaluate": 30}}
    with opened(Phases(replace(composed(tmp_path).config, expected_seconds=expected)), resume=False) as loop:
        assert loop.costs.estimate(0, "index") == ": about 20 s; 1 min 51 s left in total"
        loop.costs.done = {(0, "world"): {"seconds": 2.0}, (0, "index"): {"seconds": 40.0}}
        assert loop.costs.estimate(1, "train-agent") == ": about 2 min; 3 min left in total"
        assert loop.costs.estimate(2, "groups") == ""
