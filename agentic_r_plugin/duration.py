"""How long something takes, in words, and what is left of work whose phases were timed before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Phase = TypeVar("Phase")


def duration(seconds: float) -> str:
    """Rounded as an estimate deserves.

    >>> [duration(seconds) for seconds in (4.2, 75, 620, 7800)]
    ['4 s', '1 min 15 s', '10 min', '2 h 10 min']
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 300:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def scaled(expected: Mapping[Phase, float], took: Mapping[Phase, float]) -> dict[Phase, float]:
    """Seconds of the phases that are not done, on this machine.

    Args:
        expected: seconds of every phase, measured on another machine.
        took: seconds of the phases done here; their sum against what was expected is this machine's pace.

    >>> scaled({"index": 20.0, "train": 100.0, "evaluate": 60.0}, {"index": 30.0})
    {'train': 150.0, 'evaluate': 90.0}
    """
    known = sum(expected[phase] for phase in took if phase in expected)
    pace = sum(seconds for phase, seconds in took.items() if phase in expected) / known if known else 1.0
    return {phase: seconds * pace for phase, seconds in expected.items() if phase not in took}
