"""The Ray cluster for the workers of data stages, engines of a model and `index`: connect to it, or start it.

`index` deals its shards with `ray.util.ActorPool`. Data stages and engines address the members themselves: an
`ActorPool` does not say which batch or member a result is of, and holds no next batch ready at a busy member.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from agentic_r_plugin.errors import AgenticRError, BackendError, ConfigError

_CLOSE_S = 10.0
"""Seconds after which a member that is still busy is killed."""


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


class Member:
    """An object in a process of the cluster. It is built on first use: Ray loses the cause of a constructor's error."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build

    @cached_property
    def _object(self) -> Any:
        return self._build()

    def node(self) -> str:
        """Name of the machine it runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def apply(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Result of a function of the object."""
        return function(self._object, *arguments, **named)

    def close(self) -> None:
        """Close the object, if it was built."""
        if "_object" in vars(self):
            self._object.close()


class Pool:
    """Members of a cluster that hold equal objects. A member whose process dies is started again with its call.

    Args:
        build: builds the object; pickled, so it must be importable where the members run.
        count: number of members.
        address, setting, names: see `enter` and `require`.
        worker: description of a member, for messages.
        cpus, gpus: resources reserved per member.
        gpus_if_any: reserve no GPU if the cluster has none.
        restarts: times that each member is started again.

    Raises:
        ConfigError: no cluster at the address, or too few processors or accelerators in it.
    """

    def __init__(
        self, build: Callable[[], Any], count: int, *, address: str, setting: str, names: str, worker: str,
        cpus: float = 0.0, gpus: float = 0.0, gpus_if_any: bool = False, restarts: int,
    ) -> None:  # fmt: skip
        import ray

        self._ray: Any = ray
        self._worker, self.members = worker, list[Any]()
        self._ours = enter(address, setting)
        try:
            gpus = 0.0 if gpus_if_any and not ray.cluster_resources().get("GPU") else gpus
            require(count, cpus=cpus, gpus=gpus, names=names)
        except ConfigError:
            self.close()
            raise
        member = self._ray.remote(Member).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=restarts, max_task_retries=restarts
        )
        self.members += [member.remote(build) for _ in range(count)]

    def call(self, place: int, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Start a call of `function(object, ...)` at a member; returns its reference."""
        return self.members[place].apply.remote(function, *arguments, **named)

    def get(self, reference: Any) -> Any:
        """Result of a call; raises as `errors`."""
        with self.errors():
            return self._ray.get(reference)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise what a call raised.

        Raises:
            AgenticRError: the call raised it.
            BackendError: the member's process died, and died again after every restart.
        """
        from ray.exceptions import RayActorError, RayTaskError

        try:
            yield
        except (RayActorError, RayTaskError) as error:
            if (fault := our_fault(error)) is not None:
                raise fault from None
            if isinstance(error, RayTaskError):
                if isinstance(error.cause, Exception):
                    raise error.cause from error
                raise
            raise BackendError(f"{self._worker} died: {str(error).strip().splitlines()[-1]}") from error

    def first_done(self, references: Sequence[Any]) -> Any:
        """Wait for one of the calls; returns its reference."""
        (reference, *_), _ = self._ray.wait(list(references), num_returns=1)
        return reference

    def same(self, function: Callable[[Any], Any], what: str) -> Any:
        """Result of a function that must be equal on every machine; members of one machine read the same files.

        Raises:
            ConfigError: it is not; `what` names the results.
        """
        places: dict[str, int] = {}
        for place, node in enumerate(self._ray.get([member.node.remote() for member in self.members])):
            places.setdefault(node, place)
        first, *others = [self.get(reference) for reference in [self.call(p, function) for p in places.values()]]
        for other in others:
            if other != first:
                raise ConfigError(f"{what} differ from machine to machine: {first} and {other}")
        return first

    def close(self) -> None:
        """Let the members close their objects, stop them, and stop the cluster if it was started here."""
        if self.members:
            closing = [member.close.remote() for member in self.members]
            self._ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_S)
        for member in self.members:
            self._ray.kill(member)
        self.members = []
        if self._ours:
            self._ray.shutdown()
            self._ours = False


def our_fault(error: BaseException | None) -> AgenticRError | None:
    """The exception of this package behind an error that may have passed through Ray."""
    # Causes may form a circle.
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, AgenticRError):
            return error
        seen.add(id(error))
        error = getattr(error, "cause", None) or error.__cause__
    return None
