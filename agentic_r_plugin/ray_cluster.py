"""The Ray cluster for the workers of data stages and `index`: connect to it or start it, and check its size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentic_r_plugin.errors import AgenticRError, BackendError, ConfigError


def enter(address: str, setting: str) -> bool:
    """Connect to the cluster at `address`, or start one on this machine if it is empty.

    Args:
        setting: name of the address setting, for messages.

    Returns:
        Whether the caller must call `ray.shutdown`: False if this process was already connected.

    Raises:
        ConfigError: no cluster at the address.
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
    """Check that the cluster has room for all workers; Ray would silently wait for more machines.

    Args:
        cpus, gpus: resources reserved per worker.
        names: the settings to lower, for the message.

    Raises:
        ConfigError: the cluster has too few processors or accelerators.
    """
    import ray

    for resource, each in (("CPU", cpus), ("GPU", gpus)):
        wanted, found = each * workers, ray.cluster_resources().get(resource, 0.0)
        if wanted > found:
            raise ConfigError(
                f"{workers} workers want {wanted:g} {resource} in all, the Ray cluster has {found:g}; lower {names}"
            )


def one_per_node(actors: Sequence[Any]) -> list[Any]:
    """The first actor on each machine; actors have a method `node` that returns `this_node()`."""
    import ray

    first: dict[str, Any] = {}
    for actor, node in zip(actors, ray.get([actor.node.remote() for actor in actors]), strict=True):
        first.setdefault(node, actor)
    return list(first.values())


def this_node() -> str:
    """Name of the machine that this process runs on."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def get(reference: Any, worker: str) -> Any:
    """The result of an actor call.

    Args:
        worker: description of the actor, for the message.

    Raises:
        AgenticRError: the call raised it.
        BackendError: the actor's process died, and died again after every restart.
    """
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return ray.get(reference)
    except (RayActorError, RayTaskError) as error:
        if (fault := our_fault(error)) is not None:
            raise fault from None
        if isinstance(error, RayTaskError):
            raise
        raise BackendError(f"{worker} died: {str(error).strip().splitlines()[-1]}") from error


def our_fault(error: BaseException | None) -> AgenticRError | None:
    """The exception of this package behind an error that may have passed through Ray."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, AgenticRError):
            return error
        seen.add(id(error))
        error = getattr(error, "cause", None) or error.__cause__
    return None
