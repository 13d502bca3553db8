"""A corpus in FlashRAG's format, read where it lies: an offset table in memory, the texts in a memory-mapped file.

JSON Lines are mapped as they are; gzipped and Parquet corpora are unpacked once into an unnamed temporary file, which
vanishes with the process.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import mmap
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.store import dump_line, parse_line, read_lines


class Corpus:
    """Passages by row and by id; row order is index order.

    Holds 32 bytes a passage in memory, whatever its length. Fields other than `id` and `contents` are left out.

    Args:
        path: `.jsonl`, `.jsonl.gz` or `.parquet` with the fields `id` and `contents`.

    Raises:
        RecordError: no such file, no passage, a broken line, a missing field, or an id that stands there twice; names
            file and line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise RecordError("no such corpus file", path=self.path)
        with _plain_lines(self.path) as stream:
            if stream.seek(0, 2) == 0:
                raise RecordError("the corpus is empty; expected one passage a line", path=self.path)
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._spans, hashes, self._digest = self._scan()
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]
        self._check_duplicates()

    def _scan(self) -> tuple[NDArray[np.int64], NDArray[np.uint64], str]:
        """Start and line number of every passage, hash of every id, and the digest of all."""
        starts: list[tuple[int, int]] = []
        hashes: list[int] = []
        digest, position, number = hashlib.sha256(), 0, 0
        for line in iter(self._map.readline, b""):
            number += 1
            start, position = position, position + len(line)
            if not line.strip():
                continue
            identifier, contents = _fields(parse_line(line, self.path, number), self.path, number)
            starts.append((start, number))
            hashes.append(_hash(identifier))
            for part in (identifier, contents):
                encoded = part.encode("utf-8", "surrogatepass")
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        if not starts:
            raise RecordError("the corpus is empty; expected one passage a line", path=self.path)
        return np.array(starts, np.int64), np.array(hashes, np.uint64), digest.hexdigest()[:16]

    def _check_duplicates(self) -> None:
        for place in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]):
            first, second = sorted((int(self._order[place]), int(self._order[place + 1])))
            if (identifier := self[first].id) == self[second].id:
                raise RecordError(
                    f"duplicate passage id {identifier!r}, first at line {self._spans[first, 1]}",
                    path=self.path,
                    line=int(self._spans[second, 1]),
                )

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, row: int) -> Passage:
        """The passage in `row`, from 0."""
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path}: row {row} of a corpus of {len(self)} passages")
        start, end = int(self._spans[row, 0]), self._map.size()
        if row + 1 < len(self):
            end = int(self._spans[row + 1, 0])
        data = json.loads(self._map[start:end])
        return Passage.from_contents(str(data["id"]), data["contents"])

    def __iter__(self) -> Iterator[Passage]:
        return (self[row] for row in range(len(self)))

    def row_of(self, identifier: str) -> int | None:
        """Row of a passage id, or None when the corpus does not hold it."""
        wanted = np.uint64(_hash(identifier))
        place = int(np.searchsorted(self._hashes, wanted))
        while place < len(self) and self._hashes[place] == wanted:
            row = int(self._order[place])
            if self[row].id == identifier:
                return row
            place += 1
        return None

    def __contains__(self, identifier: object) -> bool:
        return isinstance(identifier, str) and self.row_of(identifier) is not None

    def by_id(self, identifier: str) -> Passage:
        """The passage with this id.

        Raises:
            RecordError: the corpus does not hold it.
        """
        row = self.row_of(identifier)
        if row is None:
            raise RecordError(f"no passage with id {identifier!r} in this corpus", path=self.path)
        return self[row]

    def fingerprint(self) -> str:
        """Hash of all ids and contents in order; the same for JSON Lines, gzipped and Parquet forms of one corpus."""
        return self._digest

    def close(self) -> None:
        """Unmap the file; safe to call twice."""
        self._map.close()

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain_lines(path: Path) -> IO[bytes]:
    """The corpus as an open JSON Lines file that can be mapped."""
    if path.suffix not in (".gz", ".parquet"):
        return path.open("rb")
    stream = tempfile.TemporaryFile()  # noqa: SIM115 (closed by the caller)
    try:
        if path.suffix == ".parquet":
            for _, row in read_lines(path):
                stream.write(dump_line(row))
        else:
            with gzip.open(path, "rb") as packed:
                shutil.copyfileobj(packed, stream, 1 << 20)
        stream.flush()
    except (gzip.BadGzipFile, EOFError) as error:
        stream.close()
        raise RecordError(f"not a whole gzip file: {error}", path=path) from error
    except BaseException:
        stream.close()
        raise
    return stream


def _fields(data: Any, path: Path, line: int) -> tuple[str, str]:
    if not isinstance(data, dict):
        raise RecordError(f"expected a JSON object, found {type(data).__name__}", path=path, line=line)
    identifier, contents = data.get("id"), data.get("contents")
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    for name, value in (("id", identifier), ("contents", contents)):
        if not isinstance(value, str):
            found = f"found {type(value).__name__}" if name in data else f"found only {', '.join(map(repr, data))}"
            raise RecordError(f"expected a string field {name!r}, {found}", path=path, line=line)
    return identifier, contents  # type: ignore[return-value]


def _hash(identifier: str) -> int:
    digest = hashlib.blake2b(identifier.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
