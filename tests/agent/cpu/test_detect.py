"""The CPU parts are active where nothing else is, and never on a machine with an accelerator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from agentic_r_plugin.agent.cpu.detect import SWITCH, accelerator, cpu_wanted
from agentic_r_plugin.errors import ConfigError


@pytest.mark.parametrize(("choice", "wanted"), [("1", True), ("0", False)])
def test_the_switch_decides(monkeypatch: pytest.MonkeyPatch, choice: str, wanted: bool) -> None:
    monkeypatch.setenv(SWITCH, choice)
    assert cpu_wanted() is wanted


def test_a_switch_with_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "maybe")
    with pytest.raises(ConfigError, match="AGENTIC_R_CPU=maybe"):
        cpu_wanted()


def test_a_platform_named_by_the_user_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setenv("VERL_PLATFORM", "nvidia")
    assert cpu_wanted() is False


def test_an_accelerator_seen_by_verl_keeps_the_cpu_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.plugin.platform.platform_cuda import PlatformCUDA

    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(PlatformCUDA, "is_platform_available", lambda self, use_smi_check=False: use_smi_check)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert cpu_wanted() is False


def test_a_torch_for_cpus_trains_on_the_cpu_though_nvidia_smi_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stub = tmp_path / "nvidia-smi"
    stub.write_text("#!/bin/sh\nexit 0\n")
    stub.chmod(0o755)
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("torch.version.cuda", None)
    assert (accelerator(), cpu_wanted()) == ("nvidia", True)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert cpu_wanted() is False


def test_the_recipes_for_a_cpu_train_on_it_on_every_machine() -> None:
    recipes = Path(__file__).parents[3] / "recipes"
    assert OmegaConf.load(recipes / "quickstart" / "loop.yaml").train_agent.cpu is True
    assert OmegaConf.load(recipes / "hotpotqa_cpu" / "ppo.yaml").cpu is True


REPORT = """
import json, os, sys
import verl
from verl.plugin.platform import get_platform
from verl.workers.rollout import base
from agentic_r_plugin.agent import verl_plugin
print("\\n" + json.dumps([get_platform().device_name, ("hf", "async") in base._ROLLOUT_REGISTRY, verl_plugin.check()]))
"""


def report(**environment: str) -> list[object]:
    import json

    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REPORT],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return json.loads(run.stdout.strip().splitlines()[-1])


def test_importing_verl_registers_everything_where_the_cpu_is_wanted() -> None:
    assert report(AGENTIC_R_CPU="1") == ["cpu", True, []]


def test_nothing_of_verl_is_touched_where_the_cpu_is_not_wanted() -> None:
    assert report(AGENTIC_R_CPU="0", VERL_PLATFORM="nvidia") == ["cuda", False, []]


def test_a_plugin_that_verl_did_not_load_is_missed_loudly() -> None:
    code = (
        "import verl.plugin.platform.platform_manager as m, agentic_r_plugin.agent.cpu.platform as p, os\n"
        "p.register = lambda: None\n"
        "from agentic_r_plugin.agent import verl_plugin\n"
        "verl_plugin.assert_registered()\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "AGENTIC_R_CPU": "1", "VERL_USE_EXTERNAL_PLUGINS": "none"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert "UpstreamError: the verl plugin of agentic-r is not in place: verl's platform is 'cuda'" in run.stderr
