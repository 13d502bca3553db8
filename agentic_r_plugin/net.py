"""Rules that the HTTP clients of this package share: which addresses are local, how long to wait between attempts."""

from __future__ import annotations

import email.utils
import ipaddress
import random
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
