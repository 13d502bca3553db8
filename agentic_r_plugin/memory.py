"""Releases memory that a process has freed but still holds."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress

ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""For processes that compute in bfloat16 on a CPU. oneDNN caches 1,024 compiled products, one per shape, and texts
without padding give a new shape each time. In PPO of a small model this took 110 MB per step."""


def bound_caches() -> None:
    """Set `ENVIRONMENT` unless it is already set; only effective before the first product of the process."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def trim_heap() -> None:
    """Return the heap's free pages to the system; glibc keeps those below a page that is still in use."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def give_back_memory() -> None:
    """Return free memory of the accelerator and the heap to the system, for the processes that run next."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim_heap()
