"""Finished stretches of a stage's output: consecutive units whose records are written in input order, with a checksum.

Closing a part bounds what the journal holds, so that a stage's memory does not depend on the size of its input.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.store import atomic_path, dump_line, parse_line, read_json, write_json

Line = dict[str, Any]
"""A unit in the journal: unit, records, dropped, error, round."""


@dataclass(kw_only=True)
class Part:
    """What is known of a closed part; written after its records and names their file, so the two belong together."""

    first: int
    """Position of its first unit."""
    num_records: list[int] = field(default_factory=list)
    """Of each unit."""
    dropped: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Position (as text) -> reason, of the dropped units."""
    errors: dict[str, Line] = field(default_factory=dict)
    """Position (as text) -> unit, error and round, of the units whose judge failed and of those that were refused
    (these have a reason, too)."""
    version: int = 0
    """How often the part was written anew; each time into a file of another name."""
    sha256: str = ""
    """Of the records file."""


class Parts:
    """The closed parts of an output, in a folder.

    Records files that no `Part` names are leavings of a process that was killed; they are removed.

    Args:
        folder: `00000.jsonl` holds a part's records (`00000.1.jsonl` once it is written anew), `00000.json` its `Part`.
        size: units a part.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self._errors: dict[int, dict[int, int]] = {}
        self._refused: dict[int, set[int]] = {}
        for path in folder.glob("*.json"):
            self._note(int(path.stem), Part(**read_json(path)))
        named = {self._records(number) for number in self._errors}
        for path in folder.glob("*.jsonl"):
            if path not in named:
                path.unlink()

    def num_current_errors(self, round_: int) -> int:
        """Failed units in closed parts that are not asked again."""
        return self._num_kept_apart(round_) - self.num_refused(round_)

    def num_refused(self, round_: int) -> int:
        """Refused units in closed parts that are not asked again."""
        return sum(
            errors.get(position) == round_
            for number, errors in self._errors.items()
            for position in self._refused.get(number, ())
        )

    def _num_kept_apart(self, round_: int) -> int:
        return sum(of == round_ for errors in self._errors.values() for of in errors.values())

    def first_error(self, round_: int) -> str | None:
        """Unit and error of the first of them."""
        for number, errors in sorted(self._errors.items()):
            if round_ in errors.values():
                lines = self.read(number).errors
                line = next(lines[key] for key in sorted(lines, key=int) if lines[key]["round"] == round_)
                return f"{line['unit']}: {line['error']}"
        return None

    def number(self, position: int) -> int:
        """The part a unit belongs to."""
        return position // self.size

    def closed(self, number: int) -> bool:
        """Whether a part has been closed."""
        return number in self._errors

    def done(self, position: int, round_: int) -> bool:
        """Whether a unit has an outcome that stands in a closed part."""
        errors = self._errors.get(self.number(position))
        return errors is not None and errors.get(position, round_) == round_

    def error_of_earlier_round(self, number: int, round_: int) -> bool:
        """Whether a closed part holds units that are to be asked again."""
        return any(of != round_ for of in self._errors.get(number, {}).values())

    def close(self, number: int, length: int, line_of: Callable[[int], Line | None]) -> None:
        """Write a part, or write it anew where some of its units were asked again.

        Args:
            number: which.
            length: its number of units.
            line_of: a unit's line in the journal, by position; None where the closed part's own stands.

        Raises:
            RecordError: a unit has no line, or the part that is written anew is not what was written.
        """
        part = Part(first=number * self.size)
        before = old = None
        if self.closed(number):
            self.check(number)
            before, old = self._lines(number), self._records(number)
            part.version = self.read(number).version + 1
        counts: Counter[str] = Counter()
        digest = hashlib.sha256()
        with atomic_path(self._file(number, part)) as temporary, temporary.open("wb") as stream:
            for position in range(part.first, part.first + length):
                kept = next(before) if before is not None else None
                line = line_of(position) or kept
                if line is None:
                    raise RecordError(f"unit {position} of part {number} was never finished", path=self.folder)
                part.num_records.append(len(line["records"]))
                if line["dropped"] is not None:
                    counts[line["dropped"]] += 1
                    part.reasons[str(position)] = line["dropped"]
                if line["error"] is not None:
                    part.errors[str(position)] = {key: line[key] for key in ("unit", "error", "round")}
                for record in line["records"]:
                    data = dump_line(record)
                    digest.update(data)
                    stream.write(data)
            stream.flush()
        part.dropped, part.sha256 = dict(counts), digest.hexdigest()
        write_json(self._meta(number), asdict(part))
        if old is not None:
            old.unlink()
        self._note(number, part)

    def _note(self, number: int, part: Part) -> None:
        self._errors[number] = {int(position): line["round"] for position, line in part.errors.items()}
        self._refused[number] = {int(position) for position in part.errors if position in part.reasons}

    def read(self, number: int) -> Part:
        """What is known of a closed part."""
        return Part(**read_json(self._meta(number)))

    def copy(self, number: int, stream: BinaryIO) -> None:
        """Append a part's records to a file.

        Raises:
            RecordError: the part is not what was written.
        """
        digest = hashlib.sha256()
        with self._records(number).open("rb") as source:
            while block := source.read(1 << 20):
                digest.update(block)
                stream.write(block)
        if digest.hexdigest() != self.read(number).sha256:
            raise RecordError("damaged: its checksum is not that of its .json; remove both", path=self._records(number))

    def check(self, number: int) -> None:
        """RecordError where a part is not what was written."""
        with Path("/dev/null").open("wb") as nowhere:
            self.copy(number, nowhere)

    def _lines(self, number: int) -> Iterator[Line]:
        """The units of a closed part as journal lines."""
        part = self.read(number)
        path = self._file(number, part)
        with path.open("rb") as stream:
            for offset, count in enumerate(part.num_records):
                position = str(part.first + offset)
                error = part.errors.get(position, {"unit": "", "error": None, "round": 0})
                records = [parse_line(stream.readline(), path, 0) for _ in range(count)]
                yield {"records": records, "dropped": part.reasons.get(position), **error}

    def _records(self, number: int) -> Path:
        return self._file(number, self.read(number))

    def _file(self, number: int, part: Part) -> Path:
        return self.folder / (f"{number:05d}.{part.version}.jsonl" if part.version else f"{number:05d}.jsonl")

    def _meta(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"
