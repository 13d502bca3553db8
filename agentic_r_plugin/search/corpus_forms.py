"""Forms of corpora, as rows or unpacked into JSON Lines: packed and Parquet files, JSON lists, DPR and MS MARCO."""

from __future__ import annotations

import csv
import io
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any

from agentic_r_plugin.errors import RecordError, located
from agentic_r_plugin.forms import ID_FIELDS, PASSAGE_FIELDS, passage_fields, passage_metadata
from agentic_r_plugin.store import PACKINGS, begins_list, broken_file, dump_line, read_lines, shards, unpacked


def named_by_form(path: Path) -> Path:
    """The path whose suffix gives the format: the link's target if that is packed, else the path itself.

    Blobs in a hub cache have no suffix; only the link to them has one.
    """
    leads_to = path.resolve()
    return leads_to if is_packed(leads_to) else path


def is_packed(path: Path) -> bool:
    """Whether a corpus must be unpacked before its passages can be read in place."""
    if path.is_dir():
        return any(is_packed(named_by_form(shard)) for shard in shards(path))
    return path.suffix in (*PACKINGS, ".parquet", ".tsv") or _is_list(path)


def _is_list(path: Path) -> bool:
    """Whether a JSON file holds one list instead of lines."""
    with unpacked(path) as stream:
        try:
            return begins_list(stream)
        except (OSError, EOFError, zlib.error):
            return False  # reported by `blocks`


def plain_lines(path: Path) -> IO[bytes]:
    """The corpus as a JSON Lines file, open at its beginning."""
    if not is_packed(path):
        return path.open("rb")
    stream = tempfile.TemporaryFile()  # noqa: SIM115 (closed by the caller)
    try:
        if path.is_dir() or path.suffix == ".parquet" or ".tsv" in path.suffixes or _is_list(path):
            for shard in shards(path):
                stream.writelines(_passage_lines(shard))
        else:
            stream.writelines(blocks(path))
        stream.flush()
        stream.seek(0)
    except BaseException:
        stream.close()
        raise
    return stream


def _passage_lines(path: Path) -> Iterator[bytes]:
    """The passages of a file as JSON lines, each on the line on which it is in the file (or later).

    Raises:
        RecordError: a row that is no passage; names file and line (Parquet: row).
    """
    written = 0
    for number, row in corpus_rows(path):
        with located(path, number):
            identifier, contents = passage_fields(row)
        # Blank lines keep each passage on the line of its source, which errors then name.
        yield b"\n" * (number - written - 1) + passage_line(identifier, contents, passage_metadata(row))
        written = max(number, written + 1)


def passage_line(identifier: str, contents: str, metadata: Mapping[str, Any]) -> bytes:
    """A line of a corpus; `metadata` only if there is any."""
    return dump_line({"id": identifier, "contents": contents} | ({"metadata": dict(metadata)} if metadata else {}))


def corpus_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(line or row from 1, row) of a corpus file in any form; of Parquet only the columns of passages.

    Raises:
        RecordError: a broken line, or a Parquet file without the columns of passages; names file and line.
    """
    if path.suffix == ".parquet":
        return read_lines(path, columns=_columns(path))
    if ".tsv" in path.suffixes:
        return _tsv_rows(path)
    return read_lines(path)


def _tsv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of DPR's passages (quoted, with a header that names id, text and title) or MS MARCO's, without a header and
    unquoted: passages (id, text), or documents (id, url, title, text).

    Raises:
        RecordError: a line with other fields or not in UTF-8; names file and line.
    """
    number = 1
    try:
        with unpacked(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="\n") as text:
            first = text.readline()
            names = first.rstrip("\r\n").split("\t")
            if "text" not in names or not set(ID_FIELDS) & set(names):
                documents = len(names) > 3 and names[1].startswith(("http://", "https://"))
                fields = ("id", "url", "title", "text") if documents else ("id", "text")
                for number, line in enumerate(chain([first], text), start=1):
                    # The text is the last field and may hold tabs.
                    values = line.rstrip("\r\n").split("\t", len(fields) - 1)
                    if line.strip() and len(values) < len(fields):
                        expected = "an id, an address, a title and a text" if documents else "an id, a tab and a text"
                        raise RecordError(f"expected {expected}, found {line.strip()[:80]!r}", path=path, line=number)
                    if line.strip():
                        yield number, dict(zip(fields, values, strict=True))
                return
            # The default limit of a cell, 131,072 characters, is less than a long document has.
            csv.field_size_limit(1 << 30)
            rows = csv.reader(text, delimiter="\t", strict=True)
            for row in rows:
                # An unquoted cell that begins with a quotation mark would swallow the lines up to the next mark.
                if any("\n" in cell for cell in row):
                    raise csv.Error("a cell holds a line break")
                number = rows.line_num + 1  # the header was read before
                if row and len(row) != len(names):
                    raise RecordError(f"expected {len(names)} fields, found {len(row)}", path=path, line=number)
                if row:
                    yield number, dict(zip(names, row, strict=True))
    except csv.Error as error:
        reason = (
            f"a cell is not quoted as expected ({error}): quote a cell that begins with a quotation mark, double the "
            "marks within it, and replace line breaks; or write the passages as JSON Lines"
        )
        raise RecordError(reason, path=path, line=number + 1) from error
    except UnicodeDecodeError as error:
        raise RecordError(f"expected tab-separated UTF-8: {error}", path=path, line=number + 1) from error
    except (OSError, EOFError, zlib.error) as error:
        raise broken_file(error, path) from error


def _columns(path: Path) -> list[str]:
    """Columns of a Parquet corpus that make a passage, and `metadata` and `url`; others may be large.

    Raises:
        RecordError: not a Parquet file, or no columns that make a passage.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
    except pyarrow.ArrowException as error:
        raise RecordError(f"not a whole Parquet file: {error}", path=path) from error
    with located(path):
        passage_fields(dict.fromkeys(schema.names, ""))
    kept = [
        name for name in ("metadata", "url") if name in schema.names and "binary" not in str(schema.field(name).type)
    ]
    return [*(name for name in PASSAGE_FIELDS if name in schema.names), *kept]


def blocks(path: Path) -> Iterator[bytes]:
    """The unpacked bytes of a file, in blocks of a megabyte.

    Raises:
        RecordError: the file is truncated or broken.
    """
    try:
        with unpacked(path) as stream:
            while block := stream.read(1 << 20):
                yield block
    except (OSError, EOFError, zlib.error) as error:
        raise broken_file(error, path) from error
