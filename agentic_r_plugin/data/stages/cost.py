"""Cost of a stage: totals, shares, means per unit, and a forecast from a sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

HIT_RATES = {
    "prefix_hit_rate": ("cached_tokens", "prompt_tokens"),
    "judge_prefix_hit_rate": ("judge_cached_tokens", "judge_prompt_tokens"),
    "pruned_share": ("pruned", "candidates"),
    "reused_share": ("reused", "candidates"),
}
"""Share -> (part, whole) among the counts."""

_UNKNOWN = {"prefix_hit_rate": "cache_unknown_tokens", "judge_prefix_hit_rate": "judge_cache_unknown_tokens"}
"""Share -> the count of tokens for which the server does not report the part."""


def summary(spent: Mapping[str, float], units: int) -> dict[str, Any]:
    """Totals, the shares that the counts allow (None: unknown), and the means per unit (`per_unit`)."""
    totals = {key: round(value, 3) for key, value in sorted(spent.items())}
    shares = {
        # Some servers leave out a count of 0, so a prompt without one is of unknown share only if no prompt has any.
        name: round(totals[part] / totals[whole], 4) if totals[part] or not totals.get(_UNKNOWN.get(name, "")) else None
        for name, (part, whole) in HIT_RATES.items()
        if totals.get(whole) and part in totals
    }
    per_unit = {key: round(value / units, 4) for key, value in totals.items()} if units else {}
    return totals | shares | {"per_unit": per_unit}


def forecast(batches: Sequence[tuple[int, Mapping[str, float]]], total: int) -> dict[str, Any]:
    """Forecast the cost of all units from batches of a sample.

    Args:
        batches: (units, cost) of each batch.
        total: number of all units.

    Returns:
        `sample`, `total`, and for each count `expected`, `low` and `high`: the sample mean times `total`, and its 95 %
        interval (1.96 standard errors), with batches as clusters.

    >>> forecast([(2, {"rollouts": 4}), (2, {"rollouts": 6})], 100)["expected"]
    {'rollouts': 250.0}
    """
    units = sum(count for count, _ in batches)
    names = sorted({name for _, spent in batches for name in spent})
    expected, low, high = {}, {}, {}
    for name in names:
        mean = sum(spent.get(name, 0.0) for _, spent in batches) / units
        deviations = [spent.get(name, 0.0) - mean * count for count, spent in batches]
        clusters = len(batches)
        correction = clusters / (clusters - 1) if clusters > 1 else math.nan
        error = 1.96 * math.sqrt(correction * sum(d * d for d in deviations)) / units
        if clusters < 2:
            error = mean
        expected[name] = round(mean * total, 1)
        low[name], high[name] = round(max(0.0, mean - error) * total, 1), round((mean + error) * total, 1)
    return {"sample": units, "total": total, "expected": expected, "low": low, "high": high}


def forecast_table(made: Mapping[str, Any]) -> str:
    """A forecast as readable text."""
    lines = [f"{made['stage']}: forecast for {made['total']:,} units from {made['sample']:,} of them (95 % interval)"]
    for name, value in made["expected"].items():
        lines.append(f"  {name:24} {value:16,.0f}   {made['low'][name]:,.0f} to {made['high'][name]:,.0f}")
    return "\n".join(lines)
