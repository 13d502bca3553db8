"""Whether verl should run on the CPU here."""

from __future__ import annotations

import os

from agentic_r_plugin.errors import ConfigError

SWITCH = "AGENTIC_R_CPU"


def cpu_wanted() -> bool:
    """True where no accelerator is found; the environment variable `AGENTIC_R_CPU` (1, 0, auto) overrides.

    A PyTorch built for CPUs alone cannot use an accelerator, whatever the machine has.

    Raises:
        ConfigError: `AGENTIC_R_CPU` holds something else.
    """
    choice = os.environ.get(SWITCH, "auto").strip().lower()
    if choice in ("1", "0"):
        return choice == "1"
    if choice != "auto":
        raise ConfigError(f"{SWITCH}={choice}: expected 1 (use the CPU), 0 (never), auto (where nothing else is found)")
    named = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if named:
        return named == "cpu"
    found = accelerator()
    return not found or not torch_drives(found)


def accelerator() -> str:
    """verl's name of the platform of this machine's accelerator (`nvidia`, ...); empty where none is found.

    Asks verl's own platforms, with their look at the host: a Ray actor without a GPU of its own, on a machine that has
    one, must not be taken for a machine without.
    """
    from verl.plugin.platform import PlatformRegistry

    for name in PlatformRegistry.registered_names():
        platform_cls = PlatformRegistry.get(name)
        if name != "cpu" and platform_cls is not None and platform_cls().is_platform_available(use_smi_check=True):
            return str(name)
    return ""


def torch_drives(platform: str) -> bool:
    """Whether this PyTorch was built for `platform`; those that come as extensions of it (Ascend) are taken to be."""
    import torch

    return platform != "nvidia" or torch.version.cuda is not None
