"""Run-time changes to verl 0.9.1 for training without an accelerator; `patches/` holds the same changes as patches."""

from __future__ import annotations

import os
from typing import Any

from agentic_r_plugin.agent.hooks import VerlHook
from agentic_r_plugin.upstream import apply

ROLLOUT_NAME = "hf"
ROLLOUT_CLASS = "agentic_r_plugin.agent.cpu.rollout.HFServerAdapter"


def gloo_process_group(owner: Any, attribute: str, original: Any) -> None:
    """Use the backend `cpu:gloo`: verl composes `cpu:gloo,<device>:<backend>`, which would name the CPU twice."""

    def initialize(timeout_second: float | None = None, backend: str | None = None) -> None:
        original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    setattr(owner, attribute, initialize)


def pageable_offload(owner: Any, attribute: str, original: Any) -> None:
    """Offload the reference policy to pageable memory: pinned memory requires an accelerator."""

    class PageableOffloadPolicy(original):  # type: ignore[misc]
        def __init__(self, pin_memory: bool = False) -> None:
            super().__init__(pin_memory=False)

    setattr(owner, attribute, PageableOffloadPolicy)


def rollout_entry(owner: Any, attribute: str, original: Any) -> None:
    """Add our rollout engine to the dictionary in `verl.workers.rollout.base`, which has no registration function."""
    original[(ROLLOUT_NAME, "async")] = ROLLOUT_CLASS


HOOKS = (
    VerlHook(
        name="gloo_process_group",
        symbol="verl.utils.distributed:initialize_global_process_group_ray",
        patch="patches/verl-0.9.1-gloo-process-group.patch",
        install=gloo_process_group,
    ),
    VerlHook(
        name="rollout_entry",
        symbol="verl.workers.rollout.base:_ROLLOUT_REGISTRY",
        patch="patches/verl-0.9.1-rollout-registry.patch",
        install=rollout_entry,
    ),
    VerlHook(
        name="pageable_offload",
        symbol="verl.workers.engine.fsdp.transformer_impl:CPUOffloadPolicy",
        patch="patches/verl-0.9.1-pageable-offload.patch",
        install=pageable_offload,
    ),
)


def install() -> list[str]:
    """Apply all hooks and register the rollout engine; return the names of the hooks applied now.

    Raises:
        UpstreamError: the version of verl is not supported, or a symbol has moved.
    """
    # verl registers its FSDP engines only for "cuda" and "npu"; this variable of verl selects one of them.
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    applied = apply(HOOKS)
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    RolloutReplicaRegistry.register(ROLLOUT_NAME, _load_replica)
    return applied


def _load_replica() -> Any:
    from agentic_r_plugin.agent.cpu.rollout import HFReplica

    return HFReplica
