"""What verl 0.9.1 needs changed at run time to train without an accelerator; `patches/` holds the same as patches."""

from __future__ import annotations

import logging
import os
from typing import Any

from agentic_r_plugin.agent.cpu import attention
from agentic_r_plugin.upstream import Hook, apply

_log = logging.getLogger(__name__)

VERL = ("0.9.1",)
ROLLOUT_NAME = "hf"
ROLLOUT_CLASS = "agentic_r_plugin.agent.cpu.rollout.HFServerAdapter"


def gloo_process_group(owner: Any, attribute: str, original: Any) -> None:
    """One backend, `cpu:gloo`: verl composes `cpu:gloo,<device>:<backend>`, which names the CPU twice here."""

    def initialize(timeout_second: float | None = None, backend: str | None = None) -> None:
        original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    setattr(owner, attribute, initialize)


def configured_attention(owner: Any, attribute: str, original: Any) -> None:
    """Load the critic with the attention its configuration names; verl asks for flash attention whatever it says.

    A model that cannot be loaded so is left to verl's own function: its error, or its value head of TRL, for which it
    still asks for flash attention.
    """

    def load_valuehead_model(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
        from transformers import AutoModelForTokenClassification

        try:
            return AutoModelForTokenClassification.from_pretrained(
                pretrained_model_name_or_path=local_path,
                dtype=torch_dtype,
                config=model_config,
                attn_implementation=model_config._attn_implementation,
                trust_remote_code=trust_remote_code,
            )
        except Exception as error:
            _log.warning("the critic %s could not be loaded: %s", local_path, error)
            return original(local_path, torch_dtype, model_config, trust_remote_code)

    setattr(owner, attribute, load_valuehead_model)


def pageable_offload(owner: Any, attribute: str, original: Any) -> None:
    """Offload the reference policy into ordinary memory: pinned memory cannot be had without an accelerator."""

    class PageableOffloadPolicy(original):  # type: ignore[misc]
        def __init__(self, pin_memory: bool = False) -> None:
            super().__init__(pin_memory=False)

    setattr(owner, attribute, PageableOffloadPolicy)


def rollout_entry(owner: Any, attribute: str, original: Any) -> None:
    """Name our rollout engine: `verl.workers.rollout.base` keeps a plain dictionary without a way to register."""
    original[(ROLLOUT_NAME, "async")] = ROLLOUT_CLASS


HOOKS = (
    Hook(
        name="gloo_process_group",
        distribution="verl",
        versions=VERL,
        symbol="verl.utils.distributed:initialize_global_process_group_ray",
        patch="patches/verl-0.9.1-gloo-process-group.patch",
        install=gloo_process_group,
    ),
    Hook(
        name="configured_attention",
        distribution="verl",
        versions=VERL,
        symbol="verl.utils.model:load_valuehead_model",
        patch="patches/verl-0.9.1-valuehead-attention.patch",
        install=configured_attention,
    ),
    Hook(
        name="rollout_entry",
        distribution="verl",
        versions=VERL,
        symbol="verl.workers.rollout.base:_ROLLOUT_REGISTRY",
        patch="patches/verl-0.9.1-rollout-registry.patch",
        install=rollout_entry,
    ),
    Hook(
        name="pageable_offload",
        distribution="verl",
        versions=VERL,
        symbol="verl.workers.engine.fsdp.transformer_impl:CPUOffloadPolicy",
        patch="patches/verl-0.9.1-pageable-offload.patch",
        install=pageable_offload,
    ),
)


def install() -> list[str]:
    """Apply all hooks and the settings verl offers for the rest; returns the names of the hooks applied now.

    Raises:
        UpstreamError: another verl, or a symbol that has moved.
    """
    # verl registers its FSDP engines for "cuda" and "npu"; this variable is its own way to say which to take.
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    applied = apply(HOOKS)
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    RolloutReplicaRegistry.register(ROLLOUT_NAME, _load_replica)
    attention.register()
    return applied


def _load_replica() -> Any:
    from agentic_r_plugin.agent.cpu.rollout import HFReplica

    return HFReplica
