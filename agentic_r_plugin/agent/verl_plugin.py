"""The plugin module that verl imports in every process (entry point `verl.plugins`); importing it modifies verl.

It installs one hook and an attention for training without flash-attn and, on a machine without an accelerator, the CPU
support. The agent loop and the reward are named in verl's configuration; the trainer is registered where it runs.

verl swallows errors raised here (it logs them at DEBUG). Code that starts a training therefore calls
`assert_registered()` in each kind of process it can reach, so that a failed registration cannot go unnoticed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from agentic_r_plugin.agent import hooks
from agentic_r_plugin.agent.cpu.detect import cpu_wanted
from agentic_r_plugin.errors import UpstreamError
from agentic_r_plugin.upstream import Hook, is_applied

registered: tuple[str, ...] = ()
"""Names of what was registered in this process; set last, so a non-empty value means that the import succeeded."""


def check() -> list[str]:
    """Describe each part that is missing in this process; empty if none is."""
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
    return missing


def _not_applied(wanted: Sequence[Hook]) -> list[str]:
    return [f"hook {hook.name} ({hook.symbol}) is not applied" for hook in wanted if not is_applied(hook)]


def assert_registered() -> None:
    """Check that everything is registered in this process.

    Raises:
        UpstreamError: a part is missing; the message says why verl may not have loaded the plugin.
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
