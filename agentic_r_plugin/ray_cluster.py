"""The Ray cluster that the data stages and `index` put their workers on: entered or started, and large enough."""

from __future__ import annotations

from agentic_r_plugin.errors import ConfigError


def enter(address: str, setting: str) -> bool:
    """Enter the cluster at `address`, or start one on this machine where it is empty.

    Args:
        setting: what the address is called, for messages.

    Returns:
        Whether `ray.shutdown` is the caller's: False where this process was in a cluster already, and stays in it.

    Raises:
        ConfigError: no cluster there.
    """
    import ray

    if ray.is_initialized():
        return False
    try:
        ray.init(address=address or "local", log_to_driver=False, include_dashboard=False, configure_logging=False)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"{setting}={address!r}: no Ray cluster there: {error}") from error
    return True


def require(workers: int, *, cpus: float, gpus: float, names: str) -> None:
    """See that the cluster can hold all workers; Ray would wait for more machines without a word.

    Args:
        cpus, gpus: what each reserves.
        names: the settings to lower, for the message.

    Raises:
        ConfigError: it has fewer processors or accelerators.
    """
    import ray

    for resource, each in (("CPU", cpus), ("GPU", gpus)):
        wanted, found = each * workers, ray.cluster_resources().get(resource, 0.0)
        if wanted > found:
            raise ConfigError(
                f"{workers} workers want {wanted:g} {resource} in all, the Ray cluster has {found:g}; lower {names}"
            )
