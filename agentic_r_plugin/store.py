"""Reading and writing record files: JSON (also packed) or Parquet, by file name, or a folder of shards.

Reading checks every record and names file and line in errors. Writing goes to a temporary file next to the target,
which is renamed at the end: a file that exists is complete.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import json
import os
import re
import tempfile
import types
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from decimal import Decimal
from enum import Enum
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.records import Record

RecordType = TypeVar("RecordType", bound=Record)

_PARQUET_BATCH = 1024


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
            try:
                record = cls.from_dict(data)
            except RecordError as error:
                raise RecordError(str(error), path=shard, line=number) from error
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


def _check_readable(path: Path) -> None:
    if _DATA.search(path.name) and not _READ.search(path.name):
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
        yield from _read_parquet(path, columns)
        return
    number, started = 0, False
    try:
        with unpacked(path) as stream:
            if begins_list(stream):
                yield from read_list(stream, path)
                return
            for number, line in enumerate(stream, start=1):
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


def parse_json(text: bytes | str) -> Any:
    """One JSON value whose strings are valid text.

    Raises:
        ValueError: bad UTF-8, bad JSON, or a lone surrogate (`\\ud83d`), which tokenizers and files do not accept.
        RecursionError: nested too deeply.
    """
    value = json.loads(text)
    data = text.encode() if isinstance(text, str) else text
    if rb"\ud" in data or rb"\uD" in data:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def parse_line(line: bytes, path: str | Path, number: int) -> Any:
    """Parse one line as a JSON value.

    Raises:
        RecordError: bad UTF-8, bad JSON, or a lone surrogate.
    """
    try:
        return parse_json(line)
    except UnicodeDecodeError as error:
        raise RecordError(f"expected UTF-8: {error}", path=path, line=number) from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise RecordError(f"expected text, found {half!r}, half a surrogate pair", path=path, line=number) from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"expected one JSON object per line: {error}", path=path, line=number) from error


def begins_list(stream: IO[bytes]) -> bool:
    """Whether an unpacked stream, which has not been read from, begins with a JSON list."""
    head: bytes = cast(Any, stream).peek(4096)
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


_LIST_BLOCK = 1 << 20
_LIST_START, _LIST_SEPARATOR = re.compile(r"\s*\[[ \t\r\n]*"), re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")
_AFTER_ITEM = re.compile(r"[,\]\s]")


def read_list(stream: IO[bytes], path: Path) -> Iterator[tuple[int, Any]]:
    """Items of a JSON list, each with the line on which it begins; memory holds a block, or an item if it is longer.

    Raises:
        RecordError: not one list of JSON values in UTF-8.
    """
    text, comma, line = _ListText(stream), None, 1
    try:
        text.skip(_LIST_START)
        while not text.ahead("]") or comma:
            line = text.line
            if comma == "":
                raise ValueError("expected a comma between two items")
            yield line, parse_line(text.item().encode(), path, line)
            comma = text.skip(_LIST_SEPARATOR)[1]
        text.require_end()
    except UnicodeDecodeError as error:
        raise RecordError(f"expected UTF-8: {error}", path=path) from error
    except (ValueError, RecursionError) as error:
        expected = "expected one JSON object per line, or a list of them"
        raise RecordError(f"{expected}: {error}", path=path, line=line) from error


class _ListText:
    """The text of a JSON list, of which a part is in memory; `line` is that of the position, from 1."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.line = 1
        self._text, self._at, self._stream, self._ended = "", 0, stream, False
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._decoder = json.JSONDecoder()

    def ahead(self, character: str) -> bool:
        """Whether this character is next."""
        return self._text.startswith(character, self._at)

    def skip(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Go on behind what the pattern matches here, if only nothing."""
        while True:
            found = pattern.match(self._text, self._at)
            if (found is None or found.end() == len(self._text)) and self._more():
                continue
            if found is None:
                raise ValueError(f"expected a list, found {self._text[self._at :][:80]!r}")
            self._advance(found.end())
            return found

    def item(self) -> str:
        """The JSON value that is next."""
        while True:
            try:
                _, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError:  # perhaps only a part of the value is in memory
                if not self._more():
                    raise
                continue
            if not _AFTER_ITEM.match(self._text, end) and self._more():  # "3." is part of a number
                continue
            found = self._text[self._at : end]
            self._advance(end)
            return found

    def require_end(self) -> None:
        """Nothing but white space may follow the bracket that is next."""
        self._advance(self._at + 1)
        while not self._text[self._at :].strip():
            self._advance(len(self._text))
            if not self._more():
                return
        raise ValueError("something follows the list")

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        """Read on, as much again as is in memory; False at the end of the file."""
        if self._ended:
            return False
        kept = self._text[self._at :]
        block = self._stream.read(max(_LIST_BLOCK, len(kept)))
        self._ended = not block
        self._text, self._at = kept + self._decode(block, self._ended), 0
        return True


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            for column in columns:
                if column not in names:
                    found = ", ".join(map(repr, names))
                    raise RecordError(f"expected a column {column!r}, found only {found}", path=path)
            convert = any(_NOT_JSON.search(str(kind)) for kind in table.schema_arrow.types)
            for batch in table.iter_batches(_PARQUET_BATCH, columns=list(columns) or None):
                try:
                    rows = batch.to_pylist()
                except (ValueError, OverflowError) as error:
                    where = f"rows {number + 1} to {number + len(batch)}"
                    raise RecordError(f"{where} hold a value that is not valid: {error}", path=path) from error
                for row in rows:
                    number += 1
                    yield number, _from_parquet_row(_json_value(row) if convert else row, path, number)
    except (pyarrow.ArrowException, OSError) as error:
        raise RecordError(f"not a whole Parquet file, or not one that pyarrow reads: {error}", path=path) from error


_NOT_JSON = re.compile("binary|decimal|date|time|duration|interval|extension")
"""Parquet types whose values JSON lacks (field names in a struct may match too, which only costs time)."""


def _json_value(value: Any) -> Any:
    """A Parquet value with JSON types: Spark's binary text, whole decimals, and dates as text. Bytes that are no text
    stay as they are: they may belong to an ignored field, and the record check refuses them elsewhere."""
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    if isinstance(value, tuple):  # an entry of a map
        return tuple(map(_json_value, value))
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, Decimal):
        return int(value) if value.is_finite() and value == value.to_integral_value() else float(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _from_parquet_row(row: dict[str, Any], path: Path, number: int) -> dict[str, Any]:
    for key in _JSON_COLUMNS & row.keys():
        found = row[key]
        if key == "scores" and "schema" not in row:
            continue  # a column of another project
        if isinstance(found, str):
            if key == "scores":  # metadata that is not JSON may be text of another project
                row[key] = parse_line(found.encode(), path, number)
        elif found is None:
            del row[key]
        elif isinstance(found, list) and all(isinstance(item, tuple) and isinstance(item[0], str) for item in found):
            row[key] = dict(found)  # a map; the items of a list are no tuples
        elif isinstance(found, Mapping):  # a struct, which has the keys of all rows
            row[key] = {name: value for name, value in found.items() if value is not None}
    return row


_JSON_COLUMNS = frozenset({"scores", "metadata"})
"""Fields whose keys are data. Parquet would make every key a column of every row, so they are stored as JSON text;
structs and maps, as other projects write them, can also be read."""


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """Write all records atomically; returns their number. The format follows the file name, as in `read_records`."""
    path = Path(path)
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            return _write_parquet(temporary, records)
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


def dump_line(data: Any) -> bytes:
    """One JSON line in UTF-8, including the newline."""
    return (json.dumps(data, ensure_ascii=False) + "\n").encode()


def _write_parquet(path: Path, records: Iterable[Record]) -> int:
    import pyarrow
    import pyarrow.parquet

    iterator = iter(records)
    first = next(iterator, None)
    if first is None:
        pyarrow.parquet.write_table(pyarrow.table({}), path)
        return 0
    schema, iterator, count = _parquet_schema(type(first)), chain([first], iterator), 0
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while rows := [_parquet_row(record) for record in islice(iterator, _PARQUET_BATCH)]:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            count += len(rows)
    return count


def _parquet_schema(cls: type[Record]) -> Any:
    """Columns from the record's annotations, so that a column that is empty in the first rows still has its type."""
    import pyarrow

    tag = [] if cls.schema is None else [("schema", pyarrow.string())]
    return pyarrow.schema(tag + _parquet_fields(cls))


def _parquet_fields(cls: type) -> list[tuple[str, Any]]:
    hints = get_type_hints(cls)
    return [(item.name, _parquet_type(hints[item.name])) for item in fields(cls)]


def _parquet_type(hint: Any) -> Any:
    import pyarrow

    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _parquet_type(next(option for option in arguments if option is not type(None)))
    if origin is tuple:
        return pyarrow.list_(_parquet_type(arguments[0]))
    if (isinstance(origin, type) and issubclass(origin, Mapping)) or issubclass(hint, Enum):
        return pyarrow.string()
    if isinstance(hint, type) and is_dataclass(hint):
        return pyarrow.struct(_parquet_fields(hint))
    return {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}[hint]


def _parquet_row(record: Record) -> dict[str, Any]:
    return {
        key: json.dumps(value, ensure_ascii=False) if key in _JSON_COLUMNS else value
        for key, value in record.to_dict().items()
    }


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
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
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
