"""What is printed about long work where nobody watches a bar."""

from __future__ import annotations

import pytest

from agentic_r_plugin import progress as module
from agentic_r_plugin.progress import Lines, progress


def test_without_a_terminal_the_first_units_tell_what_is_left_and_then_each_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with progress(total=100, initial=20, desc="trajectories", unit="question") as shown:
        assert isinstance(shown, Lines)
        for _ in range(16):
            clock[0] += 5
            shown.set_postfix(loss="0.5", refresh=False)
            shown.update(5)
    assert capsys.readouterr().err.splitlines() == [
        "trajectories: 30 of 100 questions, loss 0.5, about 1 min 10 s left",
        "trajectories: 90 of 100 questions, loss 0.5, about 10 s left",
    ]
    with progress(total=2, desc="index", unit="passage", shown=False) as hidden:
        hidden.update(2)
    assert capsys.readouterr().err == ""
