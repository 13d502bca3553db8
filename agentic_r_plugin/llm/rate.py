"""Keeps requests to a server below a rate, over all threads of a backend."""

from __future__ import annotations

import threading
import time


class Pace:
    """Spaces out requests evenly.

    Args:
        per_s: requests a second; 0 is no limit.
    """

    def __init__(self, per_s: float) -> None:
        self._gap_s = 1 / per_s if per_s > 0 else 0.0
        self._lock, self._next = threading.Lock(), 0.0

    def wait(self) -> None:
        """Return when the next request may begin."""
        if not self._gap_s:
            return
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._gap_s
        time.sleep(max(0.0, turn - time.monotonic()))
