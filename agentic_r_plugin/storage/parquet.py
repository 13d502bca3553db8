"""Rows of Parquet files as JSON values, and records as Parquet."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from decimal import Decimal
from enum import Enum
from itertools import chain, islice
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.records import Record
from agentic_r_plugin.storage.json_text import parse_line

_BATCH = 1024


def read_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """(row from 1, its fields) of each row; with `columns` only these.

    Raises:
        RecordError: not a whole Parquet file, no such column, or values that are not valid.
    """
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
            # Decided once per file: most files need no conversion, which visits every value.
            convert = any(_NOT_JSON.search(str(kind)) for kind in table.schema_arrow.types)
            for batch in table.iter_batches(_BATCH, columns=list(columns) or None):
                try:
                    rows = batch.to_pylist()
                except (ValueError, OverflowError) as error:
                    where = f"rows {number + 1} to {number + len(batch)}"
                    raise RecordError(f"{where} hold a value that is not valid: {error}", path=path) from error
                for row in rows:
                    number += 1
                    yield number, _from_row(_json_value(row) if convert else row, path, number)
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


def _from_row(row: dict[str, Any], path: Path, number: int) -> dict[str, Any]:
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


def write_parquet(path: Path, records: Iterable[Record]) -> int:
    """Write records of one type; returns their number. Without a record, the file has no columns."""
    import pyarrow
    import pyarrow.parquet

    iterator = iter(records)
    first = next(iterator, None)
    if first is None:
        pyarrow.parquet.write_table(pyarrow.table({}), path)
        return 0
    schema, iterator, count = _schema(type(first)), chain([first], iterator), 0
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while rows := [_row(record) for record in islice(iterator, _BATCH)]:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
            count += len(rows)
    return count


def _schema(cls: type[Record]) -> Any:
    """Columns from the record's annotations, so that a column that is empty in the first rows still has its type."""
    import pyarrow

    tag = [] if cls.schema is None else [("schema", pyarrow.string())]
    return pyarrow.schema(tag + _fields(cls))


def _fields(cls: type) -> list[tuple[str, Any]]:
    hints = get_type_hints(cls)
    return [(item.name, _type(hints[item.name])) for item in fields(cls)]


def _type(hint: Any) -> Any:
    import pyarrow

    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _type(next(option for option in arguments if option is not type(None)))
    if origin is tuple:
        return pyarrow.list_(_type(arguments[0]))
    if (isinstance(origin, type) and issubclass(origin, Mapping)) or issubclass(hint, Enum):
        return pyarrow.string()
    if isinstance(hint, type) and is_dataclass(hint):
        return pyarrow.struct(_fields(hint))
    return {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}[hint]


def _row(record: Record) -> dict[str, Any]:
    return {
        key: json.dumps(value, ensure_ascii=False) if key in _JSON_COLUMNS else value
        for key, value in record.to_dict().items()
    }
