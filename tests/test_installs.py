"""What the extras and the lock resolve to: the package index is asked, nothing is downloaded or installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements-gpu.txt"
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", re.MULTILINE)


@pytest.fixture(scope="module")
def uv() -> str:
    found = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    if not Path(found).is_file():
        pytest.skip("uv, which resolves without downloading, is not installed (pip install uv)")
    return found


def pins(text: str) -> dict[str, str]:
    return dict(PIN.findall(text))


def resolved(uv: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(
        [uv, "pip", "compile", "pyproject.toml", "--python-platform", "x86_64-unknown-linux-gnu", "--no-header",
         "--no-annotate", *arguments], capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    if run.returncode and re.search(
        r"(dns error|error sending request|timed out|Failed to fetch|Could not connect)", run.stderr
    ):
        pytest.skip(f"the package index does not answer: {run.stderr.strip().splitlines()[-1]}")
    return run


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_lock_is_what_the_extras_for_accelerators_resolve_to(uv: str, python: str) -> None:
    run = resolved(uv, "--python-version", python, "--extra", "gpu", "--extra", "vllm", "-c", str(LOCK))
    assert run.returncode == 0, run.stderr[-2000:]
    locked, found = pins(LOCK.read_text()), pins(run.stdout)
    assert len(found) > 200 and found.items() <= locked.items()


@pytest.mark.parametrize("extras", [("cpu", "quickstart", "test"), ("gpu", "vllm", "quickstart")], ids="+".join)
def test_extras_that_go_together_resolve_with_one_faiss(uv: str, extras: tuple[str, ...]) -> None:
    run = resolved(uv, "--python-version", "3.11", *(f"--extra={extra}" for extra in extras))
    assert run.returncode == 0, run.stderr[-2000:]
    assert [name for name in pins(run.stdout) if name.startswith("faiss")] == [
        "faiss-gpu-cu12" if "gpu" in extras else "faiss-cpu"
    ]


def test_the_lock_has_a_hash_for_every_pin_and_verls_own_engine() -> None:
    text = LOCK.read_text()
    entries = re.split(r"\n(?=[A-Za-z0-9])", text)[1:]
    assert all("--hash=sha256:" in entry for entry in entries) and len(entries) == len(pins(text))
    assert {name: pins(text)[name] for name in ("verl", "vllm", "torch")} == {
        "verl": "0.9.1", "vllm": "0.24.0", "torch": "2.11.0",
    }  # fmt: skip
