"""A command in processes of its own: its result, its faults, and its end with the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentic_r_plugin import child
from agentic_r_plugin.errors import AgenticRError, RecordError
from agentic_r_plugin.retriever.training import TrainRetrieverConfig
from agentic_r_plugin.store import read_json
from agentic_r_plugin.world.generate import WorldConfig


def test_a_command_does_its_work_in_a_process_of_its_own(tmp_path: Path):
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
from agentic_r_plugin.search.server import ServeConfig
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
