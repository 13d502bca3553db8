"""Provenance of a result: sources, package versions, machine and command of the process."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from agentic_r_plugin import __version__
from agentic_r_plugin.config import fingerprint
from agentic_r_plugin.credentials import redacted
from agentic_r_plugin.store import file_fingerprint

_PACKAGES = ("torch", "transformers", "flashrag-dev", "verl", "sentence-transformers", "faiss-cpu", "vllm", "numpy")


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    found = {"agentic-r-plugin": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """CPU, memory, threads and accelerators of this machine."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": next(models, platform.processor()),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


@cache
def made_by() -> dict[str, Any]:
    """Sources, versions, machine and command of this process.

    Cached at the first call, because source files that are edited later are not the ones this process has loaded.
    """
    package = Path(__file__).parents[1]
    sources = sorted(file for file in package.rglob("*") if file.suffix in (".py", ".txt", ".yaml", ".jinja"))
    return {
        "versions": versions(),
        "hardware": hardware(),
        "source_fingerprint": fingerprint([file_fingerprint(file) for file in sources]),
        "command": [redacted(item) for item in sys.argv],
    }


def provenance() -> dict[str, Any]:
    """What is needed to reproduce a result in addition to its configuration and inputs, and the time."""
    return made_by() | {"finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def shared_provenance(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Provenance common to all cells. A part in which they differ is None and is listed in `provenance_differs`.

    `finished_at` is the current time. Each cell keeps its own values under `provenance`.
    """
    own = [result.get("provenance", {}) for result in results]
    parts = {part: [each.get(part) for each in own] for part in made_by()}
    differing = [part for part, found in parts.items() if any(value != found[0] for value in found)]
    shared = {part: None if part in differing else found[0] for part, found in parts.items()}
    return provenance() | shared | {"provenance_differs": differing}
