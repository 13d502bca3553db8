"""Metrics of a step and the logs that keep them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentic_r_plugin.agent.metrics import not_finite, plain, trajectory_metrics
from agentic_r_plugin.store import StepLog


def outcome(**changes: Any) -> dict[str, Any]:
    values = {"em": 1, "f1": 1.0, "searches": 2, "malformed_turns": 0, "search_failed": 0, "masked_token_share": 0.5,
              "generated_tokens": 40, "stop_reason": "answered"}  # fmt: skip
    return values | changes


def test_means_leave_out_trajectories_whose_search_failed() -> None:
    metrics = trajectory_metrics(
        [
            outcome(),
            outcome(em=0, f1=0.5, searches=4, malformed_turns=1, masked_token_share=0.7, generated_tokens=20),
            outcome(em=0, f1=0.0, searches=9, search_failed=1, stop_reason="search_failed"),
        ]
    )
    assert metrics["agentic_r/em"] == 0.5
    assert metrics["agentic_r/f1"] == 0.75
    assert metrics["agentic_r/search_turns"] == 3
    assert metrics["agentic_r/malformed_turns"] == 0.5
    assert metrics["agentic_r/failed_searches"] == 1
    assert metrics["agentic_r/masked_token_share"] == pytest.approx(0.6)
    assert metrics["agentic_r/generated_tokens"] == 30
    assert metrics["agentic_r/stop/search_failed"] == pytest.approx(1 / 3)


def test_a_loss_or_gradient_norm_that_is_not_finite_is_found() -> None:
    metrics = {"actor/pg_loss": math.nan, "critic/grad_norm": math.inf, "critic/vf_loss": 0.1, "x/other": math.nan}
    assert not_finite(metrics) == ["actor/pg_loss", "critic/grad_norm"]


def test_only_numbers_are_logged_and_nan_becomes_null() -> None:
    found = plain({"a": np.float32(0.5), "b": np.int64(2), "c": math.nan, "d": "text", "e": True, "f": 1})
    assert found == {"a": 0.5, "b": 2, "c": None, "f": 1}


def test_a_resumed_run_never_holds_a_step_twice(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "metrics.jsonl")
    log.append({"step": step, "x": step} for step in (0, 1, 2, 3))
    with log.path.open("ab") as stream:
        stream.write(b'{"step": 4, "x"')  # killed while writing
    log.keep_until(2)
    log.append([{"step": 3, "x": 30}])
    assert log.read() == [{"step": 0, "x": 0}, {"step": 1, "x": 1}, {"step": 2, "x": 2}, {"step": 3, "x": 30}]


def test_a_run_from_scratch_begins_with_an_empty_log(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "metrics.jsonl")
    log.append([{"step": 0, "x": 1.0}])
    log.keep_until(0)
    assert log.read() == []
