"""Give memory back that a process has freed but holds on to."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress

ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""For processes that compute in bfloat16 on a CPU: oneDNN keeps 1,024 compiled products, one a shape, and texts without
padding bring a new shape each time. Of a small model's PPO that took 110 MB a step."""


def bound_caches() -> None:
    """Set `ENVIRONMENT`, where it is not set otherwise; in time only before the process' first product."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def trim_heap() -> None:
    """Return the heap's free pages to the system; glibc keeps those below one that is still in use."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def give_back_memory() -> None:
    """Return what is free, on the accelerator and in the heap, to the processes that run next."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim_heap()
