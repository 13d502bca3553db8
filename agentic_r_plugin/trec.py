"""TREC's files: runs (`qid Q0 docid rank score tag`) and qrels, also BEIR's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from agentic_r_plugin.errors import RecordError, not_utf8
from agentic_r_plugin.store import atomic_path


def run_lines(name: str, ranking: Sequence[tuple[str, float]], tag: str) -> Iterator[str]:
    """Lines of one ranking in a run.

    Evaluators sort by score, so scores that do not fall from rank to rank are replaced by 1 / rank.

    Args:
        name: id of the query.
        ranking: (passage id, score), best first.
        tag: name of the run.

    Raises:
        RecordError: a name holds white space.
    """
    falls = all(first > second for (_, first), (_, second) in pairwise(ranking))
    for rank, (passage, score) in enumerate(ranking, start=1):
        yield f"{word(name)} Q0 {word(passage)} {rank} {score if falls else 1 / rank!r} {tag}\n"


def word(text: str) -> str:
    """A field of a TREC file.

    Raises:
        RecordError: it is empty or holds white space.
    """
    if not text or text.split() != [text]:
        raise RecordError(f"expected a name without white space, which separates TREC's fields, found {text!r}")
    return text


def write_lines(out: Path, lines: Iterable[str]) -> None:
    """Write a text file atomically."""
    with atomic_path(out) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(lines)


def read_grades(path: str | Path) -> Iterator[tuple[str, str, float]]:
    """(question id, document id, grade) of each line of qrels, in the order of the file.

    Args:
        path: BEIR's `query-id corpus-id score` with a header and tabs, or TREC's `qid 0 docid grade`.

    Raises:
        RecordError: no such file, or another line; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise RecordError("no such file", path=path)
    with path.open("rb") as lines:
        for number, data in enumerate(lines, start=1):
            try:
                line = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise RecordError(not_utf8(error), path=path, line=number) from error
            fields = line.split("\t") if "\t" in line else line.split()
            if not line.strip() or (number == 1 and fields[0] == "query-id"):
                continue
            try:
                if len(fields) not in (3, 4) or not math.isfinite(grade := float(fields[-1])):
                    raise ValueError
            except ValueError:
                expected = "expected a question id, a document id and a grade (BEIR), or with a 0 between them (TREC)"
                raise RecordError(f"{expected}, found {line.strip()[:80]!r}", path=path, line=number) from None
            yield fields[0].strip(), fields[-2].strip(), grade
