"""Plugin for vLLM's processes (entry point `vllm.general_plugins`): engine processes end with their parent.

vLLM's engine core and workers do not watch the process that started them. After a SIGKILL
(`kill -9`, the kernel's out-of-memory killer, a Ray actor that dies) they would hold their accelerator memory forever,
and the resumed job could not open its engine.

The watch polls the parent's process id, as in every other process that this package starts. `prctl(PR_SET_PDEATHSIG)`
is not used because its signal is also sent when the thread that opened the engine ends, while the process continues.

An engine core that fails to start hangs while its interpreter ends: zmq waits (`zmq_ctx_term`) for sockets that nothing
closes any more. vLLM in turn waits for that process, without a limit, so the error would never be raised. An alarm ends
the process instead.

If `VLLM_PLUGINS` is set, it must include `agentic_r`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from multiprocessing import util

from agentic_r_plugin.child import die_with

_ENGINE_PROCESSES = ("EngineCore", "VllmWorker")
"""Prefixes of the names of vLLM's engine processes (`multiprocessing.Process.name`)."""
_END_S = 20
"""Seconds that an engine process gets to end once its Python code has ended."""


def register() -> None:
    """Watch the parent and the end of this process, and of processes forked from it, if they are engine processes.

    A forked process inherits the loaded plugins and does not call them again, so multiprocessing calls the watch there.
    """
    util.register_after_fork(_watch_parent, lambda watch: watch())
    _watch_parent()


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid and multiprocessing.current_process().name.startswith(_ENGINE_PROCESSES):
        die_with(parent.pid)
        atexit.register(_end_in_time)


def _end_in_time() -> None:
    """Let the kernel end this process if the interpreter does not: no Python code runs any more then."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_END_S)
