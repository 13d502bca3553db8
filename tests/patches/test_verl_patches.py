"""Each patch, applied to the released sources, cures its fault, and the run-time hook gives the same."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agentic_r_plugin.agent import hooks
from agentic_r_plugin.agent.cpu import hooks as cpu_hooks

ROOT = Path(__file__).resolve().parents[2]
HOOKS = (*hooks.HOOKS, *cpu_hooks.HOOKS)
PATCHES = sorted((ROOT / "patches").glob("verl-*.patch"))
EXPECTED = {
    "process_group": "cpu:gloo",
    "valuehead_attention": "Qwen2ForTokenClassification sdpa",
    "rollout_registry": "HFServerAdapter",
    "pageable_offload": "cpu",
}
FAULT = {
    "process_group": "uplicate",
    "valuehead_attention": "value head",
    "rollout_registry": "Rollout hf",
    "pageable_offload": "accelerator",
}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _probe(folder: Path, *, plugins: str, verl_parent: Path | None = None) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    path = [str(entry) for entry in (verl_parent, ROOT) if entry is not None]
    environment = {
        **os.environ,
        "AGENTIC_R_CPU": "1",
        "VERL_USE_EXTERNAL_PLUGINS": plugins,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("probe.py")), str(folder), str(_free_port())],
        env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=folder,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


def _verl_source() -> Path:
    spec = importlib.util.find_spec("verl")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The released sources, without hooks."""
    return _probe(tmp_path_factory.mktemp("before"), plugins="none")


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A copy of the released sources with all patches applied, without hooks."""
    folder = tmp_path_factory.mktemp("after")
    parent = folder / "site"
    shutil.copytree(_verl_source(), parent / "verl", ignore=shutil.ignore_patterns("__pycache__"))
    for patch in PATCHES:
        subprocess.run(["git", "apply", "-p1", str(patch)], cwd=parent, check=True)
    outcomes = _probe(folder / "probe", plugins="none", verl_parent=parent)
    assert Path(outcomes["verl"]).is_relative_to(parent)
    return outcomes


@pytest.fixture(scope="module")
def hooked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The released sources, with our hooks."""
    return _probe(tmp_path_factory.mktemp("hooked"), plugins="agentic_r")


@pytest.mark.parametrize("probe", sorted(EXPECTED))
def test_released_verl_has_the_fault(before: dict[str, str], probe: str) -> None:
    assert before[probe].startswith("fault:")
    assert FAULT[probe] in before[probe]


@pytest.mark.parametrize("probe", sorted(EXPECTED))
def test_the_patch_cures_the_fault(after: dict[str, str], probe: str) -> None:
    assert after[probe] == EXPECTED[probe]


@pytest.mark.parametrize("probe", sorted(EXPECTED))
def test_the_hook_gives_the_same_as_the_patch(hooked: dict[str, str], after: dict[str, str], probe: str) -> None:
    assert hooked[probe] == after[probe]


def test_every_patch_belongs_to_a_hook_and_says_why_and_until_when() -> None:
    assert {hook.patch for hook in HOOKS} == {f"patches/{patch.name}" for patch in PATCHES}
    for hook in HOOKS:
        header = (ROOT / hook.patch).read_text().partition("--- a/")[0]
        assert "Why:" in header and "Can go:" in header
        assert f"Stands in for it: {hook.install.__module__}.{hook.install.__name__}" in header
        assert all(f"verl {version}" in header for version in hook.versions)
