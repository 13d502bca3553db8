"""A command in separate processes: its result, its faults, and its end with the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from agentic_r_plugin import child
from agentic_r_plugin.errors import AgenticRError, RecordError
from agentic_r_plugin.retriever.training import TrainRetrieverConfig
from agentic_r_plugin.store import read_json
from agentic_r_plugin.world.generate import WorldConfig


def test_a_command_does_its_work_in_a_separate_process(tmp_path: Path):
    child.run_command("world", WorldConfig(out=str(tmp_path), name="w", train_questions=4, dev_questions=2))
    assert len((tmp_path / "w" / "train.jsonl").read_text().splitlines()) == 4


def test_what_one_of_several_raises_is_raised_here(tmp_path: Path, capfd: pytest.CaptureFixture):
    (tmp_path / "groups.jsonl").write_text('{"schema": "group/1", "id": \n')
    (tmp_path / "corpus.jsonl").write_text('{"id": "1", "contents": "\\"A\\"\\ntext"}\n')
    config = TrainRetrieverConfig(
        groups=str(tmp_path / "groups.jsonl"), corpus=str(tmp_path / "corpus.jsonl"), out=str(tmp_path / "out")
    )
    with pytest.raises(RecordError, match=r"groups\.jsonl:1"):
        child.run_command("train-retriever", config, processes=2)
    assert "Traceback" not in capfd.readouterr().err and not (tmp_path / "out").exists()


def test_a_fault_that_is_a_third_partys_own_is_raised_as_the_base_of_all():
    found = [child._fault_of(name) for name in ("RecordError", "TheirOwnError", "Path")]
    assert found == [RecordError, AgenticRError, AgenticRError]


PARENT = """
import sys
from agentic_r_plugin import child
from agentic_r_plugin.search.service.server import ServeConfig
child.run_command("serve", ServeConfig(backend="bm25", corpus=sys.argv[1], port=0, ready_file=sys.argv[2]))
"""


def test_it_ends_soon_after_the_process_that_started_it_was_killed(tmp_path: Path):
    corpus, ready = tmp_path / "corpus.jsonl", tmp_path / "ready.json"
    corpus.write_text('{"id": "1", "contents": "\\"A\\"\\nsome text of a passage"}\n')
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(corpus), str(ready)])
    try:
        _wait(ready.is_file)
        pid = read_json(ready)["pid"]
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        _wait(lambda: not _lives(pid))
    finally:
        parent.kill()
        parent.wait()


FAMILY = """
import os, signal, subprocess, sys, time
from agentic_r_plugin import child
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit an ignored SIGINT
if len(sys.argv) > 1:
    import ray
    child.die_with(os.getppid(), family=True)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)

    @ray.remote
    class Actor:
        def sleep(self):
            open(os.environ["FAMILY_READY"], "w").close()
            time.sleep(300)

    ray.get(Actor.remote().sleep.remote())
with child.family():
    command = [sys.executable, "-c", open(os.environ["FAMILY_CODE"]).read(), os.environ["FAMILY_READY"]]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        process.wait()
    finally:
        child.end(process)
"""


@pytest.mark.parametrize("how", ["interrupt to the group", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_of_a_command_that_was_ended_not_even_of_ray(tmp_path: Path, how: str):
    code, ready, started = tmp_path / "code.py", tmp_path / "ready", []
    code.write_text(FAMILY)
    settings = {"FAMILY_CODE": str(code), "FAMILY_READY": str(ready)}
    parent = subprocess.Popen(
        [sys.executable, str(code)], env={**os.environ, **settings}, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        _wait(ready.is_file, seconds=120)
        before = " ".join(" ".join(item.cmdline()) for item in _descendants(parent.pid))
        assert all(name in before for name in ("gcs_server", "raylet", "RuntimeEnvAgent", "ray::Actor"))
        started = _descendants(parent.pid)
        if how == "interrupt to the group":
            os.killpg(parent.pid, signal.SIGINT)
        else:
            os.kill(parent.pid, signal.Signals[how])
        parent.wait(10)
        _, alive = psutil.wait_procs(started, timeout=10)
        assert not alive
    finally:
        for process in started:
            with suppress(psutil.Error):
                process.kill()
        parent.kill()
        parent.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait(reached, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)
