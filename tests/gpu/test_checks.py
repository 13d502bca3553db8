"""The script of the GPU's checks runs, in its small form, on a CPU; a check that fails or cannot be made is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import checks

SCRIPT = Path(__file__).with_name("run.sh")
EXPECTED = {
    "retriever_packing": "passed", "retriever_training": "passed", "exact_search": "passed", "hf_backend": "passed",
    "agent_attention": "passed", "detection": "passed", "encoding": "skipped", "agent_training": "passed",
    "memory_estimate": "passed", "seeded_sampling": "passed",
}  # fmt: skip
"""Without those of vLLM, which `make test-vllm` runs."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the script itself is run on a GPU")
def test_the_small_form_passes_and_writes_both_results(tmp_path: Path) -> None:
    run = subprocess.run(
        [str(SCRIPT), "--out", str(tmp_path), "--minutes", "60", "--only", *EXPECTED],
        env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    records = json.loads((tmp_path / "results.json").read_text())["checks"]
    assert {record["name"]: record["state"] for record in records} == EXPECTED
    assert records[0]["measured"]["cosine"] > 0.9999
    assert "| passed | all trajectories are equal |" in (tmp_path / "results.md").read_text()


def test_failures_and_skips_have_their_reasons_and_no_check_begins_late() -> None:
    def fails() -> checks.Outcome:
        """Fails."""
        return checks.Outcome("x", False)

    def raises() -> checks.Outcome:
        """Raises."""
        raise RuntimeError("no memory")

    def cannot() -> checks.Outcome:
        """Cannot."""
        raise checks.Skip("not installed")

    found = [(record["state"], record.get("reason")) for record in checks.run((fails, raises, cannot), 1.0)]
    assert found == [("FAILED", None), ("FAILED", "RuntimeError: no memory"), ("skipped", "not installed")]
    assert [record["reason"] for record in checks.run((fails,), -1.0)] == ["-1 minutes were over"]
