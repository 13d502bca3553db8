"""Lock of an output, what it is made from, and whether it is done: the only resume protocol of the package.

An output is a file or a folder. These files belong to it, next to a file (`OUT.lock`) or inside a folder (`OUT/.lock`):

| suffix | holds |
|---|---|
| `.lock` | nothing; the process that works on the output holds a lock on it, and removes it at the end |
| `.manifest.json` | `made_from` and further notes of the command; written before any work |
| `.work` | finished parts of the work, in the command's own format; removed at the end |
| the done file | the command's own report or result; written last, so its existence means done |
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from agentic_r_plugin import __version__
from agentic_r_plugin.errors import ConfigError, ManifestMismatchError, OutputExistsError
from agentic_r_plugin.store import read_json, write_json

LOCK, MANIFEST, WORK = ".lock", ".manifest.json", ".work"
_SHOWN = 60
"""Characters of a value shown in an error."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """An output and what it is made from.

    Args:
        made_from: everything that determines its content, as JSON values; a resume compares each entry.
        done: name of the done file: inside a folder, or the suffix of a file's name (`.report.json`).
        late: prefixes of entries that are known only after models are loaded (`Claim.begin`).
        at_end: entries that only affect a finished output; they may change while it is unfinished.
    """

    out: Path
    made_from: Mapping[str, Any]
    done: str
    folder: bool = False
    late: tuple[str, ...] = ()
    at_end: frozenset[str] = frozenset()

    def path(self, suffix: str) -> Path:
        """Path of a file that belongs to the output."""
        return companion(self.out, suffix, folder=self.folder)

    def finished(self) -> dict[str, Any] | None:
        """Content of the done file, if the output is done.

        Raises:
            ManifestMismatchError: it was made from other inputs, or its inputs are unknown.
        """
        done = self.path(self.done)
        # A report whose output was removed does not count as done.
        result = read_json(done) if self.out.exists() and done.is_file() else None
        if (before := self.before()) is not None:
            # Compared in the form that the manifest has: JSON turns tuples into lists.
            now = json.loads(json.dumps(self.made_from))
            # The first comparison comes before models are loaded: their entries may be absent; `begin` compares them.
            left_out = {key for key in before.keys() - now.keys() if key.startswith(self.late)} if self.late else set()
            if result is None:
                left_out |= self.at_end
            changed = [
                f"{key} was {_short(before, key)}, now {_short(now, key)}"
                for key in sorted({*before, *now} - left_out)
                if before.get(key) != now.get(key)
            ]
            if changed:
                raise ManifestMismatchError(
                    f"{self.out}: cannot go on with what was begun from something else: {'; '.join(changed)}. Give "
                    "the same inputs and settings, or another output path"
                )
        elif there := [path for path in (self.out, self.path(WORK)) if _is_there(path)]:
            raise ManifestMismatchError(
                f"{there[0]} is there without {self.path(MANIFEST).name}: what it was made from is unknown; remove it "
                "or choose another path"
            )
        return result

    def before(self) -> dict[str, Any] | None:
        """`made_from` of an earlier run; None if there was none."""
        manifest = self.path(MANIFEST)
        return dict(read_json(manifest).get("made_from", {})) if manifest.is_file() else None

    @contextmanager
    def claim(self, *, resume: bool) -> Iterator[Claim]:
        """Lock the output for this process, or refuse; only the lock file is written.

        Args:
            resume: continue an unfinished output, or leave a finished one as it is.

        Raises:
            OutputExistsError: another process works on it, or it exists or was started and `resume` is off.
            ManifestMismatchError: it was made from other inputs, or its inputs are unknown.
        """
        with locked(self.out, folder=self.folder) as lock:
            if not resume:
                require_new(self.out, folder=self.folder)
            yield Claim(self, lock)


class Claim:
    """An output that this process is working on.

    Attributes:
        work: path of unfinished work.
        finished: content of the done file, if the output is done.
        lock: the open lock file; a child process that inherits it holds the lock as long as it lives.
    """

    def __init__(self, output: Output, lock: IO[bytes]) -> None:
        self.output, self.lock = output, lock
        self.out, self.work, self.manifest = output.out, output.path(WORK), output.path(MANIFEST)
        self.finished = output.finished()

    def begin(self, loaded: Mapping[str, Any] | None = None, **notes: Any) -> None:
        """Write the manifest before any work; for a finished output, only compare.

        Args:
            loaded: the `late` entries of `made_from`.
            notes: further content of the manifest, such as the configuration; not compared.

        Raises:
            ManifestMismatchError: the work was started with other late entries.
        """
        self.output = replace(self.output, made_from={**self.output.made_from, **(loaded or {})})
        self.finished = self.output.finished()
        if self.finished is None:
            made_from = dict(self.output.made_from)
            self.note(version=__version__, made_from=made_from, **notes)

    def note(self, **notes: Any) -> None:
        """Add notes to the manifest, next to `made_from`."""
        before = read_json(self.manifest) if self.manifest.is_file() else {}
        write_json(self.manifest, before | notes)

    def noted(self, name: str, default: Any = None) -> Any:
        """The note stored under this name."""
        return read_json(self.manifest).get(name, default) if self.manifest.is_file() else default

    def finish(self, report: Mapping[str, Any]) -> None:
        """Write the done file."""
        self.finished = dict(report)
        write_json(self.output.path(self.output.done), report)


@contextmanager
def locked(out: str | Path, *, folder: bool = False) -> Iterator[IO[bytes]]:
    """Hold the lock of an output.

    Raises:
        OutputExistsError: another process holds it, or a file has the name of the folder.
        ConfigError: the disk does not support locks.
    """
    out = Path(out)
    path = companion(out, LOCK, folder=folder)
    if folder and out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out} is a file, expected a folder; choose another path")
    # A command that is refused leaves no folder that only its lock needed.
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        stream = path.open("ab")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.close()
            raise OutputExistsError(f"{out}: another process is working on it; wait for it or end it") from error
        except OSError as error:  # some network disks have no locks
            stream.close()
            raise ConfigError(
                f"{out}: cannot lock {path}: the disk that holds {path.parent.resolve()} does not support file locks "
                f"({error.strerror}); choose an output on another disk, or mount this one with locks (Lustre: -o flock)"
            ) from error
        # A process removes its lock file when it ends. A lock on such a removed file locks nobody out: open it again.
        with suppress(FileNotFoundError):
            if os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
                break
        stream.close()
    with stream:
        try:
            yield stream
        finally:
            # Before the lock is released: afterwards this name could be the lock file of another process.
            path.unlink(missing_ok=True)
            if made and folder and not any(out.iterdir()):
                out.rmdir()


def companion(out: Path, suffix: str, *, folder: bool = False) -> Path:
    """Path of a file that belongs to an output: `OUT.suffix`, or `OUT/.suffix` for a folder."""
    return out / suffix if folder else out.with_name(out.name + suffix)


def require_new(out: str | Path, *, folder: bool = False, or_else: str = "pass --resume to go on") -> None:
    """Refuse to overwrite an output; for use before its inputs are known. `or_else` is a further way out.

    Raises:
        OutputExistsError: the output exists, or was started.
    """
    out = Path(out)
    if _is_there(out):
        raise OutputExistsError(f"{out} already exists; choose another path, remove it, or {or_else}")
    begun = [path for path in (companion(out, suffix, folder=folder) for suffix in (MANIFEST, WORK)) if path.exists()]
    if begun:
        raise OutputExistsError(f"{out}: unfinished work exists; {or_else}, or remove {' and '.join(map(str, begun))}")


def _is_there(path: Path) -> bool:
    """Whether a file or folder has content; the files of this module do not count."""
    if path.is_dir():
        return any(item.name not in (LOCK, MANIFEST, WORK) for item in path.iterdir())
    return path.exists()


def _short(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "absent"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
