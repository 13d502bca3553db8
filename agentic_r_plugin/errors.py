"""Every fault this package raises, as one tree.

An expected outcome (a malformed turn, a question without an answer) is a value, never an exception. A fault says what
was expected, what was found, where, and what to do about it; the command line prints it as one paragraph.
"""

from __future__ import annotations

from pathlib import Path


class AgenticRError(Exception):
    """Base of all faults of this package."""


class ConfigError(AgenticRError):
    """A configuration file or override holds an unknown key, a wrong type or an impossible value."""


class UnknownComponentError(ConfigError):
    """A component name that no installed package registers."""


class RecordError(AgenticRError):
    """A record in a data file is not what its schema says.

    Args:
        message: what was expected and what was found.
        path: the file, when known.
        line: line number in that file, counted from 1.
    """

    def __init__(self, message: str, *, path: str | Path | None = None, line: int | None = None) -> None:
        self.path, self.line = (str(path) if path is not None else None), line
        where = ":".join(str(part) for part in (self.path, line) if part is not None)
        super().__init__(f"{where}: {message}" if where else message)


class OutputExistsError(AgenticRError):
    """The output is already there; `--resume` continues it, another path starts afresh."""


class ManifestMismatchError(AgenticRError):
    """Work in progress, or an index, was made from other inputs than those given now."""


class IndexMismatchError(ManifestMismatchError):
    """An index does not belong to the corpus or the retriever it is opened with."""


class SearchError(AgenticRError):
    """A search could not be carried out. Never the same as a search that found nothing."""


class SearchUnavailableError(SearchError):
    """The retrieval service did not answer within its retries."""


class SearchRefusedError(SearchError):
    """The retrieval service refuses a request for good.

    Args:
        message: what it says.
        status: its HTTP status.
    """

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class BackendError(AgenticRError):
    """A language-model backend failed after its retries."""


class BackendConfigError(BackendError, ConfigError):
    """A model's server refuses every request of this form: its key, address, model name or a field of the body."""


class RequestRefusedError(BackendError):
    """A language model does not take this one request, such as a prompt that is too long; it may take others."""


class JudgeError(AgenticRError):
    """The reply of a judge does not hold what it was asked for; counted and kept apart, never repaired."""


class JudgeRefusedError(JudgeError):
    """The judge's model does not take this one prompt; it is not asked again."""


class UpstreamError(AgenticRError):
    """verl, vLLM or FlashRAG is not the release, or does not hold the symbol, that a hook was written for."""


class TrainingError(AgenticRError):
    """Training cannot go on: a loss that is not finite, too many failed searches, a process that died."""
