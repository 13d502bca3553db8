"""Detect the collapse of a training run and choose the checkpoint to export (method section 6).

The paper selects "the last stable checkpoint" by hand. Here a rule over the lines of `metrics.jsonl` selects it:

1. A step is unstable if the mean of a watched metric over the last `window` steps breaks its bound. Reward and
   malformed share are compared with the best such mean so far; length, searches, entropy and gradient norm with the
   mean of the first `window` steps; KL with a fixed bound. A non-finite value makes its step unstable at once.
2. Training has collapsed once `patience` steps in a row are unstable; the collapse is dated to the first of them.
3. The last stable checkpoint is the newest one before the collapse, or the newest of all without a collapse.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentic_r_plugin.config import check_least, setting
from agentic_r_plugin.errors import ConfigError, TrainingError

WATCHED = {
    "reward": ("critic/score/mean", "agentic_r/em"),
    "kl": ("actor/reward_kl_penalty", "actor/kl_loss"),
    "entropy": ("actor/entropy", "actor/entropy_loss"),
    "response_length": ("response_length/mean",),
    "searches": ("agentic_r/search_turns",),
    "malformed": ("agentic_r/malformed_share",),
    "gradient_norm": ("actor/grad_norm",),
}
"""Watched quantity -> names of the metrics that hold it; the first one present is used."""

_MAX_REWARD_DROP, _MIN_REWARD = 0.5, 0.05
"""Share of the best mean reward that may be lost, and the best mean below which a drop is noise."""
_MAX_MALFORMED_RISE = 0.4
"""Of the share of trajectories with a malformed turn, above its lowest mean."""
_MAX_FACTOR = {"entropy": 5.0, "response_length": 3.0, "searches": 3.0, "gradient_norm": 100.0}
_MIN_ENTROPY = 0.02
"""Bounds relative to the mean of the first steps."""

ACTIONS = ("finish", "stop")


class CollapseError(TrainingError):
    """Training collapsed and stops; earlier checkpoints are kept."""


@dataclass(frozen=True, kw_only=True)
class StabilityRule:
    """When a training has collapsed. The other bounds are wide and fixed."""

    window: int = setting("steps whose mean is judged", default=5)
    patience: int = setting("unstable steps in a row that make a collapse", default=5)
    max_kl: float | None = setting("mean KL to the starting agent, per token; none: not watched", default=1.0)
    on_collapse: str = setting(
        "finish (train on to the last step) or stop; the last stable checkpoint is exported", default="finish"
    )

    def __post_init__(self) -> None:
        check_least(self, "stability.", window=1, patience=1)
        if self.on_collapse not in ACTIONS:
            raise ConfigError(f"stability.on_collapse={self.on_collapse!r}: expected one of {', '.join(ACTIONS)}")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Result of the stability rule for the steps so far."""

    reasons: Mapping[int, tuple[str, ...]]
    """Unstable step -> the bounds it broke."""
    collapse: int | None
    """First step of the collapse; None without a collapse."""
    doubtful_from: int | None
    """First step of the collapse, or of the unstable steps at the end; later checkpoints are not trusted yet."""

    def describe(self) -> str:
        """Describe the collapse in words."""
        if self.collapse is None:
            return "no collapse"
        return f"collapse at step {self.collapse}: {'; '.join(self.reasons[self.collapse])}"


def judge(records: Sequence[Mapping[str, Any]], rule: StabilityRule) -> Verdict:
    """Apply the rule to the steps of a run; lines without a reward (validation) are skipped.

    Args:
        records: lines of `metrics.jsonl`, in order of steps; non-finite numbers are stored as None.
    """
    watched = [(int(record["step"]), found) for record in records if "reward" in (found := _watched(record))]
    steps = [found for _, found in watched]
    # Each step is judged on the steps up to it only, so that the verdict on a step never changes later.
    reasons = {step: _broken(steps[: end + 1], rule) for end, (step, _) in enumerate(watched)}
    collapse = None
    in_a_row: list[int] = []
    for step, broken in reasons.items():
        in_a_row = [*in_a_row, step] if broken else []
        if len(in_a_row) == rule.patience and collapse is None:
            collapse = in_a_row[0]
    # Unstable steps at the end may still become a collapse: until that is known, checkpoints since then are in doubt.
    doubtful = collapse if collapse is not None else next(iter(in_a_row), None)
    return Verdict(
        reasons={step: broken for step, broken in reasons.items() if broken}, collapse=collapse, doubtful_from=doubtful
    )


def last_stable(checkpoints: Sequence[int], verdict: Verdict) -> int:
    """Return the step of the checkpoint to export.

    Raises:
        TrainingError: there is no checkpoint, or training collapsed before the first one.
    """
    # The collapse is dated to its first unstable step, so a checkpoint of that very step is not stable.
    stable = [step for step in checkpoints if verdict.collapse is None or step < verdict.collapse]
    if not stable and verdict.collapse is not None:
        first = f" (step {min(checkpoints)})" if checkpoints else ""
        raise TrainingError(
            f"{verdict.describe()}, before the first checkpoint{first}: no stable one. Train again with lower learning "
            "rates or a higher kl_coef, or save more often (save_every)"
        )
    if not stable:
        raise TrainingError("expected a checkpoint, found none")
    return max(stable)


def to_keep(checkpoints: Sequence[int], verdict: Verdict, newest: int) -> set[int]:
    """Checkpoints that must be kept: the `newest` most recent ones, and the most recent one that is not in doubt."""
    trusted = [step for step in checkpoints if verdict.doubtful_from is None or step < verdict.doubtful_from]
    return {*sorted(checkpoints)[-newest:], *sorted(trusted)[-1:]}


# --- One step ---------------------------------------------------------------------------------------------------------


Watched = Mapping[str, float | None]
"""The watched quantities of one step; None if a value is not finite."""


def _watched(record: Mapping[str, Any]) -> Watched:
    keys = {name: next((key for key in keys if key in record), None) for name, keys in WATCHED.items()}
    return {name: record[key] for name, key in keys.items() if key is not None}


def _broken(steps: Sequence[Watched], rule: StabilityRule) -> tuple[str, ...]:
    """Describe each bound that is broken at the last of these steps."""
    lost = [name for name, value in steps[-1].items() if value is None]
    if lost:
        return tuple(f"{name} is not finite" for name in lost)
    found = []
    reward = _mean(steps[-rule.window :], "reward")
    best = max(_of_windows(steps, rule, "reward"), default=0.0)
    least = best * (1 - _MAX_REWARD_DROP) if best >= _MIN_REWARD else 0.0
    if reward is not None and reward < least:
        found.append(f"reward {reward:.3f}, best {best:.3f}")
    found += _above(steps, rule, "kl", rule.max_kl)
    # An agent that has yet to learn the form starts with a high share, so only a rise counts.
    lowest = min(_of_windows(steps, rule, "malformed"), default=None)
    found += _above(steps, rule, "malformed", None if lowest is None else lowest + _MAX_MALFORMED_RISE)
    # The first window is the reference for these metrics, so they are compared from the step after it.
    if len(steps) > rule.window:
        for name, factor in _MAX_FACTOR.items():
            start = _mean(steps[: rule.window], name)
            if start:  # no bound from a mean of 0, such as no searches in the first steps
                found += _above(steps, rule, name, factor * start)
        start, entropy = _mean(steps[: rule.window], "entropy"), _mean(steps[-rule.window :], "entropy")
        least = _MIN_ENTROPY * (start or 0.0)
        if entropy is not None and entropy < least:
            found.append(f"entropy {entropy:.3g}, below {least:.3g}")
    return tuple(found)


def _of_windows(steps: Sequence[Watched], rule: StabilityRule, name: str) -> Iterator[float]:
    """Means over all full windows; a shorter window is noisier and would set a best mean by luck."""
    for end in range(rule.window, len(steps) + 1):
        yield _mean(steps[end - rule.window : end], name) or 0.0


def _above(steps: Sequence[Watched], rule: StabilityRule, name: str, bound: float | None) -> list[str]:
    value = _mean(steps[-rule.window :], name)
    if bound is None or value is None or value <= bound:
        return []
    return [f"{name} {value:.3g}, above {bound:.3g}"]


def _mean(steps: Sequence[Watched], name: str) -> float | None:
    values = [value for step in steps if (value := step.get(name)) is not None]
    return statistics.fmean(values) if values else None
