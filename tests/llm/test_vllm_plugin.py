"""The processes of a vLLM engine end with the process that opened it, whichever way they are started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from agentic_r_plugin.llm import vllm_plugin

OPENER = """
import multiprocessing, os, sys, time
from pathlib import Path
from importlib.metadata import entry_points

plugins_loaded = False

def load_general_plugins():  # once a process, as vLLM does: a forked child finds it done
    global plugins_loaded
    if not plugins_loaded:
        plugins_loaded = True
        for entry in entry_points(group="vllm.general_plugins"):
            entry.load()()

def lives(folder, name):
    load_general_plugins()
    (folder / f"{name}.part").write_text(str(os.getpid()))
    (folder / f"{name}.part").rename(folder / name)
    time.sleep(120)

def core(folder, method):
    multiprocessing.get_context(method).Process(target=lives, args=(folder, "worker"), name="VllmWorker-0").start()
    lives(folder, "core")

if __name__ == "__main__":
    folder, method = Path(sys.argv[1]), sys.argv[2]
    context = multiprocessing.get_context(method)
    load_general_plugins()
    context.Process(target=core, args=(folder, method), name="EngineCore").start()
    context.Process(target=lives, args=(folder, "other"), name="Process-7").start()
    lives(folder, "opener")
"""
NAMES = ("core", "worker", "other", "opener")


def test_vllm_finds_the_plugin():
    (entry,) = entry_points(group="vllm.general_plugins", name="agentic_r")
    assert entry.load() is vllm_plugin.register


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_an_engine_and_its_workers_end_after_a_sigkill_and_other_processes_are_left_alone(tmp_path: Path, method: str):
    script = tmp_path / "opener.py"
    script.write_text(OPENER)
    opener = subprocess.Popen([sys.executable, str(script), str(tmp_path), method], start_new_session=True)
    try:
        wait(lambda: all((tmp_path / name).exists() for name in NAMES))
        pids = {name: int((tmp_path / name).read_text()) for name in NAMES}
        assert all(map(lives, pids.values()))
        os.kill(opener.pid, signal.SIGKILL)
        opener.wait()
        wait(lambda: not lives(pids["core"]) and not lives(pids["worker"]))
        assert lives(pids["other"])
    finally:
        os.killpg(opener.pid, signal.SIGKILL)


ENDING = """
import atexit, multiprocessing, os, sys, time
from importlib.metadata import entry_points

def engine():
    atexit.register(time.sleep, 600)  # runs after what the plugin registers, as the end of the interpreter does
    for entry in entry_points(group="vllm.general_plugins"):
        entry.load()()
    from agentic_r_plugin.llm import vllm_plugin
    vllm_plugin._END_S = 1
    raise RuntimeError("no memory")

if __name__ == "__main__":
    started = multiprocessing.get_context("spawn").Process(target=engine, name="EngineCore")
    started.start()
    started.join(300)
    print(started.exitcode)
    os._exit(0)
"""


def test_an_engine_that_failed_and_cannot_end_is_ended(tmp_path: Path):
    script = tmp_path / "opener.py"
    script.write_text(ENDING)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert "RuntimeError: no memory" in run.stderr and run.stdout.split() == [str(-signal.SIGALRM)]


def lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait(reached, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)
