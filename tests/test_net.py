"""The pause between attempts, which the clients of retrieval services and of chat servers share."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest

from agentic_r_plugin.net import pause_s


@pytest.mark.parametrize(
    ("retry_after", "least", "most"),
    [("7", 7, 7), ("600", 60, 60), ("Sat, 01 Jan 2000 00:00:00 GMT", 0, 0), ("soon", 1.5, 2.5), (None, 1.5, 2.5)],
)
def test_a_pause_follows_the_server_within_bounds_and_else_doubles(retry_after, least, most):
    assert least <= pause_s(3, retry_after, first_s=0.5, longest_s=30) <= most
    assert pause_s(50, first_s=0.5, longest_s=30) <= 37.5


def test_a_pause_until_a_date_lasts_until_then():
    assert 25 <= pause_s(1, formatdate(time.time() + 30, usegmt=True), first_s=0.5, longest_s=30) <= 30
