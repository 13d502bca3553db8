"""Finished work on disk, so that a stage that is killed goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from agentic_r_plugin.errors import OutputExistsError, RecordError
from agentic_r_plugin.records import Record


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one unit."""

    records: tuple[Record, ...] = ()
    dropped: str | None = None
    """Why the unit gave no record; counted by this reason."""
    error: str | None = None
    """What went wrong; the unit is kept apart. A finished outcome like the others: only a resume after the stage gave
    up (too many errors) asks again. With `dropped` too, the unit was refused, which is no judge's error."""

    @classmethod
    def refused(cls, error: object) -> Outcome:
        """A unit that a model, a retriever or the limits do not take; others may be taken."""
        return cls(dropped=REFUSED, error=str(error))


REFUSED = "refused"
"""Reason of units that were refused."""


class Journal:
    """Finished units of the parts in work: append-only, each line with its checksum, synced a batch at a time.

    Units are known by their position in the input. One process writes; lines of parts that are closed are taken out by
    writing the file anew beside it and renaming it.

    Raises:
        OutputExistsError: another process has it open.
        RecordError: a line other than the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cost: Counter[str] = Counter()
        self.round = 0
        """How often the stage gave up because of judge errors; errors of earlier rounds are asked again."""
        self._offsets: dict[int, int] = {}
        self._error_round: dict[int, int] = {}
        self._refused: set[int] = set()

    def __enter__(self) -> Journal:
        self._stream = _locked(self.path)
        self._load()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    @property
    def positions(self) -> list[int]:
        """Units in the journal, failed ones included."""
        return list(self._offsets)

    @property
    def num_errors(self) -> int:
        """Units here whose judge failed in this round."""
        return sum(of == self.round and p not in self._refused for p, of in self._error_round.items())

    @property
    def num_refused(self) -> int:
        """Units here that were refused in this round."""
        return sum(of == self.round and p in self._refused for p, of in self._error_round.items())

    @property
    def first_error(self) -> str | None:
        """Unit and error of the first of them."""
        for position, of in sorted(self._error_round.items()):
            line = self.read(position)
            if of == self.round and line is not None:
                return f"{line['unit']}: {line['error']}"
        return None

    def done(self, position: int) -> bool:
        """Whether a unit has an outcome that stands."""
        return position in self._offsets and self._error_round.get(position, self.round) == self.round

    def read(self, position: int) -> dict[str, Any] | None:
        """A unit's line, or None when it has none."""
        if position not in self._offsets:
            return None
        self._stream.seek(self._offsets[position])
        return _parse(self._stream.readline(), self.path, 0)

    def append(self, outcomes: Sequence[tuple[int, str, Outcome]], spent: dict[str, float]) -> None:
        """Add a batch of units (position, key, outcome) and what it cost; on disk when this returns."""
        self._write(
            [
                *(
                    {
                        "position": position,
                        "unit": key,
                        "records": [record.to_dict() for record in outcome.records],
                        "dropped": outcome.dropped,
                        "error": outcome.error,
                        "round": self.round,
                    }
                    for position, key, outcome in outcomes
                ),
                {"spent": spent},
            ]
        )

    def next_round(self) -> None:
        """Note that the stage gives up: a resume asks again what failed so far."""
        self._write([{"round_ends": self.round}])

    def forget(self, positions: Sequence[int]) -> None:
        """Take out units whose part is closed; what was spent stays."""
        gone = set(positions)
        kept = [self.read(position) for position in self._offsets if position not in gone]
        beside = self.path.with_name(f".{self.path.name}.rewrite.tmp")
        beside.unlink(missing_ok=True)
        before, self._stream = self._stream, _locked(beside)
        self._offsets, self._error_round, self._refused = {}, {}, set()
        spent, self.cost = dict(self.cost), Counter()
        self._write([{"round_ends": self.round - 1}, {"spent": spent}, *(line for line in kept if line is not None)])
        beside.replace(self.path)
        before.close()

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        position = self._stream.seek(0, os.SEEK_END)
        dumped = [_dump(line) for line in lines]
        self._stream.write(b"".join(dumped))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        for line, written in zip(lines, dumped, strict=True):
            self._index(line, position)
            position += len(written)

    def _load(self) -> None:
        """Index what is there; a torn end is cut off."""
        self._stream.seek(0)
        offset, broken = 0, None
        for number, line in enumerate(self._stream, start=1):
            if broken is not None:
                raise broken
            try:
                self._index(_parse(line, self.path, number), offset)
            except RecordError as error:
                broken = error
                continue
            offset += len(line)
        self._stream.truncate(offset)

    def _index(self, line: dict[str, Any], offset: int) -> None:
        if "spent" in line:
            self.cost.update(line["spent"])
        elif "round_ends" in line:
            self.round = line["round_ends"] + 1
        else:
            self._offsets[line["position"]] = offset
            self._error_round.pop(line["position"], None)
            self._refused.discard(line["position"])
            if line["error"] is not None:
                self._error_round[line["position"]] = line["round"]
                if line["dropped"] is not None:
                    self._refused.add(line["position"])


def require_free(path: Path) -> None:
    """Refuse a journal that another process has open; one that is not there is free.

    Raises:
        OutputExistsError: another process has it open.
    """
    if path.exists():
        _locked(path).close()


def _locked(path: Path) -> BinaryIO:
    """The file, open for reading and appending, and ours alone."""
    while True:
        stream = path.open("a+b")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.close()
            raise OutputExistsError(f"{path}: another process is working on it") from error
        if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
            return stream
        stream.close()


def _dump(line: dict[str, Any]) -> bytes:
    text = json.dumps(line, ensure_ascii=False).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        raise RecordError(f"damaged: the checksum of {line[:60]!r} is wrong", path=path, line=number)
    return dict(json.loads(text))
