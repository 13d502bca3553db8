"""The command line: contract of commands, flags, overrides, exit codes and messages."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from agentic_r_plugin import cli, components
from agentic_r_plugin.agent.settings import TrainAgentConfig
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.world.generate import WorldConfig

CONTRACT = {
    "components", "world", "index", "serve", "train-agent", "trajectories", "candidates", "sub-answers", "relevance",
    "correctness", "groups", "train-retriever", "evaluate", "iterate", "report",
}  # fmt: skip


def run(capsys, *arguments):
    code = cli.main(arguments)
    return code, *capsys.readouterr()


def test_help_lists_every_command_of_the_contract(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"    {name}" in shown for name in CONTRACT)


@pytest.mark.parametrize("name", sorted(CONTRACT))
def test_every_command_has_help_with_its_flags(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert f"agentic-r {name}" in shown
    if name != "components":
        assert "--config" in shown and "--resume" in shown


@pytest.mark.parametrize(
    ("name", "flags"),
    {
        "world": ["--out", "--seed"],
        "index": ["--corpus", "--retriever", "--out"],
        "serve": ["--index", "--port"],
        "trajectories": ["--in", "--out"],
        "candidates": ["--in", "--out"],
        "sub-answers": ["--in", "--out"],
        "relevance": ["--candidates", "--out"],
        "correctness": ["--candidates", "--relevance", "--exhaustive", "--out"],
        "groups": ["--candidates", "--relevance", "--correctness", "--out", "--preset", "--seed"],
        "train-retriever": ["--groups", "--corpus", "--out"],
        "report": ["--run"],
    }.items(),
)
def test_the_flags_of_the_contract_are_there(name, flags, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    shown = capsys.readouterr().out
    assert [flag for flag in flags if f"{flag} " not in shown and f"{flag}," not in shown] == []


def test_components_are_listed_as_text_and_as_json(capsys):
    code, out, _ = run(capsys, "components")
    assert code == 0 and "question_query" in out and "agentic-r-plugin" in out
    code, out, _ = run(capsys, "components", "--json")
    rows = json.loads(out)
    assert code == 0 and {"kind", "name", "package", "description"} == set(rows[0])


def test_a_component_that_cannot_be_loaded_is_listed_with_the_reason(capsys, monkeypatch):
    broken = EntryPoint("llm_backend.broken", "no_such_module:Backend", components.GROUP)
    monkeypatch.setitem(components._registry(), ("llm_backend", "broken"), broken)
    code, out, _ = run(capsys, "components")
    assert code == 0 and "cannot be loaded: No module named 'no_such_module'" in out and "question_query" in out


def test_an_error_is_one_paragraph_on_stderr_without_a_traceback(capsys, tmp_path):
    code, out, err = run(capsys, "trajectories", "--in", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "t.jsonl"))
    assert code == 1 and out == "" and err.startswith("agentic-r trajectories: ")
    assert "Traceback" not in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_the_disk_refuses_is_an_error_with_the_path(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    code, _, err = run(capsys, "world", "--out", str(tmp_path / "file" / "w"))
    where = tmp_path / "file" / "w" / "fictional_world"
    assert code == 1 and err == f"agentic-r world: {where}: Not a directory (--debug shows where)\n"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("benchmarks=mine", "key 'benchmarks': expected a list: benchmarks=[VALUE]"),
        ("agents=mine", "key 'agents': expected names with values: agents.NAME=VALUE"),
        ("agnets.a=mine", "Key 'agnets' not in 'EvaluateConfig'; did you mean 'agents'?"),
        ("agents.qwen2.5=mine", "found {'5': 'mine'}; a name with a dot is written 'agents[NAME]=VALUE'"),
    ],
)
def test_a_setting_of_the_wrong_shape_shows_the_right_one(setting, message, capsys, tmp_path):
    code, _, err = run(capsys, "evaluate", "--out", str(tmp_path / "e"), "data_dir=d", setting)
    assert code == 1 and message in err


def test_debug_shows_the_traceback(capsys, tmp_path):
    code, _, err = run(capsys, "groups", "--candidates", str(tmp_path / "no"), "--out", str(tmp_path / "g"), "--debug")
    assert code == 1 and "Traceback" in err


def test_an_unknown_key_names_the_key_and_the_file(capsys, tmp_path):
    file = tmp_path / "world.yaml"
    file.write_text("sed: 3\n")
    code, _, err = run(capsys, "world", "--out", str(tmp_path / "w"), "--config", str(file))
    assert code == 1 and "sed" in err and "world.yaml" in err
    code, _, err = run(capsys, "world", "--out", str(tmp_path / "w"), "sed=3")
    assert code == 1 and "sed" in err


def test_keys_of_verl_are_passed_on_and_fields_of_the_command_are_not():
    given = ["critic.optim.lr=1e-6", "algorithm.gamma=0.9", "~trainer.logger", "limits.max_searches=2"]
    given += ["actor_rollout_ref.actor.ppo_epochs=2", "algorithm=ppo", "critic=C"]
    required = ["model=M", "questions=Q", "out=O", "retrieval_url=http://127.0.0.1:1"]
    options, overrides = cli.parse_command("train-agent", TrainAgentConfig, [*required, *given])
    config = cli.build_config(TrainAgentConfig, options, overrides)
    assert (config.critic, config.algorithm, config.limits.max_searches) == ("C", "ppo", 2)
    assert sorted(config.verl) == sorted([*given[:3], given[4]])
    for wrong in (["critic"], ["~"]):
        with pytest.raises(ConfigError, match="expected key=value"):
            cli.build_config(WorldConfig, *cli.parse_command("world", WorldConfig, wrong))


def test_flags_and_overrides_set_the_same_fields(capsys, tmp_path):
    small = ["people=40", "works=20", "train_questions=5", "dev_questions=3", "test_questions=5"]
    assert run(capsys, "world", "--out", str(tmp_path / "a"), "--seed", "7", *small)[0] == 0
    assert run(capsys, "world", f"out={tmp_path / 'b'}", "seed=7", *small)[0] == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jsonl"))
    assert len(files) == 4
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_an_existing_output_is_an_error_without_resume(capsys, tmp_path):
    small = ["people=40", "works=20", "train_questions=5", "dev_questions=3", "test_questions=5"]
    assert run(capsys, "world", "--out", str(tmp_path), *small)[0] == 0
    code, _, err = run(capsys, "world", "--out", str(tmp_path), *small)
    assert code == 1 and "already exists" in err
    assert run(capsys, "world", "--out", str(tmp_path), "--resume", *small)[0] == 0


def test_the_installed_command_answers_quickly_without_loading_a_framework():
    code = "import sys; from agentic_r_plugin.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
