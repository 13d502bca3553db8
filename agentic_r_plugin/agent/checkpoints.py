"""The checkpoints of a run folder: verl's `checkpoints/global_step_N`, and the file that names the newest."""

from __future__ import annotations

from pathlib import Path

from agentic_r_plugin.store import atomic_path


def checkpoint_steps(root: Path) -> list[int]:
    """Steps of the checkpoint folders under `root`, in ascending order."""
    return sorted(int(folder.name.rpartition("_")[2]) for folder in root.glob("global_step_*") if folder.is_dir())


def latest_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one. verl writes this file after everything else."""
    file = _latest_file(run_dir)
    if not file.is_file():
        return 0
    # If verl is killed while it writes this file, the file is empty, but the newest folder is already complete.
    return int(file.read_text() or max(checkpoint_steps(file.parent), default=0))


def name_latest(run_dir: Path) -> None:
    """Restore the newest checkpoint's step in a file that a kill left empty, which verl cannot read."""
    file = _latest_file(run_dir)
    if file.is_file() and not file.read_text():
        with atomic_path(file) as temporary:
            temporary.write_text(str(latest_step(run_dir)))


def _latest_file(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
