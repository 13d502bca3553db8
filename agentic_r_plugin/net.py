"""Rules for the HTTP clients of this package: local addresses, pauses between attempts, and a rate limit."""

from __future__ import annotations

import email.utils
import ipaddress
import random
import threading
import time

_LONGEST_ASKED_S = 60.0
"""Longest pause that a server's `Retry-After` may ask for."""


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def pause_s(failed: int, retry_after: str | None = None, *, first_s: float, longest_s: float) -> float:
    """Seconds to wait after the `failed`-th failed attempt of a request.

    Without a valid header the pauses double from `first_s` to `longest_s`. Jitter keeps clients that failed together
    from trying again together.

    Args:
        retry_after: the server's `Retry-After` header, a number of seconds or a date.
    """
    asked_s = _seconds(retry_after)
    if asked_s is not None:
        return min(asked_s, _LONGEST_ASKED_S)
    return min(longest_s, first_s * 2 ** (failed - 1)) * random.uniform(0.75, 1.25)


def _seconds(retry_after: str | None) -> float | None:
    if retry_after is None:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


class Pace:
    """Spaces requests evenly in time, across threads.

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
