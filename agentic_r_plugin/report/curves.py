"""The report's training curves, data construction and costs as plain values. The templates only do the layout."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from agentic_r_plugin.report.charts import Points, Series, line_chart
from agentic_r_plugin.report.run_folder import Iteration, RunFolder

Steps = Sequence[Mapping[str, Any]]
Range = tuple[float | None, float | None]


def percent(value: float) -> str:
    """A share as a percentage.

    >>> percent(0.5)
    '50 %'
    """
    return f"{value * 100:.0f} %"


# --- Curves -----------------------------------------------------------------------------------------------------------

_AGENT_CHARTS: tuple[tuple[str, str, tuple[str, ...], Range], ...] = (
    ("Training exact match", "EM", ("agentic_r/em", "critic/score/mean"), (0, None)),
    ("Held-out exact match", "EM", (), (0, None)),
    ("Search turns", "searches per question", ("agentic_r/search_turns",), (0, None)),
    ("Reward (with KL penalty)", "reward", ("critic/rewards/mean", "critic/score/mean"), (None, None)),
    ("Policy loss", "loss", ("actor/pg_loss",), (None, None)),
    ("Critic loss", "value loss", ("critic/vf_loss",), (0, None)),
    ("Entropy", "nats", ("actor/entropy", "actor/entropy_loss"), (None, None)),
    ("KL to the reference policy", "KL", ("actor/reward_kl_penalty", "actor/kl_loss", "actor/ppo_kl"), (None, None)),
    ("Malformed turns", "per trajectory", ("agentic_r/malformed_turns",), (0, None)),
)
"""Title, unit, log keys, range of the y axis. The first key in the log is used; no key means verl's validation."""

_RETRIEVER_CHARTS: tuple[tuple[str, str, str, Range], ...] = (
    ("Contrastive loss", "loss", "loss", (0, None)),
    ("Positive ranked first in the batch", "share", "accuracy", (0, 1)),
)

_HELD_OUT = re.compile(r"^val-(?:core|aux)/.*/(?:em|acc|reward)/mean@\d+$")


def agent_charts(iterations: Sequence[Iteration]) -> list[dict[str, str]]:
    """Curves of PPO, one iteration after another."""
    logs = [iteration.agent_steps for iteration in iterations]
    charts = []
    for title, unit, keys, y_range in _AGENT_CHARTS:
        key = _held_out_key(logs) if not keys else next((key for key in keys if _has(logs, key)), None)
        if key is not None:
            charts.append(_chart(title, unit, iterations, logs, key, y_range, marked=not keys))
    named = dict.fromkeys(key for log in logs for line in log for key in line if key.startswith("agentic_r/reward/"))
    for key in named:
        title = f"Reward: {key.rpartition('/')[2].replace('_', ' ')}, before its weight"
        charts.append(_chart(title, "mean", iterations, logs, key, (None, None)))
    return charts


def _has(logs: Sequence[Steps], key: str) -> bool:
    return any(_points(steps, key) for steps in logs)


def _held_out_key(logs: Sequence[Steps]) -> str | None:
    """Log key of verl's validation; `em` if there is one."""
    keys = sorted({key for steps in logs for step in steps for key in step if _HELD_OUT.match(key)})
    return next((key for key in keys if "/em/" in key), keys[0] if keys else None)


def retriever_charts(iterations: Sequence[Iteration]) -> list[dict[str, str]]:
    """Loss of the retriever, and its in-batch accuracy if it was logged."""
    logs = [iteration.retriever_steps for iteration in iterations]
    return [
        _chart(title, unit, iterations, logs, key, y_range)
        for title, unit, key, y_range in _RETRIEVER_CHARTS
        if _has(logs, key)
    ]


def _points(steps: Steps, key: str) -> list[tuple[float, float]]:
    found = ((step.get("step"), step.get(key)) for step in steps)
    return [(float(x), float(y)) for x, y in found if x is not None and y is not None and math.isfinite(y)]


def _chart(
    title: str,
    unit: str,
    iterations: Sequence[Iteration],
    logs: Sequence[Steps],
    key: str,
    y_range: Range,
    *,
    marked: bool = False,
) -> dict[str, str]:
    """One curve per iteration; each starts where the previous one ended."""
    series, shift = [], 0.0
    for i, (iteration, steps) in enumerate(zip(iterations, logs, strict=True)):
        points = _points(steps, key)
        series.append(Series(name=f"iteration {iteration.number}", points=points, color=i, marked=marked, shift=shift))
        # The length of the whole log, not of this curve: all charts get the same x axis.
        shift += max((float(step["step"]) for step in steps if "step" in step), default=0.0)
    return {"title": title, "svg": line_chart(title, series, x_label="step", y_label=unit, y_range=y_range)}


# --- Data construction ------------------------------------------------------------------------------------------------


def positives_charts(iterations: Sequence[Iteration]) -> list[dict[str, str]]:
    """Share of queries with a training group, by iteration and by turn of the query."""
    by_iteration: Points = [
        (float(it.number), it.stages["groups"]["kept"] / it.stages["groups"]["read"])
        for it in iterations
        if it.stages.get("groups", {}).get("read")
    ]
    by_turn = [
        Series(
            name=f"iteration {it.number}",
            points=[(float(turn), share) for turn, share in it.positives_by_turn.items()],
            color=i,
            marked=True,
        )
        for i, it in enumerate(iterations)
    ]
    charts = []
    for title, series, x_label in (
        ("Queries with a positive", [Series(name="share", points=by_iteration, marked=True)], "iteration"),
        ("Queries with a positive, by turn", by_turn, "turn of the query"),
    ):
        svg = line_chart(title, series, x_label=x_label, y_label="share", y_range=(0, None), number=percent)
        charts.append({"title": title, "svg": svg})
    return [chart for chart in charts if chart["svg"]]


# --- Cost -------------------------------------------------------------------------------------------------------------


def cost_rows(run: RunFolder) -> tuple[list[dict[str, Any]], list[str]]:
    """The cost lines of all phases, and the names of the cost columns that at least one phase has."""
    work = ("rollouts", "searches", "prompt_tokens", "cached_tokens", "generated_tokens")
    known = (*work, "judge_requests", "judge_prompt_tokens", "judge_generated_tokens")
    columns = [name for name in known if any(line.get(name) for line in run.costs)]
    longest = max((line.get("seconds", 0.0) for line in run.costs), default=0.0) or 1.0
    rows = [dict(line) | {"width": 100 * line.get("seconds", 0.0) / longest} for line in run.costs]
    for row in rows:
        if row.get("cache_unknown_tokens") and not row.get("cached_tokens"):
            row.pop("cached_tokens", None)  # unknown, not 0
    return rows, columns
