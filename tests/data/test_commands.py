"""The data stages as commands, from questions to groups, with a trained agent and a real BM25 index."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from agentic_r_plugin.cli import main
from agentic_r_plugin.records import Candidates, Correctness, Group, Relevance, Trajectory
from agentic_r_plugin.store import read_json, read_records, write_records


def arguments(world: Path, out: Path) -> dict[str, list[str]]:
    """Each stage's command line, its output `out/STAGE.jsonl`."""
    files = {name: str(out / f"{name}.jsonl") for name in STAGES}
    corpus, questions = str(world / "corpus.jsonl"), str(world / "train.jsonl")
    agent = [f"llm.model={world / 'agent'}", "protocol=compact", "llm.device=cpu"]
    search = ["search.backend=bm25", f"search.corpus={corpus}"]
    scored = ["--candidates", files["candidates"], "--corpus", corpus]
    commands = {
        "trajectories": ["--in", questions, *agent, *search, "batch_size=1"],
        "candidates": ["--in", files["trajectories"], "protocol=compact", "topk=10", *search],
        "relevance": [*scored, "--questions", questions],
        "correctness": [*scored, "--relevance", files["relevance"], *agent, *search, "batch_size=1"],
        "exhaustive": [*scored, "--exhaustive", *agent, *search],
        "groups": [
            "--candidates", files["candidates"], "--relevance", files["relevance"],
            "--correctness", files["correctness"], "num_negatives=7",
        ],
    }  # fmt: skip
    return {
        name: ["correctness" if name == "exhaustive" else name, *line, "--out", files[name]]
        for name, line in commands.items()
    }


STAGES = ("trajectories", "candidates", "relevance", "correctness", "exhaustive", "groups")


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, uninterrupted."""
    out = tmp_path_factory.mktemp("whole")
    for name, line in arguments(world, out).items():
        assert main(line) == 0, name
    return out


def test_the_agent_searches_and_answers_every_question(whole: Path):
    trajectories = list(read_records(whole / "trajectories.jsonl", Trajectory))
    assert [record.id for record in trajectories] == ["q0", "q1", "q2", "q3"]
    assert [turn.query for turn in trajectories[0].turns] == ["Ada Brook born years"]
    assert sum(record.em for record in trajectories) >= 3
    report = read_json(whole / "trajectories.jsonl.report.json")
    assert report["rollouts"] == 4 and report["searches"] == sum(len(record.turns) for record in trajectories)
    assert report["generated_tokens"] == sum(record.generated_tokens for record in trajectories)
    assert report["seconds"] > 0


def test_candidates_hold_the_prefix_and_ten_passages(whole: Path):
    queries = list(read_records(whole / "candidates.jsonl", Candidates))
    assert queries[0].prefix == "<think>I look up Ada Brook.</think><search> Ada Brook born years </search>"
    assert {len(query.passages) for query in queries} == {10}


def test_the_passage_that_holds_the_birthplace_is_relevant_and_correct(whole: Path):
    relevance = next(iter(read_records(whole / "relevance.jsonl", Relevance)))
    assert [key for key, score in relevance.scores.items() if score > 60] == ["born-Ada"]
    correct = {
        (record.id, record.passage_id) for record in read_records(whole / "exhaustive.jsonl", Correctness) if record.em
    }
    assert ("q0", "born-Ada") in correct and ("q0", "work-Ada") not in correct


def test_pruning_leaves_out_rollouts_that_decide_nothing(whole: Path):
    pruned = read_json(whole / "correctness.jsonl.report.json")
    exhaustive = read_json(whole / "exhaustive.jsonl.report.json")
    assert exhaustive["candidates"] == exhaustive["rollouts"] + exhaustive["reused"] == 40
    assert pruned["candidates"] == pruned["rollouts"] + pruned["reused"] + pruned["pruned"] == 40
    assert pruned["rollouts"] == 4
    known = {
        (record.id, record.passage_id): record.em for record in read_records(whole / "exhaustive.jsonl", Correctness)
    }
    for record in read_records(whole / "correctness.jsonl", Correctness):
        assert record.em == known[record.id, record.passage_id]


def test_pruned_and_exhaustive_correctness_give_the_same_groups_file(world: Path, whole: Path, tmp_path: Path):
    line = [
        str(whole / "exhaustive.jsonl") if part == str(whole / "correctness.jsonl") else part
        for part in arguments(world, whole)["groups"][:-1]
    ]
    assert main([*line, str(tmp_path / "g.jsonl")]) == 0
    assert (tmp_path / "g.jsonl").read_bytes() == (whole / "groups.jsonl").read_bytes()
    groups = list(read_records(whole / "groups.jsonl", Group))
    assert [group.positive for group in groups][:1] == ["born-Ada"] and len(groups[0].negatives) == 7


def test_correctness_that_was_pruned_otherwise_is_refused_and_not_taken_for_queries_without_rollouts(
    world: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = [*arguments(world, whole)["groups"][:-1], str(tmp_path / "g.jsonl")]
    assert main([*line, "threshold=50"]) == 1
    assert "groups.threshold=50: below correctness.threshold=60" in capsys.readouterr().err
    assert main([*line, "use_relevance=false"]) == 1
    assert "the correctness of every candidate is needed" in capsys.readouterr().err
    assert main([*line, "preset=released_code"]) == 1
    assert "takes up to 3 tied candidates" in (printed := capsys.readouterr().err) and "preset=released_code" in printed
    other = tmp_path / "relevance.jsonl"
    scored = read_records(whole / "relevance.jsonl", Relevance)
    write_records(other, [replace(record, scores=dict.fromkeys(record.scores, 70)) for record in scored])
    line[line.index("--relevance") + 1] = str(other)
    assert main(line) == 1
    printed = capsys.readouterr().err
    assert f"{whole / 'correctness.jsonl'} was made with the relevance file {whole / 'relevance.jsonl'}" in printed
    assert str(other) in printed and not (tmp_path / "g.jsonl").exists()
    line[line.index("--correctness") + 1] = str(whole / "exhaustive.jsonl")
    assert main([*line, "threshold=50"]) == 0  # every candidate was rolled out


_SLOW = """
import pathlib, sys, time
from agentic_r_plugin.cli import main
from agentic_r_plugin.storage.table import WorkTable

add = WorkTable.add

def add_and_wait(*arguments):
    add(*arguments)
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(1)

WorkTable.add = add_and_wait
sys.exit(main(sys.argv[2:]))
"""


def test_a_command_killed_in_its_work_and_resumed_writes_the_same_bytes(world: Path, whole: Path, tmp_path: Path):
    name = "correctness"
    line = [*arguments(world, whole)[name][:-1], str(tmp_path / f"{name}.jsonl"), "--resume"]
    command = [sys.executable, "-c", _SLOW, str(tmp_path / "kept"), *line]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = tmp_path / f"{name}.jsonl"
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "kept").exists():
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGKILL and not out.exists()
    assert main(line) == 0
    assert out.read_bytes() == (whole / f"{name}.jsonl").read_bytes()
    assert read_json(tmp_path / f"{name}.jsonl.report.json")["read"] == 4


def test_another_agent_is_not_taken_for_the_one_the_work_was_begun_with(
    world: Path, whole: Path, tmp_path: Path, capsys
):
    import shutil

    shutil.copytree(world / "agent", tmp_path / "agent")
    weights = tmp_path / "agent" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    line = [
        part.replace(str(world / "agent"), str(tmp_path / "agent")) for part in arguments(world, whole)["trajectories"]
    ]
    assert main([*line, "--resume"]) == 1
    assert "fingerprint of agent was" in capsys.readouterr().err


def test_unlabelled_questions_are_asked_but_need_a_label_for_correctness(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lines = arguments(world, tmp_path)
    asked = tmp_path / "asked.json"
    asked.write_text('[{"id": 7, "question": "Where was Ada Brook born?", "split": "test"}]')
    lines["trajectories"][2] = str(asked)
    assert main(lines["trajectories"]) == main(lines["candidates"]) == 0
    (record,) = read_records(tmp_path / "trajectories.jsonl", Trajectory)
    assert (record.id, record.golden_answers, record.em, record.f1) == ("7", (), 0, 0.0) and record.answer
    assert main(lines["exhaustive"]) == 1
    assert "candidates.jsonl: no question has golden answers" in capsys.readouterr().err
    (query,) = read_records(tmp_path / "candidates.jsonl", Candidates)
    write_records(tmp_path / "candidates.jsonl", [query, replace(query, id="8", golden_answers=("x",))])
    assert main(lines["exhaustive"]) == 0
    assert {record.id for record in read_records(tmp_path / "exhaustive.jsonl", Correctness)} == {"8"}
    assert read_json(tmp_path / "exhaustive.jsonl.report.json")["dropped"] == {"no_gold_answer": 1}
