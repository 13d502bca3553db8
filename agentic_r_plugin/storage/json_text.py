"""JSON as it is read from files: a value, a line, and the items of a list that need not fit into memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from agentic_r_plugin.errors import RecordError, not_utf8


def parse_json(text: bytes | str) -> Any:
    """One JSON value whose strings are valid text.

    Raises:
        ValueError: bad UTF-8, bad JSON, or a lone surrogate (`\\ud83d`), which tokenizers and files do not accept.
        RecursionError: nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))  # strictly: `json.loads` lets half a surrogate pair pass
    value = json.loads(text)
    # Escapes can make half a surrogate pair, which encoding refuses. Text without them skips this second pass.
    if r"\ud" in text or r"\uD" in text:
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
        raise RecordError(not_utf8(error), path=path, line=number) from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise RecordError(f"expected text, found {half!r}, half a surrogate pair", path=path, line=number) from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"expected one JSON object per line: {error}", path=path, line=number) from error


def begins_list(stream: IO[bytes]) -> bool:
    """Whether an unpacked stream, which has not been read from, begins with a JSON list."""
    # `peek` leaves the bytes in the stream for whoever reads it next.
    head: bytes = cast(Any, stream).peek(4096)
    return head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


_LIST_BLOCK = 1 << 20  # bytes
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
        # After a comma the loop goes on even before "]": `item` then fails, since JSON has no trailing commas.
        while not text.ahead("]") or comma:
            line = text.line
            # `comma` is None before the first item and "" where none was found.
            if comma == "":
                raise ValueError("expected a comma between two items")
            # Parsed a second time, with the checks and errors of a line.
            yield line, parse_line(text.item().encode(), path, line)
            comma = text.skip(_LIST_SEPARATOR)[1]
        text.require_end()
    except UnicodeDecodeError as error:
        raise RecordError(not_utf8(error), path=path) from error
    except (ValueError, RecursionError) as error:
        expected = "expected one JSON object per line, or a list of them"
        raise RecordError(f"{expected}: {error}", path=path, line=line) from error


class _ListText:
    """The text of a JSON list, read in blocks; `line` is the line of the current position, from 1."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.line = 1
        self._text, self._at, self._stream, self._ended = "", 0, stream, False
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._decoder = json.JSONDecoder()

    def ahead(self, character: str) -> bool:
        """Whether this character is next."""
        return self._text.startswith(character, self._at)

    def skip(self, pattern: re.Pattern[str]) -> re.Match[str]:
        """Move past the match of a pattern at the current position, which may be empty."""
        while True:
            found = pattern.match(self._text, self._at)
            # A match that ends with the block may continue in the next one.
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
        """Move past the closing bracket; raise ValueError unless only white space follows."""
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
        """Read another block, at least as long as the text in memory; False at the end of the file."""
        if self._ended:
            return False
        # Blocks double while one item is incomplete. Each attempt decodes the item from its start, so blocks of a fixed
        # size would take quadratic time.
        kept = self._text[self._at :]
        block = self._stream.read(max(_LIST_BLOCK, len(kept)))
        self._ended = not block
        self._text, self._at = kept + self._decode(block, self._ended), 0
        return True
