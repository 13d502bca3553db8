"""Runs a command of this package in a child process, or in several under torchrun.

When the process ends, everything a phase used is freed, including accelerator memory. Children end soon after their
parent, however it ended: otherwise a repeated command and an old child would write to the same folder.

Descendants of children end too, including the daemons and workers of Ray and torchrun. They are found through their
parent processes, because Ray leaves process groups and sessions.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from agentic_r_plugin import errors
from agentic_r_plugin.compute import threads_of_each
from agentic_r_plugin.config import load_config, save_config
from agentic_r_plugin.errors import AgenticRError, TrainingError
from agentic_r_plugin.store import read_json, write_json

_TERMINATE_S = 3.0
"""Seconds that a process gets to end after SIGTERM."""
_PR_SET_CHILD_SUBREAPER = 36
"""From `linux/prctl.h`."""
_CLEANUP_S = 5.5
"""Seconds that this process and its children get to end after a signal."""


def run_command(name: str, config: Any, *, processes: int = 1) -> None:
    """Run `agentic-r NAME --resume` with `config` in `processes` processes of this node; wait for the end.

    Raises:
        AgenticRError: the command raised it.
        TrainingError: it ended without reporting an error; its output is on stderr.
    """
    with _started(name, config, processes) as wait:
        wait()


def run_side_by_side(name: str, configs: Sequence[Any]) -> None:
    """Run `agentic-r NAME --resume` with all configurations at the same time, sharing the CPU cores.

    Raises:
        AgenticRError: as in `run_command`, for the first that failed; the others have ended by then.
    """
    shared = {"OMP_NUM_THREADS": str(threads_of_each(len(configs))), "TQDM_DISABLE": "1"}
    failed: AgenticRError | None = None
    with ExitStack() as stack:
        for wait in [stack.enter_context(_started(name, config, 1, shared)) for config in configs]:
            try:
                wait()
            except AgenticRError as error:
                failed = failed or error
    if failed is not None:
        raise failed


@contextmanager
def _started(
    name: str, config: Any, processes: int, variables: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Callable[[], None]]:
    """Start a command as a process; yields a function that waits for its end and raises its error.

    The process has ended when the block ends.
    """
    with tempfile.TemporaryDirectory(prefix="agentic-r-") as folder:
        settings, fault = Path(folder) / "config.yaml", Path(folder) / "fault.json"
        save_config(config, settings)
        arguments = [str(os.getpid()), str(processes), name, str(settings), str(fault)]
        command = [sys.executable, "-m", __name__, *arguments]
        # In a separate session, Ctrl-C of the terminal reaches only this process, which ends the child in order.
        child = subprocess.Popen(command, start_new_session=True, env={**os.environ, **variables})

        def wait() -> None:
            code = child.wait()
            # The child writes down its own error, so that the same class is raised here.
            if fault.is_file():
                said = read_json(fault)
                raise _fault_of(said["type"])(said["message"])
            if code:
                raise TrainingError(f"{name} ended with code {code}; its output is above")

        try:
            yield wait
        finally:
            end(child)


def _fault_of(name: str) -> type[AgenticRError]:
    """The error class of that name; for classes of third parties, the base class."""
    found = getattr(errors, name, None)
    return found if isinstance(found, type) and issubclass(found, AgenticRError) else AgenticRError


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its descendants: SIGTERM to the process, then SIGKILL to all."""
    # Listed before the end: descendants of a process that has ended can no longer be found through it.
    below = _descendants(process.pid)
    try:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_TERMINATE_S)
    finally:  # also after a second interrupt
        _kill([*below, *_descendants(process.pid)])
        process.kill()
        process.wait()


def die_with(parent: int, *, politely: bool = False, family: bool = False) -> None:
    """End this process soon after its parent process `parent` has ended.

    Args:
        politely: send SIGTERM to itself first; SIGKILL follows if that does not end it in time.
        family: also end its descendants.
    """
    if family:
        _adopt_orphans(True)

    def watch() -> None:
        # Polled: the signal of PR_SET_PDEATHSIG is also sent when only the parent's thread ends.
        while os.getppid() == parent:
            time.sleep(0.5)
        if politely:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_TERMINATE_S)
        if family:
            _kill(_descendants(os.getpid()))
        # `sys.exit` would end only this thread.
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


@contextmanager
def family() -> Iterator[None]:
    """Context of a command: SIGINT, SIGTERM and SIGHUP end it and all processes it has started.

    The signal becomes an exception (KeyboardInterrupt or SystemExit), so that files are closed and workers stopped in
    order; whatever is left after `_CLEANUP_S` seconds is killed. Ignored signals, as under `nohup`, stay ignored.
    """
    # Children that exist before the command belong to its caller.
    earlier = {item.pid for item in psutil.Process().children()}
    handlers: dict[int, Any] = {}
    _adopt_orphans(True)

    def kill_ours() -> None:
        ours = [item for item in psutil.Process().children() if item.pid not in earlier]
        _kill([*(below for item in ours for below in _descendants(item.pid)), *ours])

    def hurry(code: int) -> None:
        time.sleep(_CLEANUP_S)
        kill_ours()
        os._exit(code)

    def stop(number: int, frame: object) -> None:
        # Exit code of a process that a signal ended, as in a shell.
        code = 128 + number
        threading.Thread(target=hurry, args=(code,), name="cleanup-limit", daemon=True).start()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(code)

    # Python allows signal handlers only in the main thread.
    if threading.current_thread() is threading.main_thread():
        for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(caught) in (signal.SIG_DFL, signal.default_int_handler):
                handlers[caught] = signal.signal(caught, stop)
    try:
        yield
    except BaseException:
        kill_ours()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _adopt_orphans(False)


def _descendants(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return list(psutil.Process(pid).children(recursive=True))
    return []


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def _adopt_orphans(wanted: bool) -> None:
    """Become the parent of descendants whose own parent ended first (Linux); elsewhere they can no longer be found."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


def _main(arguments: Sequence[str]) -> int:
    """Main function; arguments `PARENT PROCESSES COMMAND CONFIG FAULT`. PARENT is empty in torchrun's processes."""
    parent, processes, name, settings, fault = arguments
    die_with(int(parent) if parent else os.getppid(), family=bool(parent))
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

    # torchrun would give each process one thread, with a warning.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_each(processes)))
    try:
        run.main(["--standalone", f"--nproc-per-node={processes}", "-m", "agentic_r_plugin.child", *arguments])
        return 0
    except ChildFailedError:
        return 1


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
