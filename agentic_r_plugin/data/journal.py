"""Finished work on disk, so that a stage that is killed goes on where it stopped."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from agentic_r_plugin.errors import OutputExistsError
from agentic_r_plugin.records import Record
from agentic_r_plugin.store import dump_line, parse_line


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one unit."""

    records: tuple[Record, ...] = ()
    dropped: str | None = None
    """Why the unit gave no record; counted by this reason."""
    error: str | None = None
    """What the judge did wrong; the unit is kept apart, and tried again by a resume."""


class Journal:
    """Finished units on disk: append-only, synced a batch at a time, indexed by key in memory.

    Raises:
        OutputExistsError: another process has it open.
        RecordError: a line other than the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cost: Counter[str] = Counter()
        self._offsets: dict[str, int] = {}
        self._failed: dict[str, None] = {}

    def __enter__(self) -> Journal:
        self._stream: BinaryIO = self.path.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._stream.close()
            raise OutputExistsError(f"{self.path}: another process is working on it") from error
        self._load()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    @property
    def num_done(self) -> int:
        """Units in the journal, failed ones included."""
        return len(self._offsets)

    @property
    def errors(self) -> list[str]:
        """Keys of the units whose judge failed."""
        return list(self._failed)

    def done(self, key: str) -> bool:
        """Whether a unit is finished; one that failed is not."""
        return key in self._offsets and key not in self._failed

    def read(self, key: str) -> dict[str, Any]:
        """A finished unit's line."""
        self._stream.seek(self._offsets[key])
        return dict(parse_line(self._stream.readline(), self.path, 0))

    def append(self, outcomes: Sequence[tuple[str, Outcome]], spent: dict[str, float]) -> None:
        """Add a batch of units and what it cost; on disk when this returns."""
        position = self._stream.seek(0, os.SEEK_END)
        block = bytearray()
        lines: list[dict[str, Any]] = [
            {
                "unit": key,
                "records": [record.to_dict() for record in outcome.records],
                "dropped": outcome.dropped,
                "error": outcome.error,
            }
            for key, outcome in outcomes
        ]
        for line in [*lines, {"spent": spent}]:
            self._index(line, position + len(block))
            block += dump_line(line)
        self._stream.write(block)
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _load(self) -> None:
        """Index what is there; a torn last line is cut off."""
        self._stream.seek(0)
        offset = 0
        for number, line in enumerate(self._stream, start=1):
            if not line.endswith(b"\n"):
                break
            self._index(parse_line(line, self.path, number), offset)
            offset += len(line)
        self._stream.truncate(offset)

    def _index(self, line: dict[str, Any], offset: int) -> None:
        if "spent" in line:
            self.cost.update(line["spent"])
            return
        self._offsets[line["unit"]] = offset
        self._failed.pop(line["unit"], None)
        if line["error"] is not None:
            self._failed[line["unit"]] = None
