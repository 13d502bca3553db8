"""What verl imports in every process (entry point `verl.plugins`): importing this changes in verl what has to differ.

That is one hook and an attention for training without flash-attn; and the CPU's parts on a machine without accelerator.
The agent loop and the reward are named in verl's configuration, and the trainer is registered where it runs.

verl swallows an error raised here (it logs it at DEBUG), so whoever starts a training calls `assert_registered()`, in
each kind of process it can reach: a registration that did not happen must not pass for a training that runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from agentic_r_plugin.agent import hooks
from agentic_r_plugin.agent.cpu.detect import cpu_wanted
from agentic_r_plugin.errors import UpstreamError
from agentic_r_plugin.upstream import Hook, is_applied

registered: tuple[str, ...] = ()
"""What was registered in this process; the last step of the import, so its being set means that all went well."""


def check() -> list[str]:
    """What is missing in this process, in words; empty when all is well."""
    import verl.plugin.platform as platform

    missing = []
    if not registered:
        missing.append("the plugin module was not imported to its end")
    missing += _not_applied(hooks.HOOKS)
    if cpu_wanted():
        from agentic_r_plugin.agent.cpu import hooks as cpu_hooks

        if platform.get_platform().device_name != "cpu":
            missing.append(f"verl's platform is {platform.get_platform().device_name!r}, not 'cpu'")
        missing += _not_applied(cpu_hooks.HOOKS)
        from verl.workers.rollout.replica import RolloutReplicaRegistry

        if cpu_hooks.ROLLOUT_NAME not in RolloutReplicaRegistry._registry:
            missing.append(f"rollout engine {cpu_hooks.ROLLOUT_NAME!r} is not registered")
    return missing


def _not_applied(wanted: Sequence[Hook]) -> list[str]:
    return [f"hook {hook.name} ({hook.symbol}) is not applied" for hook in wanted if not is_applied(hook)]


def assert_registered() -> None:
    """Refuse to go on without our registrations.

    Raises:
        UpstreamError: says what is missing and why verl may not have loaded the plugin.
    """
    missing = check()
    if missing:
        raise UpstreamError(
            "the verl plugin of agentic-r is not in place: " + "; ".join(missing) + ". Is the package installed "
            "(`pip install -e .` makes the entry point), and does VERL_USE_EXTERNAL_PLUGINS exclude 'agentic_r'?"
        )


def _register() -> tuple[str, ...]:
    done = []
    if cpu_wanted():
        from agentic_r_plugin.agent.cpu import hooks as cpu_hooks
        from agentic_r_plugin.agent.cpu import platform

        platform.register()  # before verl looks for a platform
        done += ["platform cpu", *cpu_hooks.install(), f"rollout {cpu_hooks.ROLLOUT_NAME}"]
    return (*done, *hooks.install(), "verl plugin")


try:
    registered = _register()
except Exception:
    logging.getLogger(__name__).exception("the verl plugin of agentic-r could not register; verl hides this error")
    raise
