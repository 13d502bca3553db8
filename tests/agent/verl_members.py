"""What `agent/trainer.py` builds on in verl, member by member.

`python tests/agent/verl_members.py` looks at the installed verl, and with PYTHONPATH=CHECKOUT at that of a checkout. It
prints what is missing or takes other parameters.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

_TRAINER = "verl.trainer.ppo.v1.trainer_base:PPOTrainer"
_BUFFER = "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer"

OVERRIDDEN: dict[str, list[str]] = {
    "step": ["self", "metrics", "timing_raw"],
    "_compute_ref_log_prob": ["self", "batch", "metrics"],
    "_balance_batch": ["self", "batch", "metrics", "logging_prefix", "keep_minibatch"],
    "_compute_metrics": ["self", "batch", "metrics", "timing_raw", "global_steps", "epoch"],
    "_validate": ["self"],
    "_save_checkpoint": ["self"],
    "_load_checkpoint": ["self"],
}
"""Methods of verl's trainer that ours overrides, and their parameters."""

CALLED: dict[str, list[str] | None] = {
    **{f"{_TRAINER}.{name}": parameters for name, parameters in OVERRIDDEN.items()},
    "verl.trainer.ppo.v1.trainer_base:register_trainer": None,
    "verl.trainer.ppo.v1.trainer_base:get_trainer_cls": None,
    "verl.trainer.ppo.v1.trainer_sync:PPOTrainerSync": None,
    "verl.trainer.ppo.v1.trainer_colocate_async:PPOTrainerColocateAsync": None,
    "verl.trainer.ppo.v1.trainer_separate_async:PPOTrainerSeparateAsync": None,
    f"{_BUFFER}._evict_terminal_groups": ["self", "global_steps", "partition_id", "eviction_reasons"],
    f"{_BUFFER}._sync_metadata_from_transfer_queue": ["self"],
    "transfer_queue:KVBatchMeta": None,
    "transfer_queue:kv_batch_get": None,
    "transfer_queue:kv_clear": None,
    "verl.trainer.main_ppo:run_ppo": ["config", "task_runner_class"],
    "verl.trainer.main_ppo:TaskRunnerV1.__ray_metadata__.modified_class.run": ["self", "config"],
    "verl.workers.rollout.replica:RolloutReplicaRegistry._registry": None,
}
"""Everything, with the parameters where we rely on them."""


def found(name: str) -> Any:
    """The member `module:attribute.attribute`."""
    module, _, path = name.partition(":")
    value: Any = importlib.import_module(module)
    for attribute in path.split("."):
        value = getattr(value, attribute)
    return value


def differences() -> list[str]:
    """What is missing or takes other parameters, in words."""
    said = []
    for name, expected in CALLED.items():
        try:
            value = found(name)
        except (ImportError, AttributeError) as error:
            said.append(f"{name}: missing ({error})")
            continue
        if expected is None:
            continue
        present = [item for item in inspect.signature(value).parameters if item != "_ray_trace_ctx"]  # Ray's own
        if present != expected:
            said.append(f"{name}: takes {present}, expected {expected}")
    return said


if __name__ == "__main__":
    print("\n".join(differences()))
    sys.exit(bool(differences()))
