"""Reading and writing record files: JSON (also packed) or Parquet, by file name, or a folder of shards.

Reading checks every record and names file and line in errors. Writing goes to a temporary file next to the target,
which is renamed at the end: a file that exists is complete.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, cast

from agentic_r_plugin.errors import ConfigError, RecordError, located
from agentic_r_plugin.records import Record, RecordType
from agentic_r_plugin.storage.json_text import begins_list, parse_line, read_list
from agentic_r_plugin.storage.parquet import read_parquet, write_parquet


def read_records(path: str | Path, cls: type[RecordType]) -> Iterator[RecordType]:
    """Records of a JSON (also packed) or Parquet file, or of a folder of them, in order, one at a time.

    Raises:
        RecordError: no such file, a broken line, or a record that is not a `cls`; names file and line (Parquet: row).
    """
    return (record for _, _, record in placed_records(path, cls))


def placed_records(path: str | Path, cls: type[RecordType]) -> Iterator[tuple[Path, int, RecordType]]:
    """(file, line or Parquet row from 1, record) of each record; otherwise as `read_records`."""
    for shard in shards(path):
        for number, data in read_lines(shard):
            with located(shard, number):
                record = cls.from_dict(data)
            yield shard, number, record


def shards(path: str | Path) -> list[Path]:
    """The files of a path: the path itself, or the record files of a folder, sorted by name.

    Raises:
        RecordError: a folder without record files, or with data in a format that is not read.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    found = sorted(item for item in path.iterdir() if _DATA.search(item.name) and not _NO_SHARD.search(item.name))
    for item in found:
        _check_readable(item)
    if not found:
        raise RecordError(f"expected a record file or a folder of {_SHARDS} shards", path=path)
    # As shards of one folder, its queries would be read as passages, and its passages as questions.
    if {"corpus.jsonl", _QUERIES} <= {item.name for item in found}:
        splits = ", ".join(str(file) for file in sorted(path.glob("qrels/*.tsv"))) or path / _QUERIES
        raise RecordError(
            f"a BEIR data set: name its corpus, {path / 'corpus.jsonl'}, or the questions of a split, {splits}",
            path=path,
        )
    return found


_QUERIES = "queries.jsonl"


def beir_queries(path: Path) -> Path | None:
    """The questions of the BEIR data set that a file `qrels/SPLIT.tsv` belongs to; None for other files."""
    path = path.absolute()
    queries = path.parent.parent / _QUERIES
    return queries if path.suffix == ".tsv" and path.parent.name == "qrels" and queries.is_file() else None


def _is_readable(name: str) -> bool:
    """Whether a file of this name is not data in a format that is not read."""
    return not _DATA.search(name) or bool(_READ.search(name))


def _check_readable(path: Path) -> None:
    if not _is_readable(path.name):
        raise RecordError(f"expected {_SHARDS}; convert this file (in a folder of shards, move it away)", path=path)


_SHARDS = ".jsonl, .json (both also .gz, .zst) or .parquet"
_READ = re.compile(r"\.(jsonl|json|ndjson)(\.(gz|zst))?$|\.parquet$")
_DATA = re.compile(r"\.(jsonl|json|ndjson|parquet|csv|tsv|arrow)(\.(gz|zst|bz2|xz|lz4|zip))?$")
_NO_SHARD = re.compile(r"^[._]|\.(manifest|report)\.json$|\.errors\.jsonl$|^(dataset_infos?|state)\.json$")
"""Files next to records: hidden ones, those of our stages, and those of the Hugging Face hub."""


def without_suffixes(name: str) -> str:
    """The name of a record file without the suffixes of its format.

    >>> without_suffixes("nq.dev.jsonl.gz"), without_suffixes("nq")
    ('nq.dev', 'nq')
    """
    return _READ.sub("", name)


def read_lines(
    path: str | Path, *, columns: Sequence[str] = (), keep_errors: bool = False
) -> Iterator[tuple[int, Any]]:
    """(line number from 1, parsed JSON) of each non-empty line, or Parquet row as a dict.

    A file that holds one JSON list gives its items, each with the line on which it begins; one that holds a single
    object over several lines gives that.

    Args:
        columns: the only columns to read from a Parquet file; empty reads all.
        keep_errors: give the RecordError of a broken line in its place, and go on.

    Raises:
        RecordError: no such file, a line that is not UTF-8 JSON, or a Parquet file without one of the `columns`.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError("no such file", path=path)
    _check_readable(path)
    if path.suffix == ".parquet":
        yield from read_parquet(path, columns)
        return
    number, started = 0, False
    try:
        with unpacked(path) as stream:
            if begins_list(stream):
                yield from read_list(stream, path)
                return
            for number, line in enumerate(stream, start=1):
                # One object over several lines: a line of JSON Lines is never a lone brace.
                if not started and line.strip() == b"{":
                    line += stream.read()
                if line.strip():
                    started = True
                    try:
                        value = parse_line(line, path, number)
                    except RecordError as error:
                        if not keep_errors:
                            raise
                        value = error
                    yield number, value
    except (OSError, EOFError, zlib.error) as error:
        raise broken_file(error, path, number + 1) from error


PACKINGS = {".gz": "gzip", ".zst": "zstd"}
"""Suffixes of packed files that are read."""


@contextmanager
def unpacked(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading its bytes, unpacked if its suffix is one of `PACKINGS`.

    A broken file raises OSError, EOFError or zlib.error where it is read (`broken_file`).
    """
    if path.suffix == ".zst":
        import pyarrow

        with pyarrow.input_stream(str(path), compression="zstd") as packed, io.BufferedReader(packed, 1 << 20) as lines:
            yield cast(IO[bytes], lines)
    else:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            yield cast(IO[bytes], stream)


def broken_file(error: Exception, path: Path, line: int | None = None) -> RecordError:
    """The error for a file that cannot be read to its end."""
    found = f"not a whole {PACKINGS[path.suffix]} file" if path.suffix in PACKINGS else "the file cannot be read"
    return RecordError(f"{found}: {error}", path=path, line=line)


def check_suffix(path: str | Path) -> None:
    """Raise ConfigError if records would not be read again under this name, such as `x.csv`."""
    if not _is_readable(Path(path).name):
        raise ConfigError(f"{path}: records are written as {_SHARDS}; choose such a name")


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """Write all records atomically; returns their number. The format follows the file name, as in `read_records`.

    Raises:
        ConfigError: a name of another format.
    """
    path = Path(path)
    check_suffix(path)
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            return write_parquet(temporary, records)
        count = 0
        with ExitStack() as stack:
            stream: Any = stack.enter_context(temporary.open("wb"))
            if path.suffix == ".gz":  # no name or time, so that equal records give equal bytes
                stream = stack.enter_context(gzip.GzipFile("", "wb", fileobj=stream, mtime=0))
            elif path.suffix == ".zst":
                import pyarrow

                stream = stack.enter_context(pyarrow.CompressedOutputStream(stream, "zstd"))
            for record in records:
                stream.write(dump_line(record.to_dict()))
                count += 1
        return count


def drop_torn_end(path: str | Path) -> None:
    """Cut off the text after the last newline, left by a process that was killed while it appended a line."""
    if Path(path).is_file():
        with Path(path).open("rb+") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)


class StepLog:
    """A JSON Lines file that grows while work runs; each line has a `step`, in ascending order.

    A last line that a kill truncated is ignored.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records in a single write."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as stream:
            stream.write(b"".join(map(dump_line, records)))

    def read(self) -> list[dict[str, Any]]:
        """All records; none if there is no file.

        Raises:
            RecordError: a whole line is not JSON.
        """
        content = self.path.read_bytes() if self.path.is_file() else b""
        lines = enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1)
        return [parse_line(line, self.path, number) for number, line in lines if line.strip()]

    def has(self, step: int) -> bool:
        """Whether the step has a record."""
        return any(record["step"] == step for record in self.read())

    def keep_until(self, step: int) -> None:
        """Remove the records of later steps (all records for step 0) and a truncated last line."""
        if not self.path.is_file():
            return
        kept = [record for record in self.read() if step > 0 and record["step"] <= step]
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(b"".join(map(dump_line, kept)))


def dump_line(data: Any) -> bytes:
    """One JSON line in UTF-8, including the newline."""
    return (json.dumps(data, ensure_ascii=False) + "\n").encode()


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path next to `path`, renamed to it if the block succeeds and deleted if it fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # `mkstemp` makes files that only the owner can read. The umask can only be read by setting it.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        # Before the rename: even after a power failure, the target never holds a partial file.
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(path: str | Path) -> None:
    """Delete files that a killed process left from `atomic_path(path)`; only for the process that may write `path`."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):  # names given by `mkstemp`
        left.unlink(missing_ok=True)


def write_json(path: str | Path, data: Any) -> None:
    """Write one JSON document atomically, indented."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read one JSON document.

    Raises:
        RecordError: no such file, or not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError("no such file", path=path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"expected JSON: {error}", path=path) from error


_SAMPLES, _SAMPLED_BYTES = 16, 1 << 16


def sampled_fingerprint(path: str | Path) -> str:
    """Hash of a file's size and 16 blocks of 64 KiB spread over it: distinguishes large files at little cost."""
    path = Path(path)
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}:".encode())
    last = max(0, size - _SAMPLED_BYTES)
    with path.open("rb") as stream:
        for offset in sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)}):
            stream.seek(offset)
            digest.update(stream.read(_SAMPLED_BYTES))
    return digest.hexdigest()[:16]


def file_fingerprint(path: str | Path) -> str:
    """Hash of the bytes of a file, of a folder's shards in sequence, or of BEIR's qrels and questions (16 hex digits).

    Raises:
        RecordError: no such file.
    """
    digest, queries = hashlib.sha256(), beir_queries(Path(path))
    for shard in [*shards(path), *([queries] if queries else [])]:
        if not shard.is_file():
            raise RecordError("no such file", path=shard)
        with shard.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def absolute(path: str) -> str:
    """Make an existing path absolute; return a hub name, URL or empty string unchanged."""
    return str(Path(path).absolute()) if path and Path(path).exists() else path
