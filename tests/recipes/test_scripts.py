"""The scripts of the recipes, started as a user starts them: an error that the user can mend is one paragraph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("judge/train.py", "--out out --base builtin:nowhere", "judge/train.py: unknown built-in retriever"),
        (
            "retriever/hotpotqa.py",
            "--data nowhere --out out --model m=builtin:minilm",
            "hotpotqa.py: split 'train': no nowhere/train.jsonl",
        ),
        (
            "retriever/elsewhere.py",
            "--trained nowhere --set a=nowhere --out out",
            "elsewhere.py: split 'test': no nowhere/test.jsonl",
        ),
        ("retriever/make_groups.py", "--data nowhere --out out", "make_groups.py: split 'train'"),
        ("retriever/agent_queries.py", "--questions nowhere a=b", "agent_queries.py: nowhere: no such file"),
        ("agentic_r/prepare_data.py", "--data-dir nowhere --out out", "prepare_data.py: split 'train'"),
        ("evaluation/run_exp.py", "--dataset_name toy --config nowhere.yaml", "run_exp.py: nowhere.yaml: no such file"),
    ],
)
def test_a_wrong_name_is_one_paragraph(script: str, arguments: str, message: str, tmp_path: Path) -> None:
    command = [sys.executable, str(RECIPES / script), *arguments.split()]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert run.returncode == 1, run.stderr
    assert run.stderr.splitlines()[-1].startswith(message) and "Traceback" not in run.stderr
