"""Finished units of a long job in one SQLite file, so that a process that is killed loses only what was under way.

Rows are known by their position in the input, so the output is read in that order whatever the order of the work. A
batch is one transaction, on disk when `add` returns. SQLite keeps a rollback journal: its write-ahead log needs shared
memory, which network disks do not give.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.records import Record
from agentic_r_plugin.store import dump_line

_SCHEMA = """
CREATE TABLE IF NOT EXISTS unit (
    position INTEGER PRIMARY KEY, key TEXT, records BLOB, count INTEGER, dropped TEXT, error TEXT, round INTEGER,
    checksum INTEGER
);
CREATE INDEX IF NOT EXISTS failed ON unit (position) WHERE error IS NOT NULL;
CREATE TABLE IF NOT EXISTS spent (name TEXT PRIMARY KEY, amount);
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one unit."""

    records: tuple[Record, ...] = ()
    dropped: str | None = None
    """Why the unit gave no record; counted by this reason."""
    error: str | None = None
    """What went wrong. The unit is finished like the others; it is asked again only by a resume after the work was
    given up because of too many errors. With `dropped` too, the unit was refused, which is not the judge's error."""

    @classmethod
    def refused(cls, error: object) -> Outcome:
        """A unit that a model, a retriever or the limits do not take; others may be taken."""
        return cls(dropped=REFUSED, error=str(error))


REFUSED = "refused"
"""Reason of units that were refused."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finished unit as it is kept."""

    key: str
    records: bytes
    """JSON Lines."""
    count: int
    """Records."""
    dropped: str | None
    error: str | None


class WorkTable:
    """The finished units of one output. One process uses it at a time (`claim`).

    Attributes:
        round: how often the work was given up because of too many errors; errors of earlier rounds are asked again.
        num_errors, num_refused: units of this round whose judge failed, and that were refused.
        cost: what the finished units cost, by name.

    Raises:
        RecordError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None)
        with self._checked():
            # Exclusive: no other process reads it, so locks are taken once. Truncating the rollback journal is cheaper
            # than removing it with each transaction.
            self._db.executescript("PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = TRUNCATE;" + _SCHEMA)
            self.cost: dict[str, Any] = dict(self._db.execute("SELECT name, amount FROM spent"))
            self.round = int(self.cost.pop("", 0))
            self.num_errors = self._count("dropped IS NULL")
            self.num_refused = self._count("dropped IS NOT NULL")

    def __enter__(self) -> WorkTable:
        return self

    def __exit__(self, *exception: object) -> None:
        self._db.close()

    def finished(self, total: int) -> bytearray:
        """One byte for each of `total` units, 1 where it needs no further work."""
        done = bytearray(total)
        with self._checked():
            for (position,) in self._db.execute("SELECT position FROM unit"):
                done[position] = 1
            asked_again = "SELECT position FROM unit WHERE error IS NOT NULL AND round < ?"
            for (position,) in self._db.execute(asked_again, (self.round,)):
                done[position] = 0
        return done

    def add(self, units: Sequence[tuple[int, str, Outcome]], spent: Mapping[str, Any]) -> None:
        """Keep a batch of units (position, key, outcome) and what it cost."""
        rows = []
        for position, key, outcome in units:
            records = b"".join(dump_line(record.to_dict()) for record in outcome.records)
            kept = (records, len(outcome.records), outcome.dropped, outcome.error)
            rows.append((position, key, *kept, self.round, zlib.crc32(records)))
        amounts = "INSERT INTO spent VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET amount = amount + excluded.amount"
        with self._transaction():
            self._db.executemany("INSERT OR REPLACE INTO unit VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            self._db.executemany(amounts, spent.items())
        for name, amount in spent.items():
            self.cost[name] = self.cost.get(name, 0) + amount
        failed = [outcome.dropped is not None for _, _, outcome in units if outcome.error is not None]
        self.num_refused += sum(failed)
        self.num_errors += len(failed) - sum(failed)

    def next_round(self) -> None:
        """Give up: a resume asks again what failed so far."""
        self.round += 1
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO spent VALUES ('', ?)", (self.round,))
        self.num_errors = self.num_refused = 0

    def clear(self) -> None:
        """Forget all units; what they cost stays."""
        with self._transaction():
            self._db.execute("DELETE FROM unit")

    def first_error(self) -> str | None:
        """Unit and error of the first that failed in this round."""
        with self._checked():
            found = self._db.execute(
                "SELECT key, error FROM unit WHERE error IS NOT NULL AND round = ? ORDER BY position", (self.round,)
            ).fetchone()
        return None if found is None else f"{found[0]}: {found[1]}"

    def rows(self, first: int = 0, last: int | None = None) -> Iterator[Row]:
        """Finished units in the order of the input, from position `first` up to, not with, `last`.

        Raises:
            RecordError: a row is not what was written.
        """
        query = "SELECT key, records, count, dropped, error, checksum FROM unit WHERE position >= ? AND position < ?"
        with self._checked():
            for key, records, count, dropped, error, checksum in self._db.execute(
                f"{query} ORDER BY position", (first, 2**62 if last is None else last)
            ):
                if zlib.crc32(records) != checksum:
                    raise RecordError(f"damaged: the checksum of unit {key!r} is wrong; remove it", path=self.path)
                yield Row(key=key, records=records, count=count, dropped=dropped, error=error)

    @staticmethod
    def remove(path: Path) -> None:
        """Delete a table that is closed, if there is one."""
        for file in (path, path.with_name(path.name + "-journal")):
            file.unlink(missing_ok=True)

    def _count(self, which: str) -> int:
        query = f"SELECT COUNT(*) FROM unit WHERE error IS NOT NULL AND round = ? AND {which}"
        return int(self._db.execute(query, (self.round,)).fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._checked():
            self._db.execute("BEGIN")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has ended it already
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """SQLite's errors as the package's own, or as the system's where the disk is full."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = error.sqlite_errorcode & 0xFF  # without the extended code
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise RecordError(f"damaged ({error}); remove it and begin again", path=self.path) from error
            number = errno.ENOSPC if code == sqlite3.SQLITE_FULL else errno.EIO
            raise OSError(number, f"{os.strerror(number)} ({error})", str(self.path)) from error
