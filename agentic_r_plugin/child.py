"""A command of this package in a process of its own, or in several under torchrun.

What a phase took, the accelerator's memory too, is free again when it ends. The processes end soon after the one that
started them, however that ended: once the command is given again, two would otherwise write one folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agentic_r_plugin import errors
from agentic_r_plugin.config import load_config, save_config
from agentic_r_plugin.errors import AgenticRError, TrainingError
from agentic_r_plugin.store import read_json, write_json

_TERMINATE_S = 15.0


def run_command(name: str, config: Any, *, processes: int = 1) -> None:
    """`agentic-r NAME --resume` with `config`, in one process or in `processes` of this node; waits for the end.

    Raises:
        AgenticRError: the command raised it.
        TrainingError: it ended without a word of ours; what it printed stands on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="agentic-r-") as folder:
        settings, fault = Path(folder) / "config.yaml", Path(folder) / "fault.json"
        save_config(config, settings)
        arguments = [str(os.getpid()), str(processes), name, str(settings), str(fault)]
        child = subprocess.Popen([sys.executable, "-m", __name__, *arguments], start_new_session=True)
        try:
            code = child.wait()
        finally:
            end(child, session=True)
        if fault.is_file():
            said = read_json(fault)
            raise _fault_of(said["type"])(said["message"])
        if code:
            raise TrainingError(f"{name} ended with code {code}; what it printed stands above")


def _fault_of(name: str) -> type[AgenticRError]:
    """The fault of that name; of a third party's own, the base of all."""
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, AgenticRError) else AgenticRError


def end(process: subprocess.Popen[bytes], *, session: bool = False) -> None:
    """End a process, politely first, and with `session` also what it left in the session it leads."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_TERMINATE_S)
    with suppress(ProcessLookupError):
        if session:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def die_with(parent: int, *, politely: bool = False) -> None:
    """End this process soon after its parent, process `parent`, is gone; politely: by SIGTERM to itself."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        if not politely:
            os._exit(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _main(arguments: Sequence[str]) -> int:
    """`PARENT PROCESSES COMMAND CONFIG FAULT`; PARENT is empty in torchrun's own processes."""
    parent, processes, name, settings, fault = arguments
    die_with(int(parent) if parent else os.getppid())
    if int(processes) > 1:
        return _torchrun(int(processes), ["", "1", name, settings, fault])
    from agentic_r_plugin.cli import COMMANDS

    config_class, run = COMMANDS[name].load()
    try:
        run(load_config(config_class, settings), resume=True)
        return 0
    except AgenticRError as error:
        write_json(Path(fault), {"type": type(error).__name__, "message": str(error)})
    except Exception:
        traceback.print_exc()
    return 1


def _torchrun(processes: int, arguments: Sequence[str]) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(["--standalone", f"--nproc-per-node={processes}", "-m", "agentic_r_plugin.child", *arguments])
        return 0
    except ChildFailedError:
        return 1


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
