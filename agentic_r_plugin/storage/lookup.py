"""Records of a file by key, in any order and of any size: the index is on disk, not in memory.

A stage reads one file in order (its units) and looks up the records of each unit in other files.
"""

from __future__ import annotations

import hashlib
import sqlite3
import tempfile
from array import array
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Generic

from agentic_r_plugin.errors import RecordError, located
from agentic_r_plugin.store import RecordType, dump_line, parse_line, read_lines, shards

_ADDED_AT_ONCE = 4096  # entries per insert


def key_hash(key: str) -> int:
    """A signed 64-bit hash of a key."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    # Signed, as SQLite's integers and `array("q")` are.
    return int.from_bytes(digest, "little", signed=True)


def _is_plain(shard: Path) -> bool:
    """Whether the records of a shard can be read from the file itself, without a copy."""
    return shard.suffix == ".jsonl" and shard.is_file()


class HashSet:
    """64-bit hashes in 16 to 32 bytes each; a Python set takes 80.

    Among a million keys two have the same hash with a probability of 3e-8.
    """

    def __init__(self) -> None:
        self._slots, self._size = array("q", bytes(8 << 10)), 0  # hashes by their last bits; 0 is an empty slot

    def __contains__(self, hashed: int) -> bool:
        return self._slots[self._place(hashed)] != 0

    def add(self, hashed: int) -> bool:
        """Add a hash; returns whether it is new."""
        place = self._place(hashed)
        if self._slots[place]:
            return False
        self._slots[place] = hashed or 1
        self._size += 1
        # At most half of the slots are taken, so that a probe soon meets the hash or an empty slot.
        if 2 * self._size > len(self._slots):
            kept = self._slots
            self._slots = array("q", bytes(2 * kept.itemsize * len(kept)))
            for other in kept:
                if other:
                    self._slots[self._place(other)] = other
        return True

    def _place(self, hashed: int) -> int:
        """The slot of a hash, or an empty one for it."""
        # The number of slots is a power of two, so `last` is a mask. 0 means empty, so hash 0 becomes 1.
        slots, last, hashed = self._slots, len(self._slots) - 1, hashed or 1
        place = hashed & last
        while slots[place] not in (0, hashed):
            place = (place + 1) & last
        return place


class HashIndex:
    """A multimap from 64-bit hashes to numbers, in a temporary SQLite file; values of a hash keep their order."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The block removes the file's name; the open connection keeps the file until it is closed or the process ends.
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            self._db = sqlite3.connect(file.name, isolation_level=None, check_same_thread=False)
            # The file is private and is gone after a crash, so it needs no locks, no journal and no syncing.
            self._db.executescript(
                "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
                "CREATE TABLE entry (hash INTEGER, value INTEGER); BEGIN;"
            )
        self._waiting: list[tuple[int, int]] = []

    def add(self, hashed: int, value: int) -> None:
        """Add an entry; only before `finish`."""
        self._waiting.append((hashed, value))
        if len(self._waiting) >= _ADDED_AT_ONCE:
            self._flush()

    def finish(self) -> list[int]:
        """Build the index; returns the hashes that occur more than once."""
        self._flush()
        # Sorting once at the end is many times faster than inserting random hashes into a sorted tree.
        self._db.execute("COMMIT")
        self._db.execute("CREATE INDEX by_hash ON entry (hash)")
        repeated = self._db.execute("SELECT hash FROM entry GROUP BY hash HAVING COUNT(*) > 1")
        return [hashed for (hashed,) in repeated]

    def find(self, hashed: int) -> list[int]:
        """Values of a hash, in the order they were added."""
        found = self._db.execute("SELECT value FROM entry WHERE hash = ? ORDER BY rowid", (hashed,))
        return [value for (value,) in found]

    def close(self) -> None:
        """Delete the file; safe to call twice."""
        self._db.close()

    def _flush(self) -> None:
        self._db.executemany("INSERT INTO entry VALUES (?, ?)", self._waiting)
        self._waiting.clear()


class KeyedRecords(Generic[RecordType]):
    """The records of a file, looked up by key.

    Args:
        path: a record file or a folder of shards; gzipped and Parquet files are unpacked into a temporary file.
        many: whether a key may have several records.
        folder: for temporary files; None uses the file's own folder.
        reader: reads the records if `read_records` cannot; they are copied into a temporary file.
    """

    def __init__(
        self,
        path: str | Path,
        cls: type[RecordType],
        key: Callable[[RecordType], str],
        *,
        many: bool = False,
        folder: Path | None = None,
        reader: Callable[[Path], Iterator[RecordType]] | None = None,
    ) -> None:
        self.path, self.cls, self.key, self.many, self.reader = Path(path), cls, key, many, reader
        self._folder = folder if folder is not None else self.path.parent
        self._files: list[tuple[Path, IO[bytes]]] = []
        self._index: HashIndex | None = None

    def open(self) -> None:
        """Read the whole file once, so that a broken line is found early; later calls do nothing.

        Raises:
            RecordError: no such file, a broken record, or a duplicate key where `many` is False.
        """
        if self._index is not None:
            return
        index = HashIndex(self._folder)
        # Other readers need all shards at once: whether ids begin again shows only then.
        for number, shard in enumerate(shards(self.path) if self.reader is None else [self.path]):
            for offset, line, data in self._lines(shard):
                record = self._record(data, shard, line)
                # One integer per record: the shard's number, then 44 bits of byte offset (files up to 16 TiB).
                index.add(key_hash(self.key(record)), number << 44 | offset)
        repeated = index.finish()
        self._index = index
        if not self.many:
            for hashed in repeated:
                self._refuse_twice(hashed)

    def find(self, key: str) -> list[RecordType]:
        """Records of a key, in file order."""
        self.open()
        assert self._index is not None
        found = [self._read(value) for value in self._index.find(key_hash(key))]
        # Different keys can have the same hash.
        return [record for record in found if self.key(record) == key]

    def close(self) -> None:
        """Close files; safe to call twice."""
        for _, stream in self._files:
            stream.close()
        self._files = []
        if self._index is not None:
            self._index.close()
            self._index = None

    def _lines(self, shard: Path) -> Iterator[tuple[int, int, object]]:
        """(offset, line number, parsed line) of a shard; the offset is in the file that stays open for reading."""
        if self.reader is None and _is_plain(shard):
            stream: IO[bytes] = shard.open("rb")
            self._files.append((shard, stream))
            offset = 0
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield offset, number, parse_line(line, shard, number)
                offset += len(line)
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        stream = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (stays open for reading)
        self._files.append((shard, stream))
        offset = 0
        read = self.reader
        rows = read_lines(shard) if read is None else enumerate((item.to_dict() for item in read(shard)), start=1)
        for number, data in rows:
            yield offset, number, data
            offset += stream.write(dump_line(data))
        stream.flush()

    def _record(self, data: object, shard: Path, line: int) -> RecordType:
        with located(shard, line):
            return self.cls.from_dict(data)

    def _read(self, value: int) -> RecordType:
        path, stream = self._files[value >> 44]
        stream.seek(value & ((1 << 44) - 1))
        return self._record(parse_line(stream.readline(), path, 0), path, 0)

    def _refuse_twice(self, hashed: int) -> None:
        assert self._index is not None
        # A hash may belong to several keys: after sorting, only neighbours with equal keys are duplicates.
        found = sorted((self.key(self._read(value)), value) for value in self._index.find(hashed))
        for (one, first), (other, second) in pairwise(found):
            if one == other:
                path, line = self._place(second)
                raise RecordError(
                    f"{one!r} occurs twice; expected one {self.cls.__name__} for each, "
                    f"the first is at {':'.join(map(str, self._place(first)))}",
                    path=path,
                    line=line,
                )

    def _place(self, value: int) -> tuple[Path, int]:
        """File and line of a record."""
        path, stream = self._files[value >> 44]
        stream.seek(0)
        left, line = value & ((1 << 44) - 1), 1
        while left:
            block = stream.read(min(left, 1 << 20))
            left, line = left - len(block), line + block.count(b"\n")
        # A copy has one line per record, its source perhaps blank lines between them.
        if self.reader is None and not _is_plain(path):
            line = next(islice(read_lines(path), line - 1, None))[0]
        return path, line
