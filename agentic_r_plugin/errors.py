"""All exceptions raised by this package, as one tree.

An expected outcome (a malformed turn, a question without an answer) is a value, never an exception. An error message
says what was expected, what was found, where, and what to do; the command line prints it as one paragraph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class AgenticRError(Exception):
    """Base class of all exceptions of this package."""


class ConfigError(AgenticRError):
    """A configuration file or override has an unknown key, a wrong type or an invalid value."""


class UnknownComponentError(ConfigError):
    """A component name that no installed package has registered."""


class RecordError(AgenticRError):
    """A record in a data file does not match its schema.

    Args:
        message: what was expected and what was found.
        path: the file, when known.
        line: line number in that file, counted from 1.
    """

    def __init__(self, message: str, *, path: str | Path | None = None, line: int | None = None) -> None:
        self.path, self.line = (str(path) if path is not None else None), line
        where = ":".join(str(part) for part in (self.path, line) if part is not None)
        super().__init__(f"{where}: {message}" if where else message)


@contextmanager
def located(path: str | Path | None, line: int | None = None) -> Iterator[None]:
    """Add file and line to a `RecordError` of the block that names no file."""
    try:
        yield
    except RecordError as error:
        if error.path is not None:
            raise
        raise RecordError(str(error), path=path, line=line) from error


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are not UTF-8, and the way out."""
    if error.object[:2] == b"\x1f\x8b":
        return "expected UTF-8, found a file packed with gzip; give it a name that ends in .gz"
    return f"expected UTF-8: {error}; convert the file (Windows: iconv -f cp1252 -t utf-8 FILE)"


class OutputExistsError(AgenticRError):
    """The output exists; `--resume` continues it, another path starts a new one."""


class ManifestMismatchError(AgenticRError):
    """Unfinished work, or an index, was made from other inputs than those given now."""


class IndexMismatchError(ManifestMismatchError):
    """An index does not belong to the corpus or the retriever that it is opened with."""


class SearchError(AgenticRError):
    """A search failed. A failed search is never treated as a search without results."""


class SearchUnavailableError(SearchError):
    """The retrieval service did not answer within its retries."""


class SearchRefusedError(SearchError):
    """The retrieval service refuses a request permanently.

    Args:
        message: message of the service.
        status: HTTP status of the response.
    """

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class BackendError(AgenticRError):
    """A language-model backend failed after its retries."""


class BackendConfigError(BackendError, ConfigError):
    """A model server refuses every request of this form: because of its key, address, model name or a body field."""


class RequestRefusedError(BackendError):
    """A language model refuses this one request, such as a prompt that is too long; it may accept others."""


class JudgeError(AgenticRError):
    """A judge's reply does not hold what was asked for; such units are counted and kept apart, never repaired."""


class JudgeRefusedError(JudgeError):
    """The judge's model refuses this one prompt; it is not retried."""


class UpstreamError(AgenticRError):
    """verl, vLLM or FlashRAG is not the release that a hook was written for, or lacks its symbol."""


class TrainingError(AgenticRError):
    """Training cannot continue: a non-finite loss, too many failed searches, or a process that died."""
