"""Run a stage on Ray: actors hold the models; only the driver feeds them and writes files.

Plain actors, because a stage needs what `ray.data.map_batches` hides: each finished batch at the driver at once, in any
order, to be stored. Back-pressure is the number of batches in flight. If an actor's process dies, the actor is
restarted with its batch (`max_restarts`); batches that it finished before are stored and not repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import methodcaller
from typing import Any

from agentic_r_plugin.data.stages.runner import Result, RunnerSpec, StageWorker, WorkBatch, do_batch, flow
from agentic_r_plugin.ray_cluster import Pool


class RayExecutor:
    """Runs batches on Ray actors.

    Args:
        factory: builds a worker; it is pickled, so it must be importable on the actors' machines.
        spec: number of workers, their resources, and the address of the cluster.

    Raises:
        ConfigError: no cluster at the address, or too few processors or accelerators in it.
    """

    def __init__(self, factory: Callable[[], StageWorker], spec: RunnerSpec) -> None:
        self._spec = spec
        self._pool = Pool(
            factory,
            spec.workers,
            address=spec.address,
            setting="runner.address",
            names="runner.workers, runner.cpus_per_worker or runner.gpus_per_worker",
            worker=f"a worker of the Ray cluster (runner.max_restarts={spec.max_restarts})",
            cpus=spec.cpus_per_worker,
            gpus=spec.gpus_per_worker,
            restarts=spec.max_restarts,
        )
        self._load = [0] * spec.workers  # batches in flight at each actor
        self._place_of: dict[Any, int] = {}

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the workers' models, which must be equal on every machine.

        Raises:
            ConfigError: they differ.
        """
        return dict(self._pool.same(methodcaller("fingerprints"), "runner: the workers' models"))

    def run(self, batches: Iterator[WorkBatch[Any]]) -> Iterator[tuple[WorkBatch[Any], Result]]:
        """See `Executor.run`."""
        capacity = self._spec.workers * self._spec.in_flight
        yield from flow(batches, capacity, self._submit, self._first_done, self._pool.get)

    def close(self) -> None:
        """Let the workers free their models, stop the actors, and stop the cluster if it was started here."""
        self._pool.close()

    def _submit(self, batch: WorkBatch[Any]) -> Any:
        # To the least busy actor, so that each has its next batch waiting (`in_flight`).
        least = self._load.index(min(self._load))
        reference = self._pool.call(least, do_batch, batch.tasks)
        self._place_of[reference] = least
        self._load[least] += 1
        return reference

    def _first_done(self, running: Sequence[Any]) -> Any:
        reference = self._pool.first_done(running)
        self._load[self._place_of.pop(reference)] -= 1
        return reference
