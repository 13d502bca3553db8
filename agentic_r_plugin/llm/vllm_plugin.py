"""What vLLM loads in each of its processes (entry point `vllm.general_plugins`): engines end with whoever opened them.

vLLM's engine core and workers do not watch the process that started them. After a SIGKILL (`kill -9`, the kernel's
out-of-memory killer, a Ray actor that dies) they would keep their share of the accelerator's memory for good, and the
resumed job could not open its engine.

The watch polls the parent's process id, as in every other process that this package starts. `prctl(PR_SET_PDEATHSIG)`
is not used: its signal also comes when the thread that opened the engine ends, while the process goes on.
`VLLM_PLUGINS`, where it is set, must name `agentic_r`.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing import util

from agentic_r_plugin.child import die_with

_ENGINE_PROCESSES = ("EngineCore", "VllmWorker")
"""How the names of vLLM's engine processes begin (`multiprocessing.Process.name`)."""


def register() -> None:
    """Watch the parent in an engine process, and in those forked from here; other processes are left alone.

    A forked process finds vLLM's plugins loaded and does not call them again, so multiprocessing calls this there.
    """
    util.register_after_fork(_watch_parent, lambda watch: watch())
    _watch_parent()


def _watch_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid and multiprocessing.current_process().name.startswith(_ENGINE_PROCESSES):
        die_with(parent.pid)
