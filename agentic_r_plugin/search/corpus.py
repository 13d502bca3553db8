"""A corpus that is read in place: memory holds no text, only the position of each passage.

JSON Lines, also a folder of them, are read in place, one passage at a time. Corpora in other formats are unpacked once
into an unnamed temporary file, which is gone when the process ends. The results of the full scan (passage positions,
hashes of ids, the fingerprint) can be saved next to an index; they are then mapped instead of computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.forms import passage_fields, passage_metadata
from agentic_r_plugin.records import TEXT_ID, Passage
from agentic_r_plugin.search.corpus_forms import blocks, is_packed, named_by_form, plain_lines
from agentic_r_plugin.storage.lookup import key_hash
from agentic_r_plugin.store import atomic_path, parse_line, read_json, sampled_fingerprint, shards, write_json

TABLE, PASSAGES, IDENTITY = "corpus_rows.npy", "corpus_passages.jsonl", "corpus.json"
"""Files of a saved table: (4, N) int64 numbers, the unpacked passages of a packed corpus, and the source's identity."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".tsv", ".tsv.gz")
"""File name suffixes of corpora."""

_BLOCK = 3 * 65_536
"""Numbers per write while a corpus is scanned."""

_STARTS, _LINES, _HASHES, _ORDER = range(4)


class Corpus:
    """Passages by row and by id; row order is index order. Safe to use from several threads and processes.

    The positions of passages are in an unnamed temporary file (32 bytes per passage) or in a saved table.

    Args:
        path: `.jsonl` (or one JSON list), `.jsonl.gz`, `.jsonl.zst` or `.parquet`, or a link to one, with the fields
            that `forms.passage_fields` reads: `id` and `contents`, or title and text as in Search-R1, BEIR and
            Tevatron. `metadata` and `url` are kept, other fields are ignored. Also `.tsv` and `.tsv.gz` of DPR and MS
            MARCO (passages and documents), and a folder of JSON or Parquet shards, read in the order of their names.
        table: a folder written by `save_table`; ignored if `path` has changed since. None or "" for no table.

    Raises:
        RecordError: no such file, no passage, a broken line, a missing field, or a duplicate id; names file and line.
    """

    def __init__(self, path: str | Path, *, table: str | Path | None = None) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise RecordError("no such corpus file", path=self.path)
        identity = _identity(self.path)
        named = named_by_form(self.path)
        self.packed = is_packed(named)
        saved = _read_table(Path(table), identity) if table else None
        self._paths = shards(self.path) if self.path.is_dir() and not self.packed else [self.path]
        # A packed corpus cannot be read in place; its unpacked copy is saved with the table.
        sources = [Path(table or "") / PASSAGES] if self.packed else self._paths
        if saved is not None and sources[0].is_file():
            self._files = _Files([os.open(source, os.O_RDONLY) for source in sources])
            self._table, self._digest = saved
        else:
            with ExitStack() as opened:
                streams = [
                    opened.enter_context(plain_lines(named if path == self.path else path)) for path in self._paths
                ]
                # The streams close at the end of this block; the duplicates stay open for reads.
                self._files = _Files([os.dup(stream.fileno()) for stream in streams])
                try:
                    self._table, self._digest = self._scan(streams)
                    self._check_duplicates()
                except BaseException:
                    self.close()
                    raise
        self._identity = identity

    def _scan(self, streams: Sequence[IO[bytes]]) -> tuple[NDArray[np.int64], str]:
        """Read the whole corpus; returns the table and the digest of all ids and contents."""
        digest, position, count = hashlib.sha256(), 0, 0
        block = array("q")
        found = tempfile.TemporaryFile()  # noqa: SIM115 (must live as long as its mapping)
        of_file = zip(self._paths, streams, strict=True)
        for path, number, line in ((path, *item) for path, stream in of_file for item in enumerate(stream, start=1)):
            start, position = position, position + len(line)
            if not line.strip():
                continue
            try:
                identifier, contents = passage_fields(parse_line(line, path, number))
            except RecordError as error:
                raise error if error.path else RecordError(str(error), path=path, line=number) from error
            # Three numbers per passage: byte position (through all files), line number, hash of the id.
            block.extend((start, number, key_hash(identifier)))
            count += 1
            if len(block) >= _BLOCK:
                block.tofile(found)
                del block[:]
            for part in (identifier, contents):
                encoded = part.encode("utf-8", "surrogatepass")
                # Lengths go into the digest too, so that an id and its contents cannot be split differently.
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
        if not count:
            raise RecordError("the corpus is empty; expected one passage per line", path=self.path)
        block.tofile(found)
        found.flush()
        # The table is stored by column, which needs the number of passages; only the hashes are sorted in memory.
        rows = np.memmap(found, np.int64, "r", shape=(count, 3))
        kept = tempfile.TemporaryFile()  # noqa: SIM115
        table = np.memmap(kept, np.int64, "w+", shape=(4, count))
        table[_STARTS], table[_LINES] = rows[:, 0], rows[:, 1]
        hashes = np.array(rows[:, 2])
        table[_ORDER] = np.argsort(hashes.view(np.uint64), kind="stable")
        table[_HASHES] = hashes[table[_ORDER]]
        return table, digest.hexdigest()[:16]

    @property
    def _hashes(self) -> NDArray[np.uint64]:
        return self._table[_HASHES].view(np.uint64)

    def _check_duplicates(self) -> None:
        order = self._table[_ORDER]
        # Equal hashes are adjacent in the sorted table. They can collide, so the ids themselves are compared.
        for place in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]):
            first, second = sorted((int(order[place]), int(order[place + 1])))
            if (identifier := self[first].id) == self[second].id:
                (path, line), (other, other_line) = self._place(first), self._place(second)
                first_at = f"line {line}" if path == other else f"{path}:{line}"
                raise RecordError(
                    f"duplicate passage id {identifier!r}, first at {first_at}", path=other, line=other_line
                )

    def _place(self, row: int) -> tuple[Path, int]:
        """File and line of a row."""
        return self._paths[self._files.number(int(self._table[_STARTS, row]))], int(self._table[_LINES, row])

    def save_table(self, folder: str | Path) -> None:
        """Write the files for `Corpus(path, table=folder)`, including the unpacked passages of a packed corpus."""
        folder = Path(folder)
        if self.packed:
            self.save_passages(folder / PASSAGES)
        with atomic_path(folder / TABLE) as temporary, temporary.open("wb") as out:
            np.save(out, self._table)
        write_json(folder / IDENTITY, self._identity | {"fingerprint": self._digest, "rows": len(self)})

    def save_passages(self, path: Path) -> None:
        """Write the unpacked passages of a packed corpus, as JSON Lines."""
        with atomic_path(path) as temporary, temporary.open("wb") as out:
            for start in range(0, self._files.size, 1 << 20):
                out.write(self._files.read(1 << 20, start))

    def __len__(self) -> int:
        return int(self._table.shape[1])

    def __getitem__(self, row: int) -> Passage:
        """The passage in row `row`, counted from 0.

        Raises:
            IndexError: no such row.
            RecordError: the file has changed since it was opened.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path}: row {row} of a corpus of {len(self)} passages")
        start = int(self._table[_STARTS, row])
        # Up to the next passage. Blank lines in between are white space to JSON, and a read ends with its file.
        end = int(self._table[_STARTS, row + 1]) if row + 1 < len(self) else self._files.size
        try:
            found = json.loads(self._files.read(end - start, start))
            return Passage.from_contents(*passage_fields(found), passage_metadata(found))
        except (ValueError, RecordError) as error:
            path, line = self._place(row)
            raise RecordError(
                f"no passage is where row {row} was; the file has changed since it was opened", path=path, line=line
            ) from error

    def __iter__(self) -> Iterator[Passage]:
        return (self[row] for row in range(len(self)))

    def row_of(self, identifier: str) -> int | None:
        """Row of a passage id, or None if the corpus does not contain it."""
        wanted, hashes = np.uint64(key_hash(identifier) % 2**64), self._hashes
        place = int(np.searchsorted(hashes, wanted))
        while place < len(self) and hashes[place] == wanted:
            row = int(self._table[_ORDER, place])
            # Different ids can have the same hash.
            if self[row].id == identifier:
                return row
            place += 1
        return None

    def __contains__(self, identifier: object) -> bool:
        return isinstance(identifier, str) and self.row_of(identifier) is not None

    def documents(self, ids: Iterable[str]) -> list[Passage | None]:
        """The passages with these ids; None for an unknown id."""
        rows = map(self.row_of, ids)
        return [None if row is None else self[row] for row in rows]

    def by_id(self, identifier: str) -> Passage:
        """The passage with this id.

        Raises:
            RecordError: the corpus does not contain it.
        """
        row = self.row_of(identifier)
        if row is None:
            hint = (
                "; the retrieval service gave this passage without an id: use a service whose documents have the ids "
                "of this corpus (agentic-r serve)"
            )
            reason = f"no passage with id {identifier!r} in this corpus{hint if identifier.startswith(TEXT_ID) else ''}"
            raise RecordError(reason, path=self.path)
        return self[row]

    def fingerprint(self) -> str:
        """Hash of all ids and contents in order; the same for every format of a corpus."""
        return self._digest

    def close(self) -> None:
        """Close the files; safe to call twice."""
        self._files.close()

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Files:
    """Open files that are read as one: positions count through all of them."""

    def __init__(self, fds: list[int]) -> None:
        self._fds, self._ends = fds, list(accumulate(os.fstat(fd).st_size for fd in fds))
        self.size = self._ends[-1]

    def number(self, start: int) -> int:
        """Which file holds this position."""
        return min(bisect_right(self._ends, start), len(self._ends) - 1)

    def read(self, count: int, start: int) -> bytes:
        """Up to `count` bytes, within one file."""
        # `pread` has no shared position, so threads and forked processes can read at the same time.
        number = self.number(start)
        return os.pread(self._fds[number], count, start - (self._ends[number - 1] if number else 0))

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    __del__ = close


def corpus_file(folder: Path) -> Path:
    """The corpus file in a benchmark's folder; `corpus.jsonl` if there is none yet."""
    files = [folder / f"corpus{suffix}" for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])


def count_lines(path: Path) -> int:
    """Approximate number of passages, without parsing them; 0 if there is no such file."""
    if not path.exists():
        return 0
    if path.is_dir():
        return sum(map(count_lines, shards(path)))
    named = named_by_form(path)
    if named.suffix == ".parquet":
        import pyarrow.parquet

        return int(pyarrow.parquet.read_metadata(path).num_rows)
    return sum(block.count(b"\n") for block in blocks(named))


def _identity(path: Path) -> dict[str, Any]:
    """Values that change when a file is written to, even if its size and date are preserved."""
    if path.is_dir():
        # Tables of folders that were unpacked have no entry "packed".
        return {"name": path.name, "shards": [_identity(shard) for shard in shards(path)], "packed": is_packed(path)}
    if not path.exists():
        raise RecordError("no such corpus file; a link to a file that was moved or deleted", path=path)
    status = path.stat()
    return {
        "name": path.name,
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "sample": sampled_fingerprint(path),
    }


def _read_table(folder: Path, identity: dict[str, Any]) -> tuple[NDArray[np.int64], str] | None:
    """The saved table, mapped, and the fingerprint; None if the folder has no table of this exact file."""
    if not (folder / IDENTITY).is_file() or not (folder / TABLE).is_file():
        return None
    saved = read_json(folder / IDENTITY)
    if not isinstance(saved, dict) or any(saved.get(key) != value for key, value in identity.items()):
        return None
    try:
        table = np.load(folder / TABLE, mmap_mode="r")
    except (ValueError, EOFError):
        return None
    if table.shape != (4, saved.get("rows")) or table.dtype != np.int64:
        return None
    return table, str(saved["fingerprint"])
