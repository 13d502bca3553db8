"""Progress of long work, with an estimate of the remaining time."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TypeVar

Phase = TypeVar("Phase")
_LEAST_S = 10.0
"""Seconds of finished phases below which the pace cannot be estimated."""


def duration(seconds: float) -> str:
    """A duration rounded for an estimate.

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
    """Estimate the seconds of the unfinished phases on this machine.

    Args:
        expected: seconds of every phase, measured on another machine.
        took: seconds of the phases finished here. Their ratio to the expected seconds is this machine's pace, used once
            at least `_LEAST_S` seconds of phases are finished.

    >>> scaled({"index": 20.0, "train": 100.0, "evaluate": 60.0}, {"index": 30.0})
    {'train': 150.0, 'evaluate': 90.0}
    """
    known = sum(expected[phase] for phase in took if phase in expected)
    pace = sum(seconds for phase, seconds in took.items() if phase in expected) / known if known >= _LEAST_S else 1.0
    return {phase: seconds * pace for phase, seconds in expected.items() if phase not in took}


def progress(*, total: int, desc: str, unit: str, initial: int = 0, shown: bool = True) -> Any:
    """A context manager with `update(n)`: a tqdm bar on a terminal, else `Lines`."""
    if shown and not sys.stderr.isatty():
        return Lines(total, desc, unit, initial)
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, unit=unit, initial=initial, mininterval=1.0, disable=not shown)


class Lines:
    """Prints an estimate on stderr after 10 seconds, then once per minute."""

    FIRST_S, EVERY_S = 10.0, 60.0

    def __init__(self, total: int, desc: str, unit: str, initial: int) -> None:
        self.total, self.desc, self.unit = total, desc, unit
        self.done = self._initial = initial
        self._postfix = ""
        self._started, self._due = time.monotonic(), self.FIRST_S

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def set_postfix(self, *, refresh: bool = True, **values: object) -> None:
        """Set values to show in the next line."""
        self._postfix = "".join(f", {name} {value}" for name, value in values.items())

    def update(self, n: int = 1) -> None:
        """Count `n` more finished units."""
        self.done += n
        took, fresh = time.monotonic() - self._started, self.done - self._initial
        if took < self._due or not fresh or self.done >= self.total:
            return
        self._due = took + self.EVERY_S
        left = duration((self.total - self.done) * took / fresh)
        unit = f"{self.unit}s"
        print(
            f"{self.desc}: {self.done} of {self.total} {unit}{self._postfix}, about {left} left",
            file=sys.stderr,
            flush=True,
        )
