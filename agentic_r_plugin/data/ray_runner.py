"""Run a stage on Ray: actors hold the models; only the driver feeds them and writes files.

Plain actors, because a stage needs what `ray.data.map_batches` hides: each finished batch at the driver at once, in any
order, to be stored. Back-pressure is the number of batches in flight. If an actor's process dies, the actor is
restarted with its batch (`max_restarts`); batches that it finished before are stored and not repeated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from agentic_r_plugin import ray_cluster
from agentic_r_plugin.data.runner import Batch, Result, RunnerSpec, Worker, do_batch, flow
from agentic_r_plugin.errors import ConfigError

_CLOSE_S = 10.0
"""Seconds after which a worker that is still busy is killed."""


class RayWorker:
    """A worker in its own process."""

    def __init__(self, factory: Callable[[], Worker[Any]]) -> None:
        self._factory = factory

    @cached_property
    def _worker(self) -> Worker[Any]:
        """Built on first use: Ray loses the cause of an error raised in a constructor."""
        return self._factory()

    def node(self) -> str:
        """Name of the machine it runs on."""
        return ray_cluster.this_node()

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the worker's models."""
        return self._worker.fingerprints()

    def do(self, tasks: Sequence[Any]) -> Result:
        """Work on one batch."""
        return do_batch(self._worker, tasks)

    def close(self) -> None:
        """Free the models, if they were loaded."""
        if "_worker" in vars(self):
            self._worker.close()


class RayExecutor:
    """Runs batches on Ray actors.

    Args:
        factory: builds a worker; it is pickled, so it must be importable on the actors' machines.
        spec: number of workers, their resources, and the address of the cluster.

    Raises:
        ConfigError: no cluster at the address, or too few processors or accelerators in it.
    """

    def __init__(self, factory: Callable[[], Worker[Any]], spec: RunnerSpec) -> None:
        import ray

        self._ray, self._spec = ray, spec
        self._ours = ray_cluster.enter(spec.address, "runner.address")
        try:
            ray_cluster.require(
                spec.workers,
                cpus=spec.cpus_per_worker,
                gpus=spec.gpus_per_worker,
                names="runner.workers, runner.cpus_per_worker or runner.gpus_per_worker",
            )
        except ConfigError:
            self.close()
            raise
        actor = ray.remote(RayWorker).options(  # type: ignore[attr-defined]
            num_cpus=spec.cpus_per_worker,
            num_gpus=spec.gpus_per_worker,
            max_restarts=spec.max_restarts,
            max_task_retries=spec.max_restarts,
        )
        self._actors: list[Any] = [actor.remote(factory) for _ in range(spec.workers)]
        self._load: Counter[int] = Counter(dict.fromkeys(range(spec.workers), 0))
        self._actor_of: dict[Any, int] = {}

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the workers' models, which must be equal on every node.

        Raises:
            ConfigError: they differ.
        """
        asked = ray_cluster.one_per_node(self._actors)  # actors on one machine read the same files
        first, *others = (self._get(reference) for reference in [actor.fingerprints.remote() for actor in asked])
        for other in others:
            if other != first:
                raise ConfigError(f"runner: the workers' models differ from node to node: {first} and {other}")
        return dict(first)

    def run(self, batches: Iterator[Batch[Any]]) -> Iterator[tuple[Batch[Any], Result]]:
        """See `Executor.run`."""
        yield from flow(batches, self._spec.workers * self._spec.in_flight, self._submit, self._first_done, self._get)

    def close(self) -> None:
        """Let the workers free their models, stop the actors, and stop the cluster if it was started here."""
        actors = getattr(self, "_actors", [])
        if actors:
            closing = [actor.close.remote() for actor in actors]
            self._ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_S)
        for actor in actors:
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()

    def _submit(self, batch: Batch[Any]) -> Any:
        least = min(self._load, key=self._load.__getitem__)
        reference = self._actors[least].do.remote(batch.tasks)
        self._actor_of[reference] = least
        self._load[least] += 1
        return reference

    def _first_done(self, running: Sequence[Any]) -> Any:
        (reference, *_), _ = self._ray.wait(list(running), num_returns=1)
        self._load[self._actor_of.pop(reference)] -= 1
        return reference

    def _get(self, reference: Any) -> Any:
        worker = f"a worker of the Ray cluster (runner.max_restarts={self._spec.max_restarts})"
        return ray_cluster.get(reference, worker)
