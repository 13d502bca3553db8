"""Rate limit for the requests of a backend, across all its threads."""

from __future__ import annotations

import threading
import time


class Pace:
    """Spaces requests evenly in time.

    Args:
        per_s: requests per second; 0: no limit.
    """

    def __init__(self, per_s: float) -> None:
        self._gap_s = 1 / per_s if per_s > 0 else 0.0
        self._lock, self._next = threading.Lock(), 0.0

    def wait(self) -> None:
        """Wait until the next request may start."""
        if not self._gap_s:
            return
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._gap_s
        # Sleeping outside the lock lets other threads reserve their turns meanwhile.
        time.sleep(max(0.0, turn - time.monotonic()))
