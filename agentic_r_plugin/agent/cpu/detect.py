"""Decide whether verl should run on the CPU of this machine."""

from __future__ import annotations

import os

from agentic_r_plugin.errors import ConfigError

SWITCH = "AGENTIC_R_CPU"


def cpu_wanted() -> bool:
    """True if no usable accelerator is found; the environment variable `AGENTIC_R_CPU` (1, 0, auto) overrides this.

    A CPU-only build of PyTorch cannot use an accelerator, even if the machine has one.

    Raises:
        ConfigError: `AGENTIC_R_CPU` has another value.
    """
    choice = os.environ.get(SWITCH, "auto").strip().lower()
    if choice in ("1", "0"):
        return choice == "1"
    if choice != "auto":
        raise ConfigError(f"{SWITCH}={choice}: expected 1 (use the CPU), 0 (never), auto (where nothing else is found)")
    named = os.environ.get("VERL_PLATFORM", "").strip().lower()  # verl's own choice of a platform
    if named:
        return named == "cpu"
    found = accelerator()
    return not found or not torch_drives(found)


def accelerator() -> str:
    """verl's platform name of this machine's accelerator (`nvidia`, ...); empty if none is found.

    Uses the host-level check of verl's platforms, so that a Ray actor without an assigned GPU does not make a GPU
    machine look like a CPU machine.
    """
    from verl.plugin.platform import PlatformRegistry

    for name in PlatformRegistry.registered_names():
        platform_cls = PlatformRegistry.get(name)
        if name != "cpu" and platform_cls is not None and platform_cls().is_platform_available(use_smi_check=True):
            return str(name)
    return ""


def torch_drives(platform: str) -> bool:
    """Whether this PyTorch supports `platform`; platforms added by extensions (Ascend) are assumed to be supported."""
    import torch

    return platform != "nvidia" or torch.version.cuda is not None
