"""What a training step did, in numbers, and what keeps it: `metrics.jsonl` and the files of `rollouts/`.

One line, or one file, a step. Before a run goes on from a checkpoint, those of later steps are taken out, because those
steps will be done again; so no step ever stands twice.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agentic_r_plugin.records import StopReason
from agentic_r_plugin.store import atomic_path, dump_line, read_lines

PREFIX = "agentic_r"


def trajectory_metrics(trajectories: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of one step from the agent loop's `extra_fields`.

    Trajectories whose search failed are counted in `failed_searches` (and in `stop/search_failed`) and left out of all
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
    metrics |= {f"stop/{reason.value}": stopped[reason.value] / len(trajectories) for reason in StopReason}
    return {f"{PREFIX}/{name}": value for name, value in metrics.items()}


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else 0.0


def not_finite(metrics: Mapping[str, Any]) -> list[str]:
    """Names of losses and gradient norms that are not finite numbers.

    >>> not_finite({"actor/pg_loss": float("nan"), "critic/grad_norm": 1.0, "perf/x": float("nan")})
    ['actor/pg_loss']
    """
    watched = (name for name in metrics if name.endswith(("loss", "grad_norm", "/entropy")))
    return sorted(name for name in watched if not math.isfinite(float(metrics[name])))


def plain(metrics: Mapping[str, Any]) -> dict[str, float | int | None]:
    """Numbers only, as JSON knows them; a number that is not finite becomes None."""
    result: dict[str, float | int | None] = {}
    for name, value in metrics.items():
        number = value.item() if hasattr(value, "item") and getattr(value, "size", 1) != 0 else value
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        result[name] = number if math.isfinite(number) else None
    return result


class StepLog:
    """A JSON Lines file whose records carry `step`, in rising order; every append is one write."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as stream:
            stream.write(b"".join(dump_line(record) for record in records))

    def read(self) -> list[dict[str, Any]]:
        """All records; a last line that was cut off by a kill is left out."""
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes()
        whole = lines[: lines.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.splitlines() if line.strip()]

    def has(self, step: int) -> bool:
        """Whether the step has a record."""
        return any(record["step"] == step for record in self.read())

    def keep_until(self, step: int) -> None:
        """Take out records of later steps (all of them for step 0), and a last line that was cut off."""
        if not self.path.is_file():
            return
        kept = [record for record in self.read() if step > 0 and record["step"] <= step]
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(b"".join(dump_line(record) for record in kept))


def rollout_line(item: Mapping[str, Any], step: int) -> dict[str, Any]:
    """One line of `rollouts/STEP.jsonl`, from the agent loop's `extra_fields`.

    The first five fields are those of verl's own dumps (`trainer.rollout_data_dir`); `segments` says who wrote what.
    """
    trajectory = item["trajectory"]
    verls = {
        "input": item["prompt"],
        "output": trajectory["text"],
        "gts": trajectory["golden_answers"],
        "score": float(trajectory["em"]),
        "step": step,
    }
    return verls | trajectory | {"segments": item["segments"], "trained_tokens": item["trained_tokens"]}


class RolloutLog:
    """Trajectories of each step in a file of their own, `STEP.jsonl`: the form that verl's rollout viewer opens."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def write(self, step: int, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write a step's file whole; a step done again replaces it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.folder / f"{step}.jsonl") as temporary:
            temporary.write_bytes(b"".join(dump_line(line) for line in lines))

    def steps(self) -> list[int]:
        """Steps that have a file, rising."""
        return sorted(int(file.stem) for file in self.folder.glob("*.jsonl"))

    def read(self, step: int) -> list[dict[str, Any]]:
        """The lines of one step.

        Raises:
            RecordError: no such file, or a broken line.
        """
        return [record for _, record in read_lines(self.folder / f"{step}.jsonl")]

    def keep_until(self, step: int) -> None:
        """Remove the files of later steps."""
        for later in self.steps():
            if later > step:
                (self.folder / f"{later}.jsonl").unlink()


def checkpoint_steps(root: Path) -> list[int]:
    """Steps of the checkpoint folders under `root`, rising."""
    return sorted(int(folder.name.rpartition("_")[2]) for folder in root.glob("global_step_*") if folder.is_dir())


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """All lines of a run's `metrics.jsonl`, in order of steps."""
    return [record for _, record in read_lines(Path(run) / "metrics.jsonl")]
