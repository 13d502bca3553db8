"""Who may write an output, what it is made from, and whether it is done: the one resume protocol of the package.

An output is a file or a folder. These belong to it, next to a file (`OUT.lock`) or inside a folder (`OUT/.lock`):

| suffix | holds |
|---|---|
| `.lock` | nothing; the process that works on the output holds a lock on it, and removes it when it ends |
| `.manifest.json` | `made_from` and what else the command notes; written before any work |
| `.work` | finished parts of the work, in the command's own form; removed at the end |
| the done file | the command's own report or result; written last, so its existence means done |
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from agentic_r_plugin import __version__
from agentic_r_plugin.errors import ManifestMismatchError, OutputExistsError
from agentic_r_plugin.store import read_json, write_json

LOCK, MANIFEST, WORK = ".lock", ".manifest.json", ".work"
_SHOWN = 60
"""Characters of a value in an error."""


class Claim:
    """An output that this process works on.

    Attributes:
        out: the output.
        work: where unfinished work is kept.
        finished: content of the done file, when the output is done.
        lock: the open lock file; a child process that inherits it holds the lock for as long as it lives.
    """

    def __init__(self, out: Path, made_from: Mapping[str, Any], done: Path, lock: IO[bytes], *, folder: bool) -> None:
        self.out, self.made_from, self.done, self.lock = out, dict(made_from), done, lock
        self.manifest, self.work = (beside(out, suffix, folder=folder) for suffix in (MANIFEST, WORK))
        self.finished: dict[str, Any] | None = read_json(done) if out.exists() and done.is_file() else None

    def begin(self, loaded: Mapping[str, Any] | None = None, **notes: Any) -> None:
        """Write the manifest, before any work; where the output is finished, only compare.

        Args:
            loaded: further entries of `made_from`, known only after models were loaded.
            notes: what else the manifest holds, such as the configuration; not compared.

        Raises:
            ManifestMismatchError: the work was begun with other `loaded` entries.
        """
        self.made_from |= loaded or {}
        before = read_json(self.manifest) if self.manifest.is_file() else {}
        if before:
            _require_same(self.out, before["made_from"], self.made_from)
        if self.finished is None:
            write_json(self.manifest, before | {"version": __version__, "made_from": self.made_from, **notes})

    def note(self, **notes: Any) -> None:
        """Add to what the manifest holds besides `made_from`."""
        write_json(self.manifest, read_json(self.manifest) | notes)

    def noted(self, name: str, default: Any = None) -> Any:
        """What `note` has kept under this name."""
        return read_json(self.manifest).get(name, default) if self.manifest.is_file() else default

    def finish(self, report: Mapping[str, Any]) -> None:
        """Write the done file."""
        self.finished = dict(report)
        write_json(self.done, self.finished)


@contextmanager
def claim(
    out: str | Path, made_from: Mapping[str, Any], *, resume: bool, done: str, folder: bool = False, late: str = ""
) -> Iterator[Claim]:
    """Take an output for this process, or refuse; nothing is written but the lock.

    Args:
        made_from: all that decides what the output holds, as JSON values; each entry is compared on a resume.
        resume: go on with an output that was begun or is done.
        done: name of the done file: inside a folder, or a suffix of a file's name (`.report.json`).
        folder: whether the output is a folder.
        late: entries of an earlier `made_from` that begin so are not compared here (`Claim.begin` gets them).

    Raises:
        OutputExistsError: another process works on it; or it is there, or was begun, without `resume`.
        ManifestMismatchError: it was begun from something else, or nothing says from what.
    """
    out = Path(out)
    with locked(out, folder=folder) as lock:
        held = Claim(
            out, json.loads(json.dumps(made_from)), out / done if folder else _named(out, done), lock, folder=folder
        )
        there = [path for path in (out, held.work) if _is_there(path)]
        begun = held.manifest.is_file()
        if not resume and there[:1] == [out]:
            raise OutputExistsError(f"{out} already exists; choose another path, remove it, or pass --resume to go on")
        if not resume and (begun or there):
            found = [path.name for path in (held.manifest, held.work) if path.exists()]
            raise OutputExistsError(
                f"{out}: work on it was begun; --resume goes on with it, or remove {' and '.join(found)} there"
            )
        if there and not begun:
            raise ManifestMismatchError(
                f"{there[0]} is there without {held.manifest.name}: what it was made from is unknown; remove it or "
                "choose another path"
            )
        if begun:
            before = read_json(held.manifest).get("made_from", {})
            waits = {key for key in before.keys() - held.made_from.keys() if late and key.startswith(late)}
            _require_same(out, {key: before[key] for key in before.keys() - waits}, held.made_from)
        yield held


@contextmanager
def locked(out: str | Path, *, folder: bool = False) -> Iterator[IO[bytes]]:
    """Hold the lock of an output.

    Raises:
        OutputExistsError: another process holds it.
    """
    out = Path(out)
    path = beside(out, LOCK, folder=folder)
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        stream = path.open("ab")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.close()
            raise OutputExistsError(f"{out}: another process is working on it; wait for it or end it") from error
        # A process that ends removes its lock file; one that was opened before that locks nobody out.
        if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
            break
        stream.close()
    with stream:
        try:
            yield stream
        finally:
            path.unlink(missing_ok=True)
            if made and folder and not any(out.iterdir()):
                out.rmdir()


def beside(out: Path, suffix: str, *, folder: bool = False) -> Path:
    """A file that belongs to an output: `OUT.suffix`, or `OUT/.suffix` for a folder."""
    return out / suffix if folder else _named(out, suffix)


def _named(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)


def _is_there(path: Path) -> bool:
    """Whether a file or a folder holds anything; files of this module do not count."""
    if path.is_dir():
        return any(item.name not in (LOCK, MANIFEST, WORK) for item in path.iterdir())
    return path.exists()


def _require_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [
        f"{key} was {_short(before, key)}, now {_short(now, key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ManifestMismatchError(
            f"{out}: cannot go on with what was begun from something else: {'; '.join(changed)}. Give the same inputs "
            "and settings, or another output path"
        )


def _short(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "absent"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
