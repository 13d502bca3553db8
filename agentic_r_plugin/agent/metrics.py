"""Metrics of each training step, and the rollouts of each step in `rollouts/`, one file per step.

Before a run resumes from a checkpoint, the files of later steps are removed, because those steps are repeated. No step
is therefore recorded twice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentic_r_plugin.records import StopReason
from agentic_r_plugin.store import atomic_path, dump_line, read_lines

PREFIX = "agentic_r"


def trajectory_metrics(trajectories: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the metrics of one step from the agent loop's `extra_fields`.

    Trajectories whose search failed are counted in `failed_searches` and `stop/search_failed`, and excluded from all
    means.
    """
    valid = [item for item in trajectories if not item["search_failed"]]
    stopped = Counter(item["stop_reason"] for item in trajectories)
    metrics = {
        "em": _mean(item["em"] for item in valid),
        "f1": _mean(item["f1"] for item in valid),
        "search_turns": _mean(item["searches"] for item in valid),
        "malformed_turns": _mean(item["malformed_turns"] for item in valid),
        "malformed_share": _mean(item["malformed_turns"] > 0 for item in valid),
        "failed_searches": float(len(trajectories) - len(valid)),
        "masked_token_share": _mean(item["masked_token_share"] for item in valid),
        "generated_tokens": _mean(item["generated_tokens"] for item in valid),
        "trajectories": float(len(trajectories)),
    }
    if any("reward_parts" in item for item in valid):
        metrics["reward"] = _mean(item["reward"] for item in valid)
        names = dict.fromkeys(name for item in valid for name in item["reward_parts"])
        metrics |= {f"reward/{name}": _mean(item["reward_parts"].get(name, 0.0) for item in valid) for name in names}
    metrics |= {f"stop/{reason.value}": stopped[reason.value] / len(trajectories) for reason in StopReason}
    return {f"{PREFIX}/{name}": value for name, value in metrics.items()}


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else 0.0


def not_finite(metrics: Mapping[str, Any]) -> list[str]:
    """Names of the losses, gradient norms and entropies that are not finite.

    >>> not_finite({"actor/pg_loss": float("nan"), "critic/grad_norm": 1.0, "perf/x": float("nan")})
    ['actor/pg_loss']
    """
    watched = (name for name in metrics if name.endswith(("loss", "grad_norm", "/entropy")))
    return sorted(name for name in watched if not math.isfinite(float(metrics[name])))


def plain(metrics: Mapping[str, Any]) -> dict[str, float | int | None]:
    """Keep only numbers, as JSON values; a non-finite number becomes None."""
    result: dict[str, float | int | None] = {}
    for name, value in metrics.items():
        number = value.item() if hasattr(value, "item") and getattr(value, "size", 1) != 0 else value
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        result[name] = number if math.isfinite(number) else None
    return result


def rollout_line(item: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Build one line of `rollouts/STEP.jsonl` from the agent loop's `extra_fields`.

    The first five fields are those of verl's own dumps (`trainer.rollout_data_dir`); `segments` records the author of
    each piece of text.
    """
    trajectory = item["trajectory"]
    verls = {
        "input": item["prompt"],
        "output": trajectory["text"],
        "gts": trajectory["golden_answers"],
        # A trajectory restored from the checkpoint of an earlier version has no reward where it was exact match alone.
        "score": float(item.get("reward", trajectory["em"])),
        "step": step,
    }
    parts = {"reward": item["reward_parts"]} if "reward_parts" in item else {}
    return verls | trajectory | parts | {"segments": item["segments"], "trained_tokens": item["trained_tokens"]}


class RolloutLog:
    """One file of trajectories per step, `STEP.jsonl`, in the format that verl's rollout viewer opens."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def write(self, step: int, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write the file of a step atomically, replacing an existing one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.folder / f"{step}.jsonl") as temporary:
            temporary.write_bytes(b"".join(dump_line(line) for line in lines))

    def steps(self) -> list[int]:
        """Steps that have a file, in ascending order."""
        return sorted(int(file.stem) for file in self.folder.glob("*.jsonl"))

    def read(self, step: int) -> list[dict[str, Any]]:
        """Read the lines of one step.

        Raises:
            RecordError: the file is missing, or a line is broken.
        """
        return [record for _, record in read_lines(self.folder / f"{step}.jsonl")]

    def keep_until(self, step: int) -> None:
        """Remove the files of later steps."""
        for later in self.steps():
            if later > step:
                (self.folder / f"{later}.jsonl").unlink()
