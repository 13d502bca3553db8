"""Save the batch that produced a non-finite loss, for debugging.

The folder `culprits/step_N/` holds `batch.pt` (the keys, and for each field one tensor per trajectory),
`trajectories.jsonl` and, written last, `report.json`: the non-finite metrics, and for each field its range and the
trajectories with non-finite values. If all fields are finite, the update itself failed: check the ranges and the
learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentic_r_plugin.agent.metrics import not_finite
from agentic_r_plugin.store import atomic_path, dump_line, write_json

FIELDS = (
    "prompts",
    "responses",
    "response_mask",
    "rollout_log_probs",
    "old_log_probs",
    "ref_log_prob",
    "values",
    "rm_scores",
    "token_level_rewards",
    "advantages",
    "returns",
)
"""Fields saved for each trajectory; those that the algorithm does not produce are left out."""


def write_culprit(
    folder: Path,
    keys: Sequence[str],
    fields: Mapping[str, Sequence[Any]],
    trajectories: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    *,
    step: int,
) -> None:
    """Write the folder; each field holds one tensor per key."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "batch.pt") as temporary:
        torch.save({"keys": list(keys), "fields": {name: list(rows) for name, rows in fields.items()}}, temporary)
    with atomic_path(folder / "trajectories.jsonl") as temporary:
        temporary.write_bytes(b"".join(dump_line({"step": step, **item["trajectory"]}) for item in trajectories))
    report = {
        "step": step,
        "not_finite": not_finite(metrics),
        "fields": {name: field_report(keys, rows) for name, rows in fields.items()},
    }
    write_json(folder / "report.json", report)


def field_report(keys: Sequence[str], rows: Sequence[Any]) -> dict[str, Any]:
    """Range of a field's finite values, and the keys of the rows with non-finite values."""
    bad = [key for key, row in zip(keys, rows, strict=True) if not bool(row.isfinite().all())]
    finite = [row[row.isfinite()] for row in rows]
    lows = [float(row.min()) for row in finite if row.numel()]
    highs = [float(row.max()) for row in finite if row.numel()]
    return {"min": min(lows, default=None), "max": max(highs, default=None), "not_finite_in": bad}
