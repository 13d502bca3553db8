"""Which phases of a loop are done, and what each cost: `costs.jsonl` in the run folder."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentic_r_plugin.memory import give_back_memory
from agentic_r_plugin.progress import duration, scaled
from agentic_r_plugin.storage.claim import Claim
from agentic_r_plugin.store import StepLog, drop_torn_end

FILE = "costs.jsonl"
_KEEP_S = 10.0
"""Seconds between two updates in the manifest of the time that the unfinished phase has taken, over all attempts."""


def read_costs(folder: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """(iteration, phase) -> line, for the finished phases of a run."""
    return {(line["iteration"], line["phase"]): line for line in StepLog(folder / FILE).read()}


class Costs:
    """Runs each phase once, and records what it cost.

    Args:
        held: the run folder.
        expected: (iteration, phase) -> seconds on some machine, for the estimate of the time left; may be empty.
    """

    def __init__(self, held: Claim, expected: Mapping[tuple[int, str], float]) -> None:
        self._held, self._expected = held, expected
        self._log = StepLog(held.out / FILE)
        drop_torn_end(self._log.path)  # else the next line would be appended to the torn one
        self.done = read_costs(held.out)

    def phase(
        self, iteration: int, name: str, work: Callable[[], object], cost: Callable[[], Mapping[str, Any]] = dict
    ) -> None:
        """Run a phase unless it is done. Its line in costs.jsonl is written last."""
        if (iteration, name) in self.done:
            return
        print(f"[iteration {iteration}] {name}{self.estimate(iteration, name)}", file=sys.stderr, flush=True)
        with self._timed(iteration, name) as seconds:
            work()
            give_back_memory()
        # A stage reports the added seconds of its workers; `seconds` of the line is the time of the phase.
        spent = {"worker_seconds" if key == "seconds" else key: value for key, value in cost().items()}
        line = {"iteration": iteration, "phase": name, **spent, "seconds": round(seconds(), 1)}
        self._log.append([line])
        self.done[iteration, name] = line

    def estimate(self, iteration: int, name: str) -> str:
        """Text with the time that this phase and the rest of the loop will take; empty if nothing is expected."""
        took = {phase: float(line["seconds"]) for phase, line in self.done.items()}
        left = scaled(self._expected, took)  # finished phases show how fast this machine is
        if (iteration, name) not in left:
            return ""
        return f": about {duration(left[iteration, name])}; {duration(sum(left.values()))} left in total"

    @contextmanager
    def _timed(self, iteration: int, name: str) -> Iterator[Callable[[], float]]:
        """Clock of a phase that includes its earlier attempts. A kill loses at most the last `_KEEP_S` seconds."""
        phase = {"iteration": iteration, "phase": name}
        before = self._held.noted("attempt", {})
        earlier = before["seconds"] if phase.items() <= before.items() else 0.0  # the note may be of another phase
        started, ended = time.monotonic(), threading.Event()

        def seconds() -> float:
            return earlier + time.monotonic() - started

        def keep() -> None:
            while not ended.wait(_KEEP_S):
                self._held.note(attempt=phase | {"seconds": seconds()})

        keeper = threading.Thread(target=keep, daemon=True)
        keeper.start()
        try:
            yield seconds
        finally:
            ended.set()
            keeper.join()
            self._held.note(attempt=phase | {"seconds": seconds()})
