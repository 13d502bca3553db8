"""The lock of an output: who holds it, and disks that have no locks."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from agentic_r_plugin.errors import ConfigError, OutputExistsError
from agentic_r_plugin.storage.claim import locked, require_new


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_named_and_no_other_process_is_blamed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    message = rf"cannot lock .*out\.jsonl\.lock: the disk that holds {tmp_path} .*{os.strerror(number)}.* another disk"
    with pytest.raises(ConfigError, match=message), locked(tmp_path / "out.jsonl"):
        pass
    assert not (tmp_path / "out.jsonl").exists()


def test_a_lock_that_its_holder_removes_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken, flock = tmp_path / "out.jsonl.lock", [], fcntl.flock

    def removed_after(stream: object, how: int) -> None:
        flock(stream, how)  # type: ignore[arg-type]
        taken.append(stream)
        if len(taken) == 1:
            lock.unlink()

    monkeypatch.setattr(fcntl, "flock", removed_after)
    with locked(tmp_path / "out.jsonl"):
        assert len(taken) == 2 and lock.exists()
        with pytest.raises(OutputExistsError, match="another process is working on it"), locked(tmp_path / "out.jsonl"):
            pass


def test_a_lock_that_disappears_while_it_is_looked_at_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, stat, looks = tmp_path / "out.jsonl.lock", Path.stat, []

    def look(self: Path, **options: bool) -> os.stat_result:
        found = stat(self, **options)
        if self == lock and not looks:
            looks.append(self)
            self.unlink()  # as another process does right after `exists`
        return found

    monkeypatch.setattr(Path, "stat", look)
    with locked(tmp_path / "out.jsonl"):
        assert looks == [lock]


def test_an_existing_output_is_refused_with_what_to_do(tmp_path: Path) -> None:
    require_new(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    require_new(tmp_path / "empty", folder=True)
    (tmp_path / "empty" / "file").touch()
    with pytest.raises(OutputExistsError, match="--resume"):
        require_new(tmp_path / "empty", folder=True)


def test_a_file_is_not_taken_for_the_folder_of_an_output(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"notes\.txt is a file"), locked(tmp_path / "notes.txt", folder=True):
        pass
