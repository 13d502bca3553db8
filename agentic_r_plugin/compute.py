"""The floating-point type in which a device computes fast. Every precision `auto` is resolved here.

The result depends on the kind of device, not on a measurement, so that the same inputs give the same bytes on every
machine of that kind. Types are named as in PyTorch: `float32`, `bfloat16`, `float16`.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

from agentic_r_plugin.errors import ConfigError

TYPES = ("float32", "bfloat16", "float16")
_SHOWN = "AGENTIC_R_COMPUTE_SHOWN"
"""Set after a command has printed the type, so that its child processes do not print it again."""
_WITHOUT_BFLOAT16 = frozenset(
    {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
)  # fmt: skip
"""Values of oneDNN's instruction set limit that exclude bfloat16."""


def fast_type(device: Any = "auto") -> str:
    """`bfloat16` if `device` has instructions for it, else `float32`. The first result is printed on stderr.

    Without such instructions bfloat16 is emulated: on a CPU with only AVX2 it is 14 to 40 times slower than float32.

    Args:
        device: a torch device or its name; `auto` is CUDA if available, else the CPU.
    """
    name = device_name(device)
    found = "bfloat16" if _native_bfloat16(name) else "float32"
    if not os.environ.get(_SHOWN):
        os.environ[_SHOWN] = "1"
        reason = "native bfloat16" if found == "bfloat16" else "no native bfloat16"
        print(f"agentic-r: {describe(name)}: {reason}, so `auto` computes in {found}", file=sys.stderr, flush=True)
    return found


def type_for(saved: str, device: Any) -> str:
    """Type to compute in with weights saved as `saved`: the same type, or float32 if it would be emulated.

    >>> type_for("float32", "cpu")
    'float32'
    """
    return saved if saved == "float32" or saved == fast_type(device) or _has_float16(saved, device) else "float32"


def resolve(choice: str, device: Any) -> str:
    """The configured precision, with `auto` resolved for `device`."""
    return fast_type(device) if choice == "auto" else choice


def threads_of_each(processes: int = 1) -> int:
    """An equal share, at least one, of the cores that this process may use (of all cores where it cannot be asked)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


def device_name(device: Any) -> str:
    """The device name, with `auto` resolved; a device index is kept."""
    import torch

    if str(device) == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    return str(device)


def check_device(device: Any) -> None:
    """Raise ConfigError for a device that this torch does not have."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device {str(device)!r}: {str(error).splitlines()[0]}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {str(device)!r}: this torch finds no CUDA device; expected auto or cpu")


def describe(name: str) -> str:
    """Short description of a device for messages."""
    import torch

    if name.startswith("cuda"):
        return f"{name} ({torch.cuda.get_device_name(name)})"
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})" if name == "cpu" else name


def _has_float16(saved: str, device: Any) -> bool:
    return saved == "float16" and not device_name(device).startswith("cpu")


@cache
def _native_bfloat16(name: str) -> bool:
    import torch

    kind = name.partition(":")[0]
    if kind == "cpu":
        return _cpu_has_bfloat16(torch)
    if kind == "cuda":
        with torch.cuda.device(name if ":" in name else torch.cuda.current_device()):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    check = getattr(getattr(torch, kind, None), "is_bf16_supported", None)  # xpu, npu
    return bool(check and check())


def _cpu_has_bfloat16(torch: Any) -> bool:
    """Whether the CPU has the instructions and oneDNN, which computes the products, may use them."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    has = torch.cpu.get_capabilities()
    if limit.upper() in _WITHOUT_BFLOAT16 or not any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        return False
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build without oneDNN, as on macOS
        return False
