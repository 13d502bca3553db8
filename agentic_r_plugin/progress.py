"""How far long work is, and about how long the rest of it takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TypeVar

Phase = TypeVar("Phase")
_LEAST_S = 10.0
"""Phases of less than this tell no pace."""


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
        took: seconds of the phases done here; their sum against what was expected is this machine's pace, once
            phases of `_LEAST_S` are done.

    >>> scaled({"index": 20.0, "train": 100.0, "evaluate": 60.0}, {"index": 30.0})
    {'train': 150.0, 'evaluate': 90.0}
    """
    known = sum(expected[phase] for phase in took if phase in expected)
    pace = sum(seconds for phase, seconds in took.items() if phase in expected) / known if known >= _LEAST_S else 1.0
    return {phase: seconds * pace for phase, seconds in expected.items() if phase not in took}


def progress(*, total: int, desc: str, unit: str, initial: int = 0, shown: bool = True) -> Any:
    """A context manager with `update(n)`: a bar of tqdm on a terminal, else `Lines`."""
    if shown and not sys.stderr.isatty():
        return Lines(total, desc, unit, initial)
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, unit=unit, initial=initial, mininterval=1.0, disable=not shown)


class Lines:
    """An estimate on stderr once the first units tell one, then one each minute."""

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
        """Values to show with the next line."""
        self._postfix = "".join(f", {name} {value}" for name, value in values.items())

    def update(self, n: int = 1) -> None:
        """`n` further units are done."""
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
