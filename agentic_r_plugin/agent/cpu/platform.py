"""The CPU as a verl platform: verl's accelerator interface for a machine without an accelerator.

verl is imported only inside `register`: importing verl imports our plugin, which needs this module fully loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import psutil
import torch


def _cpu_device_module() -> ModuleType:
    """`torch.cpu`, extended with the functions of `torch.cuda` that verl uses and `torch.cpu` lacks."""
    module = ModuleType("agentic_r_plugin.agent.cpu.device_module")
    module.__dict__.update({name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")})

    def nothing(*args: object, **kwargs: object) -> None:
        return None

    def resident_bytes(*args: object) -> int:
        return psutil.Process().memory_info().rss

    def mem_get_info(*args: object) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    module.__dict__.update(
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        get_rng_state=lambda *args: torch.get_rng_state(),
        set_rng_state=lambda state, *args: torch.set_rng_state(state),
        memory_allocated=resident_bytes,
        memory_reserved=resident_bytes,
        max_memory_allocated=resident_bytes,
        max_memory_reserved=resident_bytes,
        mem_get_info=mem_get_info,
        get_device_name=lambda *args: "cpu",
        empty_cache=nothing,
        ipc_collect=nothing,
        reset_peak_memory_stats=nothing,
        set_per_process_memory_fraction=nothing,
    )
    return module


class CPUPlatform:
    """One device named `cpu`, with gloo collectives; `register` combines it with verl's `PlatformBase`.

    Ray is given logical GPUs (`ray_kwargs.ray_init.num_gpus`), one per worker process, because verl's placement groups
    and resource check count only GPUs and NPUs.
    """

    device_name = vendor_name = "cpu"
    device_module = _cpu_device_module()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> str:
        return "cpu"  # passed to `tensor.to`, where an index would mean an accelerator

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """An operation that only accelerators need."""

    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = _nothing

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False


def register() -> None:
    """Make the CPU this process's platform, before verl selects another one."""
    from verl.plugin.platform import PlatformBase, PlatformRegistry, set_platform

    if PlatformRegistry.get("cpu") is not None:
        return
    platform_class = type("VerlCPUPlatform", (CPUPlatform, PlatformBase), {"__doc__": CPUPlatform.__doc__})
    PlatformRegistry.register("cpu")(platform_class)
    set_platform(platform_class())
