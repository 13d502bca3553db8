"""Values of fields as other projects write them: absent in several ways, numbers for names, lists written as text."""

from __future__ import annotations

import ast
import json
import tokenize
import warnings
from collections.abc import Iterable, Mapping
from io import StringIO
from typing import Any

from agentic_r_plugin.errors import RecordError

Row = Mapping[str, Any]

_ANSWER_PARTS = ("target", "text", "value", "aliases")
"""Keys of an object that holds gold answers."""

_NO_ANSWERS = frozenset({"", "<unk>", "No Answer Present."})
"""What data sets write instead of an answer that is unknown: TriviaQA's test split, MS MARCO."""


def absent(value: Any) -> bool:
    """Whether a field's value is null or NaN."""
    return value is None or (isinstance(value, float) and value != value)


def name_of(value: Any, field: str) -> str | None:
    """An id or title as text: `12` and `12.0` (from a pandas column with gaps) become "12". None if it is absent.

    Raises:
        RecordError: another type.
    """
    if absent(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return value
    raise RecordError(f"field {field!r}: expected text or a whole number, found {described(value)}")


def listed(metadata: Row | None, field: str) -> list[str]:
    """A metadata field that holds a list of texts; a single text or number is a list of one, an absent field is empty.

    Raises:
        RecordError: another type.

    >>> listed({"gold_doc_ids": "12"}, "gold_doc_ids"), listed({"gold_doc_ids": [3, None]}, "gold_doc_ids")
    (['12'], ['3'])
    """
    value = plain((metadata or {}).get(field))
    values = value if isinstance(value, list | tuple) else [value]
    names = []
    for item in values:
        decoded = decoded_text(item, f"metadata.{field}")
        parts = decoded if isinstance(decoded, list) else [item]
        names += [name_of(part, f"metadata.{field}") for part in parts]
    return [name for name in names if name is not None]


def answers(value: Any, field: str = "golden_answers") -> list[str]:
    """Gold answers: a text is one answer, a list holds several; `{"target"}`, `{"text"}` and `{"value", "aliases"}` of
    other data sets hold either. Blank and absent answers are dropped.

    A list of texts or an object that is itself written as text (JSON, or Python's repr as in a CSV file) is decoded.
    An integer is converted as written: 1921 becomes "1921". `1921.0` and `true` are refused, because "1921.0" and
    "True" are unlikely to be the intended answers.

    Raises:
        RecordError: another type, or a list written as text whose items are not texts.
    """
    value = plain(value)
    if isinstance(value, Mapping):
        if not set(_ANSWER_PARTS) & value.keys() and any(not absent(item) for item in value.values()):
            raise RecordError(f"field {field!r}: expected text or a list of texts, found {described(value)}")
        return unique(answer for name in _ANSWER_PARTS for answer in answers(value.get(name), field))
    if isinstance(value, list | tuple):
        return [answer for item in value for answer in _answer(item, field)]
    return _answer(value, field)


def _answer(value: Any, field: str) -> list[str]:
    if absent(value):
        return []
    if isinstance(value, int) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, str):
        decoded = decoded_text(value, field)
        if isinstance(decoded, list) and not all(absent(item) or isinstance(item, str) for item in decoded):
            raise RecordError(f"field {field!r}: expected a list, found a list that is written as text: {value[:80]!r}")
        if isinstance(decoded, list) or (decoded and set(_ANSWER_PARTS) & decoded.keys()):
            return answers(decoded, field)
        return [] if value.strip() in _NO_ANSWERS else [value]
    raise RecordError(f"field {field!r}: expected text, found {described(value)}; write each answer as text")


def decoded_text(value: Any, field: str) -> list[Any] | dict[str, Any] | None:
    """The list or object that a text holds as JSON or as Python's repr (pandas writes it to CSV), else None.

    Raises:
        RecordError: the repr of a NumPy array, whose items cannot be separated, or half a surrogate pair.

    >>> decoded_text("['Paris', 'Rome']", "golden_answers"), decoded_text("[Intro]", "golden_answers")
    (['Paris', 'Rome'], None)
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", "array(")):
        return None
    text = value.strip()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = _python_literal(text)
        if (found is None and "array([" in text) or _joins_strings(text, found):
            reason = f"found a NumPy array written as text: {value[:80]!r}; write a JSON list instead"
            raise RecordError(f"field {field!r}: {reason}") from None
    if not isinstance(found, list | dict):
        return None
    try:
        # Fails for half a surrogate pair, and for Python values that JSON does not have (bytes, sets).
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise RecordError(f"field {field!r}: expected JSON, found {value[:80]!r}: {error}") from error
    return found


def _python_literal(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape sequence, say
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _joins_strings(text: str, found: Any) -> bool:
    """Whether Python joined adjacent strings: NumPy writes `['Paris' 'Rome']`, without a comma."""
    if not isinstance(found, list | dict):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Adjacent strings are several tokens, but one constant in the tree.
        nodes = ast.walk(ast.parse(text, mode="eval"))
    values = sum(isinstance(node, ast.Constant) and isinstance(node.value, str) for node in nodes)
    tokens = tokenize.generate_tokens(StringIO(text).readline)
    return sum(token.type == tokenize.STRING for token in tokens) > values


def column_value(row: Any, path: str) -> Any:
    """Value at a dotted path; None if there is none. Of a list of objects, the values of all, as one list.

    >>> column_value({"a": [{"b": 1}, {"b": [2, 3]}]}, "a.b")
    [1, 2, 3]
    """
    value = row
    for name in path.split("."):
        value = plain(value)
        if isinstance(value, str):
            value = decoded_text(value, path)
        if isinstance(value, list):
            parts = [plain(item.get(name)) for item in mappings(value)]
            value = [item for part in parts for item in (part if isinstance(part, list) else [part])]
        else:
            value = value.get(name) if isinstance(value, Mapping) else None
    return value


def plain(value: Any) -> Any:
    """Convert a NumPy array, as some frameworks pass it, to a list."""
    return value.tolist() if hasattr(value, "tolist") else value


def without_absent(value: Any) -> Any:
    """Drop absent values: Parquet gives every object the keys of all rows, with null where a row has none."""
    if isinstance(value, Mapping):
        return {key: without_absent(item) for key, item in value.items() if not absent(item)}
    if isinstance(value, list | tuple):
        return [without_absent(item) for item in value]
    return value


def mapping(row: Row, field: str) -> Row:
    """An object, also one written as text; empty if the field holds none.

    Raises:
        RecordError: text that begins as an object and is none.
    """
    value = row.get(field)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = decoded_text(value, field)
        if value is None:
            raise RecordError(f"field {field!r}: expected an object, found {described(row[field])}")
    return value if isinstance(value, Mapping) else {}


def mappings(value: Any) -> list[Row]:
    """The objects in a list; none in another value."""
    value = plain(value)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def unique(texts: Iterable[str]) -> list[str]:
    """Texts without repetitions, in order."""
    return list(dict.fromkeys(texts))


def field_names(row: Row) -> str:
    """The names of a row's fields, for messages."""
    return ", ".join(map(repr, row))


def described(value: Any) -> str:
    """A value's type and beginning, for messages."""
    return f"{type(value).__name__} {str(value)[:80]!r}"
