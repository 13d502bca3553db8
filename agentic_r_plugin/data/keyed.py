"""Records of a file by key, whatever its order and size: the index lies on disk, not in memory.

A stage reads one file in order (its units) and needs what other files say of each unit. Files of one run are in the
same order, so looking up goes forward through them; files in another order work too, only slower.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, Generic

import numpy as np
from numpy.typing import NDArray

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.store import RecordType, dump_line, parse_line, read_lines, shards

_ENTRY = np.dtype([("hash", "<u8"), ("value", "<i8")])
_RUN = 1 << 16
"""Entries sorted in memory at once."""
_LEAF = 512
"""Entries read for one look-up, about."""


def key_hash(key: str) -> int:
    """64 bits that stand for a key."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class HashIndex:
    """A multimap from 64-bit hashes to numbers in an unnamed temporary file; values of one hash keep their order.

    Memory: 8 bytes for every 512 entries, and 2 KB for every 65,536 while it is built.

    Args:
        folder: where the temporary file lies.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._file, self._size = folder, _scratch(folder), 0
        self._hashes: list[int] = []
        self._values: list[int] = []
        self._runs: list[tuple[int, NDArray[np.int64]]] = []
        self._starts: NDArray[np.int64] = np.zeros(0, np.int64)
        self._bits = 8

    def __len__(self) -> int:
        return self._size

    def add(self, hashed: int, value: int) -> None:
        """Add an entry, before `finish`."""
        self._hashes.append(hashed)
        self._values.append(value)
        self._size += 1
        if len(self._hashes) >= _RUN:
            self._flush()

    def finish(self) -> list[int]:
        """Sort; returns the hashes that occur more than once."""
        self._flush()
        self._bits = 8 + max(0, (self._size // (_LEAF << 8)).bit_length())
        inner = np.arange(1 << (self._bits - 8), dtype=np.uint64) << np.uint64(64 - self._bits)
        sorted_file, starts, repeated, written = _scratch(self._folder), [], [], 0
        for top in range(256):
            parts = [self._entries(at + int(cut[top]), int(cut[top + 1] - cut[top])) for at, cut in self._runs]
            entries = np.concatenate(parts) if parts else np.zeros(0, _ENTRY)
            entries = entries[np.argsort(entries["hash"], kind="stable")]
            starts.append(written + np.searchsorted(entries["hash"], inner + (np.uint64(top) << np.uint64(56))))
            same = entries["hash"][1:] == entries["hash"][:-1]
            repeated += np.unique(entries["hash"][1:][same]).tolist()
            sorted_file.write(entries.tobytes())
            written += len(entries)
        self._starts = np.concatenate([*starts, [written]]).astype(np.int64)
        sorted_file.flush()
        self._file.close()
        self._file, self._runs = sorted_file, []
        return repeated

    def find(self, hashed: int) -> list[int]:
        """Values of a hash, in the order they were added."""
        leaf = hashed >> (64 - self._bits)
        start, end = int(self._starts[leaf]), int(self._starts[leaf + 1])
        entries = self._entries(start, end - start)
        first = np.searchsorted(entries["hash"], np.uint64(hashed), side="left")
        last = np.searchsorted(entries["hash"], np.uint64(hashed), side="right")
        return [int(value) for value in entries["value"][first:last]]

    def close(self) -> None:
        """Give the file back; safe to call twice."""
        self._file.close()

    def _flush(self) -> None:
        if not self._hashes:
            return
        entries = np.zeros(len(self._hashes), _ENTRY)
        entries["hash"], entries["value"] = self._hashes, self._values
        entries = entries[np.argsort(entries["hash"], kind="stable")]
        tops = (np.arange(256, dtype=np.uint64)) << np.uint64(56)
        cuts = np.append(np.searchsorted(entries["hash"], tops), len(entries)).astype(np.int64)
        self._runs.append((sum(int(cut[-1]) for _, cut in self._runs), cuts))
        self._file.write(entries.tobytes())
        self._file.flush()
        self._hashes.clear()
        self._values.clear()

    def _entries(self, start: int, count: int) -> NDArray[np.void]:
        data = os.pread(self._file.fileno(), count * _ENTRY.itemsize, start * _ENTRY.itemsize)
        return np.frombuffer(data, _ENTRY)


class KeyedRecords(Generic[RecordType]):
    """The records of a file, by key.

    Args:
        path: a record file or a folder of shards; gzipped and Parquet ones are unpacked into a temporary file.
        cls: the type of its records.
        key: names a record's key.
        many: whether a key may have several records.
        folder: for temporary files; None: the file's own.
    """

    def __init__(
        self,
        path: str | Path,
        cls: type[RecordType],
        key: Callable[[RecordType], str],
        *,
        many: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.path, self.cls, self.key, self.many = Path(path), cls, key, many
        self._folder = folder if folder is not None else self.path.parent
        self._files: list[tuple[Path, IO[bytes]]] = []
        self._index: HashIndex | None = None

    def open(self) -> None:
        """Read the whole file once, so that a broken line is found now; later calls do nothing.

        Raises:
            RecordError: no such file, a broken record, or a key that occurs twice where it may not.
        """
        if self._index is not None:
            return
        index = HashIndex(self._folder)
        for number, shard in enumerate(shards(self.path)):
            for offset, line, data in self._lines(shard):
                record = self._record(data, shard, line)
                index.add(key_hash(self.key(record)), number << 44 | offset)
        repeated = index.finish()
        self._index = index
        if not self.many:
            for hashed in repeated:
                self._refuse_twice(hashed)

    def find(self, key: str) -> list[RecordType]:
        """Records of a key, in the order of the file."""
        self.open()
        assert self._index is not None
        found = [self._read(value) for value in self._index.find(key_hash(key))]
        return [record for record in found if self.key(record) == key]

    def get(self, key: str) -> RecordType | None:
        """The record of a key, or None."""
        return next(iter(self.find(key)), None)

    def close(self) -> None:
        """Give files back; safe to call twice."""
        for _, stream in self._files:
            stream.close()
        self._files = []
        if self._index is not None:
            self._index.close()
            self._index = None

    def _lines(self, shard: Path) -> Iterator[tuple[int, int, object]]:
        """(offset, line number, parsed line) of a shard; the offset is that in the file kept open for reading."""
        if shard.suffix == ".jsonl" and shard.is_file():
            stream: IO[bytes] = shard.open("rb")
            self._files.append((shard, stream))
            offset = 0
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield offset, number, parse_line(line, shard, number)
                offset += len(line)
            return
        stream = _scratch(self._folder)
        self._files.append((shard, stream))
        offset = 0
        for number, data in read_lines(shard):
            yield offset, number, data
            offset += stream.write(dump_line(data))
        stream.flush()

    def _record(self, data: object, shard: Path, line: int) -> RecordType:
        try:
            return self.cls.from_dict(data)
        except RecordError as error:
            raise RecordError(str(error), path=shard, line=line) from error

    def _read(self, value: int) -> RecordType:
        path, stream = self._files[value >> 44]
        stream.seek(value & ((1 << 44) - 1))
        return self._record(parse_line(stream.readline(), path, 0), path, 0)

    def _refuse_twice(self, hashed: int) -> None:
        assert self._index is not None
        keys = sorted(self.key(self._read(value)) for value in self._index.find(hashed))
        for one, other in pairwise(keys):
            if one == other:
                raise RecordError(f"{one!r} occurs twice; expected one {self.cls.__name__} for each", path=self.path)


def _scratch(folder: Path) -> IO[bytes]:
    """An unnamed temporary file, gone with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder)
