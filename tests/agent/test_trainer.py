"""What the trainer adds around verl's step; the whole of it runs in `test_ppo_end_to_end.py`."""

from __future__ import annotations

import math
from typing import Any

import pytest
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from agentic_r_plugin.agent.trainer import AgenticPPOTrainer, by_length_within
from agentic_r_plugin.errors import TrainingError


def test_a_loss_that_is_not_finite_stops_before_anything_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Any, metrics: dict[str, Any], timing_raw: dict[str, float]) -> str:
        metrics.update({"actor/pg_loss": math.nan, "critic/vf_loss": 0.5})
        return "batch"

    monkeypatch.setattr(PPOTrainerSync, "step", step)
    trainer = AgenticPPOTrainer.__new__(AgenticPPOTrainer)
    trainer.global_steps = 7
    with pytest.raises(TrainingError, match="step 7: actor/pg_loss not finite; nothing of it was saved"):
        trainer.step({}, {})


def test_no_row_leaves_its_mini_batch_when_rows_are_put_in_order_of_length() -> None:
    rows = [(9, "a"), (3, "b"), (5, "c"), (2, "d"), (8, "e")]
    ordered = by_length_within(rows, 3, length=lambda row: row[0])
    assert ordered == [(3, "b"), (5, "c"), (9, "a"), (2, "d"), (8, "e")]
