"""Executors: run a stage's batches in this process, in threads, or on Ray actors. Only the caller writes files.

Each executor slot builds its worker once from a picklable factory, which loads the models. Batches go out and outcomes
come back in any order. At most `workers * in_flight` batches are in flight, so neither input nor results pile up.
"""

from __future__ import annotations

import queue
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from agentic_r_plugin.config import check_least, setting, to_dict
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.errors import BackendError, ConfigError
from agentic_r_plugin.storage.table import UnitResult

Task = TypeVar("Task")

KINDS = ("local", "ray")


@dataclass(frozen=True, kw_only=True)
class RunnerSpec:
    """Where a stage runs and how its output is cut."""

    kind: str = setting("local: in this process; ray: actors of a Ray cluster", default="local")
    workers: int = setting("each with its own models; local ones are threads", default=1)
    in_flight: int = setting("batches a worker of Ray has at a time, one of them waiting", default=2)
    cpus_per_worker: float = setting("what Ray reserves for a worker", default=1.0)
    gpus_per_worker: float = setting("what Ray reserves for a worker", default=0.0)
    address: str = setting("of a Ray cluster ('auto': this node's); empty: start one here", default="")
    max_restarts: int = setting("how often Ray starts a worker again whose process died", default=3)
    part_size: int = setting("units per file of an output that is sharded", default=8192)
    sharded: bool = setting("write the output as a folder of files", default=False)
    forecast: int = setting("process N units only and forecast the cost of all", default=0)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"runner.kind={self.kind!r}: expected one of {', '.join(KINDS)}")
        check_least(self, "runner.", workers=1, in_flight=1, part_size=1)
        if self.forecast < 0:
            raise ConfigError(f"runner.forecast: expected 0 (no forecast) or more, found {self.forecast}")

    @property
    def elsewhere(self) -> bool:
        """Whether workers run in an existing cluster: with other working folders, perhaps on other machines."""
        return self.kind == "ray" and self.address not in ("", "local")


class StageWorker(ABC):
    """Does the work of a stage, counts its cost, and closes the models that were entered into `models`."""

    def __init__(self, cost: Cost | None = None) -> None:
        self.cost, self.models = cost or Cost(), ExitStack()

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the models used, by role."""
        return {}

    @abstractmethod
    def work(self, batch: Sequence[Any]) -> Sequence[UnitResult]:
        """One result per task, in order; adds to `cost`."""

    def close(self) -> None:
        """Close the models."""
        self.models.close()


@dataclass(frozen=True)
class WorkBatch(Generic[Task]):
    """Tasks with their positions in the input and their keys."""

    positions: tuple[int, ...]
    keys: tuple[str, ...]
    tasks: tuple[Task, ...]


Result = tuple[list[UnitResult], dict[str, float]]
"""Outcomes of a batch, and their cost."""


def do_batch(worker: StageWorker, tasks: Sequence[Any]) -> Result:
    """Process one batch and measure its cost."""
    # A worker adds up its cost over its whole life; the difference is the cost of this batch.
    before, start = to_dict(worker.cost), time.monotonic()
    outcomes = list(worker.work(tasks))
    if len(outcomes) != len(tasks):
        raise BackendError(f"{type(worker).__name__}: {len(tasks)} units given, {len(outcomes)} outcomes returned")
    spent = {key: value - before[key] for key, value in to_dict(worker.cost).items()}
    return outcomes, spent | {"seconds": time.monotonic() - start}


class Executor(Protocol):
    """Sends batches to workers."""

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the workers' models, by role."""

    def run(self, batches: Iterator[WorkBatch[Any]]) -> Iterator[tuple[WorkBatch[Any], Result]]:
        """Finished batches, in any order.

        After a batch fails, no further batch is started; its error is raised once all batches in flight have ended.
        """

    def close(self) -> None:
        """Stop the workers."""


def open_executor(factory: Callable[[], StageWorker], spec: RunnerSpec) -> Executor:
    """The executor that `spec` asks for; each worker calls `factory` once, in its own process or thread."""
    if spec.kind == "ray":
        from agentic_r_plugin.data.stages.ray_runner import RayExecutor

        return RayExecutor(factory, spec)
    return ThreadExecutor(factory, spec.workers) if spec.workers > 1 else LocalExecutor(factory)


class LocalExecutor:
    """One worker in this thread."""

    def __init__(self, factory: Callable[[], StageWorker]) -> None:
        self._worker = factory()

    def fingerprints(self) -> dict[str, str]:
        """See `Executor.fingerprints`."""
        return self._worker.fingerprints()

    def run(self, batches: Iterator[WorkBatch[Any]]) -> Iterator[tuple[WorkBatch[Any], Result]]:
        """See `Executor.run`."""
        for batch in batches:
            yield batch, do_batch(self._worker, batch.tasks)

    def close(self) -> None:
        """See `Executor.close`."""
        self._worker.close()


class ThreadExecutor:
    """Several workers, each used by one thread at a time; keeps a server busy while a batch finishes its last units."""

    def __init__(self, factory: Callable[[], StageWorker], workers: int) -> None:
        self._workers = [factory() for _ in range(workers)]
        self._free: queue.SimpleQueue[StageWorker] = queue.SimpleQueue()
        for worker in self._workers:
            self._free.put(worker)
        self._pool = ThreadPoolExecutor(workers)

    def fingerprints(self) -> dict[str, str]:
        """See `Executor.fingerprints`."""
        return self._workers[0].fingerprints()

    def run(self, batches: Iterator[WorkBatch[Any]]) -> Iterator[tuple[WorkBatch[Any], Result]]:
        """See `Executor.run`."""

        def work(batch: WorkBatch[Any]) -> Result:
            # There are as many workers as threads, so this never waits.
            worker = self._free.get()
            try:
                return do_batch(worker, batch.tasks)
            finally:
                self._free.put(worker)

        def first_done(running: Sequence[Future[Result]]) -> Future[Result]:
            return next(iter(wait(running, return_when=FIRST_COMPLETED).done))

        yield from flow(
            batches, len(self._workers), lambda batch: self._pool.submit(work, batch), first_done, Future.result
        )

    def close(self) -> None:
        """See `Executor.close`."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()


def flow(
    batches: Iterator[WorkBatch[Any]],
    capacity: int,
    submit: Callable[[WorkBatch[Any]], Any],
    first_done: Callable[[Sequence[Any]], Any],
    result: Callable[[Any], Result],
) -> Iterator[tuple[WorkBatch[Any], Result]]:
    """Keep up to `capacity` batches in flight; take a batch from the iterator only when there is room for it.

    After an error no further batch is taken; batches in flight are awaited, then the first error is raised.

    Args:
        submit: starts a batch; returns its handle.
        first_done: waits until one of the handles is done; returns it.
        result: result of a finished handle; raises the error of its batch.
    """
    running: dict[Any, WorkBatch[Any]] = {}
    more, failed = True, None
    while more or running:
        while more and len(running) < capacity:
            try:
                batch = next(batches, _END)
            except Exception as error:  # reading or preparing the input failed
                batch, failed = _END, failed or error
            if batch is _END:
                more = False
            else:
                running[submit(batch)] = batch
        if running:
            handle = first_done(list(running))
            batch = running.pop(handle)
            try:
                found = result(handle)
            except Exception as error:
                # The first error is the one to report. Batches in flight still yield their results, which are kept.
                more, failed = False, failed or error
                continue
            yield batch, found
    if failed is not None:
        raise failed


_END: Any = object()
