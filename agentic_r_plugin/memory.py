"""Give memory back that a process has freed but holds on to."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress


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
