"""Encodes a corpus into shards of vectors: in this process, on every device of this node, or on a Ray cluster.

A shard is a `.npy` file of (rows, D) float32 vectors, named by its first row and written atomically. Workers share only
the folder: a shard that exists is finished, and a run that was killed continues with the missing shards.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentic_r_plugin.child import die_with
from agentic_r_plugin.compute import check_device
from agentic_r_plugin.errors import BackendError, ConfigError, IndexMismatchError, RecordError, SearchError
from agentic_r_plugin.progress import progress
from agentic_r_plugin.ray_cluster import Pool
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.store import atomic_path

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """All a worker needs to encode any shard of a corpus."""

    corpus: str
    table: str
    """Folder with the corpus' saved table."""
    retriever: str
    retriever_fingerprint: str
    load: dict[str, Any]
    """Further arguments of `Retriever.load`, except the device."""
    folder: str
    """Folder of the shards; with Ray, one that every node can see."""
    shard_size: int
    batch_size: int
    max_batch_tokens: int
    title_form: str = "contents"

    def path(self, start: int) -> Path:
        """Path of the shard that begins at row `start`."""
        return Path(self.folder) / f"{start:010d}.npy"

    def rows(self, start: int, total: int) -> range:
        """Rows of the shard that begins at row `start`, of a corpus of `total` passages."""
        return range(start, min(start + self.shard_size, total))


def encode_shards(job: ShardJob, corpus: Corpus, retriever: Retriever, devices: list[str], ray: RayWorkers) -> None:
    """Encode every missing shard, with a progress bar.

    Args:
        retriever: used if a single device of this process does the work.
        devices: one worker process per device if there are several.
        ray: actors of a Ray cluster, used instead if there are any.

    Raises:
        RecordError: the retriever returns vectors that are not finite.
        SearchError: a worker died.
    """
    rows = {start: len(job.rows(start, len(corpus))) for start in range(0, len(corpus), job.shard_size)}
    missing = [start for start in rows if not job.path(start).is_file()]
    there = len(corpus) - sum(rows[start] for start in missing)
    with progress(total=len(corpus), initial=there, desc="index", unit="passage") as shown:
        if not missing:
            return
        if ray.count:
            done = _on_ray(job, missing, ray)
        elif len(devices) > 1:
            done = _on_devices(job, missing, devices)
        else:
            encoder = ShardEncoder(job, corpus, retriever)
            done = (encoder.encode(start) for start in missing)
        for start in done:
            shown.update(rows[start])


class ShardEncoder:
    """Encodes shards with one retriever on one device."""

    def __init__(self, job: ShardJob, corpus: Corpus, retriever: Retriever) -> None:
        self.job, self.corpus, self.retriever = job, corpus, retriever

    @classmethod
    def open(cls, job: ShardJob, device: str) -> ShardEncoder:
        """In a worker: load the table and the retriever of the job.

        Raises:
            IndexMismatchError: the retriever is not the one that the job was made with.
        """
        retriever = Retriever.load(job.retriever, device=device, **job.load)
        if (found := retriever.fingerprint()) != job.retriever_fingerprint:
            raise IndexMismatchError(
                f"a worker on {device} finds another retriever at {job.retriever} ({found} instead of "
                f"{job.retriever_fingerprint}); it was changed while the index was being built"
            )
        return cls(job, Corpus(job.corpus, table=job.table), retriever)

    def encode(self, start: int) -> int:
        """Write the shard that begins at row `start`; returns `start`."""
        rows = self.job.rows(start, len(self.corpus))
        vectors = self.retriever.encode_passages(
            [self.corpus[row] for row in rows],
            batch_size=self.job.batch_size,
            max_batch_tokens=self.job.max_batch_tokens,
            title_form=self.job.title_form,
        )
        if not np.isfinite(vectors).all():
            raise RecordError(
                f"retriever {self.job.retriever} gives vectors that are not finite for rows {start}-{rows[-1]}",
                path=self.corpus.path,
            )
        with atomic_path(self.job.path(start)) as temporary, temporary.open("wb") as stream:
            np.save(stream, vectors)
        return start

    def close(self) -> None:
        """Close the corpus."""
        self.corpus.close()


def resolve_devices(text: str) -> list[str]:
    """Devices of a setting: `auto` is every CUDA device of this node, or the CPU; else a list such as `cuda:0,cuda:1`.

    Raises:
        ConfigError: a device that this torch does not have.

    >>> resolve_devices("cpu, cpu")
    ['cpu', 'cpu']
    """
    if text == "auto":
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    devices = [part.strip() for part in text.split(",")]
    for device in devices:
        check_device(device)
    return devices


# --- processes on one node --------------------------------------------------------------------------------------------

_task: tuple[ShardJob, str] | None = None
_encoder: ShardEncoder | None = None
"""Encoder of this worker process; loaded with its first shard, so that a failure is reported as that shard's error."""


def _begin(job: ShardJob, devices: Any, threads: int) -> None:
    global _task
    die_with(os.getppid())
    # Each process takes one device from the queue.
    _task = job, devices.get()
    if torch.device(_task[1]).type == "cpu":
        torch.set_num_threads(threads)


def _encode(start: int) -> int:
    global _encoder
    assert _task is not None
    _encoder = _encoder or ShardEncoder.open(*_task)
    return _encoder.encode(start)


def _on_devices(job: ShardJob, missing: list[int], devices: list[str]) -> Iterator[int]:
    context = multiprocessing.get_context("spawn")
    waiting: Any = context.Queue()
    for device in devices:
        waiting.put(device)
    # Several workers on the CPU share its cores.
    threads = max(1, (os.cpu_count() or 1) // len(devices))
    with ProcessPoolExecutor(len(devices), context, _begin, (job, waiting, threads)) as pool:
        futures = [pool.submit(_encode, start) for start in missing]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool as error:
            raise SearchError(
                f"an encoding worker (devices {', '.join(devices)}) ended without an error message, perhaps because "
                "memory ran out; finished shards are kept, go on with --resume"
            ) from error
        finally:
            for future in futures:
                # After an error the pool would encode all remaining shards before it closes.
                future.cancel()


# --- Ray --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RayWorkers:
    """Ray actors that encode; with `count` 0, Ray is not used."""

    count: int = 0
    address: str = ""
    """Address of a running cluster (`auto`, `ray://…`); empty starts one on this machine."""
    gpus: float = 0.0
    """GPUs per actor."""


def _on_ray(job: ShardJob, missing: list[int], workers: RayWorkers) -> Iterator[int]:
    """Give each actor one shard at a time.

    Raises:
        ConfigError: a shard written by an actor is not visible here.
    """
    from ray.util import ActorPool

    pool = Pool(
        # Ray shows an actor only the GPUs that are reserved for it.
        partial(ShardEncoder.open, job, "cuda:0" if workers.gpus else "cpu"),
        min(workers.count, len(missing)),
        address=workers.address,
        setting="ray_address",
        names="ray_workers or ray_gpus",
        worker="an encoding actor",
        cpus=1,
        gpus=workers.gpus,
        restarts=2,
    )
    try:
        with pool.errors():
            for start in ActorPool(pool.members).map_unordered(_encode_at, missing):
                if not job.path(start).is_file():
                    raise ConfigError(
                        f"{job.path(start)}: an actor of the Ray cluster wrote this file, but it is not visible here; "
                        "put the index folder (--out) on a disk that all machines share"
                    )
                yield start
    except BackendError as error:
        raise SearchError(f"{error}; finished shards are kept, go on with --resume") from error
    finally:
        pool.close()


def _encode_at(member: Any, start: int) -> Any:
    return member.apply.remote(ShardEncoder.encode, start)
