"""Finished units of a long job in one SQLite file, so that a killed process loses only the batches in flight.

Rows are keyed by their position in the input, so the output is written in input order whatever the order of the work.
Each batch is one transaction and is on disk when `add` returns. SQLite uses a rollback journal: its write-ahead log
needs shared memory, which network disks do not provide.
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
class UnitResult:
    """The result of one unit."""

    records: tuple[Record, ...] = ()
    dropped: str | None = None
    """Reason why the unit gave no record; the report counts units by reason."""
    error: str | None = None
    """What went wrong. The unit counts as finished; it is only retried by a resume after the work was given up because
    of too many errors. If `dropped` is also set, the unit was refused, which is not an error of the judge."""

    @classmethod
    def refused(cls, error: object) -> UnitResult:
        """Result of a unit that a model, a retriever or the limits refuse; other units may be accepted."""
        return cls(dropped="refused", error=str(error))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A finished unit as it is stored."""

    key: str
    records: bytes
    """Records as JSON Lines."""
    count: int
    """Number of records."""
    dropped: str | None
    error: str | None


class WorkTable:
    """The finished units of one output. Only one process may use it at a time (`claim`).

    Attributes:
        round: number of times the work was given up because of too many errors; errors of earlier rounds are retried.
        num_errors, num_refused: units of this round whose judge failed, and units that were refused.
        cost: total cost of the finished units, by name.

    Raises:
        RecordError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None)
        with self._checked():
            # Exclusive: no other process reads the file, so locks are taken only once. Truncating the rollback journal
            # is cheaper than deleting it in each transaction.
            self._db.executescript("PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = TRUNCATE;" + _SCHEMA)
            self.cost: dict[str, Any] = dict(self._db.execute("SELECT name, amount FROM spent"))
            # The table of costs also stores the round, under the empty name.
            self.round = int(self.cost.pop("", 0))
            self.num_errors = self._count("dropped IS NULL")
            self.num_refused = self._count("dropped IS NOT NULL")

    def __enter__(self) -> WorkTable:
        return self

    def __exit__(self, *exception: object) -> None:
        self._db.close()

    def finished(self, total: int) -> bytearray:
        """One byte per unit, for `total` units: 1 if it needs no further work."""
        done = bytearray(total)
        with self._checked():
            for (position,) in self._db.execute("SELECT position FROM unit"):
                done[position] = 1
            asked_again = "SELECT position FROM unit WHERE error IS NOT NULL AND round < ?"
            for (position,) in self._db.execute(asked_again, (self.round,)):
                done[position] = 0
        return done

    def add(self, units: Sequence[tuple[int, str, UnitResult]], spent: Mapping[str, Any]) -> None:
        """Store a batch of units (position, key, outcome) and its cost."""
        rows = []
        for position, key, outcome in units:
            records = b"".join(dump_line(record.to_dict()) for record in outcome.records)
            kept = (records, len(outcome.records), outcome.dropped, outcome.error)
            # SQLite notices a broken page structure, but not changed bytes within a value: hence the checksum.
            rows.append((position, key, *kept, self.round, zlib.crc32(records)))
        amounts = "INSERT INTO spent VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET amount = amount + excluded.amount"
        with self._transaction():
            # Replace: a unit that failed in an earlier round has a row already.
            self._db.executemany("INSERT OR REPLACE INTO unit VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            self._db.executemany(amounts, spent.items())
        for name, amount in spent.items():
            self.cost[name] = self.cost.get(name, 0) + amount
        failed = [outcome.dropped is not None for _, _, outcome in units if outcome.error is not None]
        self.num_refused += sum(failed)
        self.num_errors += len(failed) - sum(failed)

    def next_round(self) -> None:
        """Start a new round when the work is given up, so that a resume retries all units that failed so far."""
        self.round += 1
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO spent VALUES ('', ?)", (self.round,))
        self.num_errors = self.num_refused = 0

    def clear(self) -> None:
        """Remove all units; their cost is kept."""
        with self._transaction():
            self._db.execute("DELETE FROM unit")

    def first_error(self) -> str | None:
        """Unit and error of the first failure of this round."""
        with self._checked():
            found = self._db.execute(
                "SELECT key, error FROM unit WHERE error IS NOT NULL AND round = ? ORDER BY position", (self.round,)
            ).fetchone()
        return None if found is None else f"{found[0]}: {found[1]}"

    def rows(self, first: int = 0, last: int | None = None) -> Iterator[Row]:
        """Finished units in input order, from position `first` up to but excluding `last`.

        Raises:
            RecordError: a row differs from what was written.
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
        """Delete a closed table if it exists."""
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
                if self._db.in_transaction:  # a full disk may have ended it already
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Turn SQLite's errors into the package's own, or into OSError for I/O errors such as a full disk."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = error.sqlite_errorcode & 0xFF  # primary code, without the extended bits
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise RecordError(f"damaged ({error}); remove it and begin again", path=self.path) from error
            number = errno.ENOSPC if code == sqlite3.SQLITE_FULL else errno.EIO
            raise OSError(number, f"{os.strerror(number)} ({error})", str(self.path)) from error
