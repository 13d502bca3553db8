"""Counters and histograms of the retrieval service, in Prometheus' text format.

All workers map one file and count in their own row of it. So any worker can report the totals, and a restarted worker
continues from its predecessor's counts.

`prometheus_client` is not used: its multi-process mode labels bounds `le="1.0"` where users scrape `le="1"`, and is
turned on for every library of a process. A collector over this file would not make the code shorter.
"""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PREFIX = "agentic_r_search"

COUNTERS = {
    "queries": "queries asked",
    "cache_hits": "queries answered from the cache",
    "batches": "calls of the backend",
    "batched_queries": "queries in those calls",
    "backend_seconds": "seconds in those calls",
    "backend_errors": "calls of the backend that failed",
    "reloads": "indexes put in place of another",
}
GAUGES = {"waiting": "queries waiting for the backend", "cache_entries": "queries in the cache"}
STATUSES = (200, 400, 401, 403, 404, 405, 408, 413, 500, 503, 504)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

_NAMES = (
    *COUNTERS,
    *GAUGES,
    *(f"status_{status}" for status in STATUSES),
    *(f"seconds_{place}" for place in range(len(SECONDS) + 1)),
    "seconds_sum",
    *(f"batch_{place}" for place in range(len(BATCH) + 1)),
    "batch_sum",
)
_PLACE = {name: place for place, name in enumerate(_NAMES)}


class Metrics:
    """Counts of one worker, and the totals of all workers.

    Args:
        file: shared by the workers of a service; None for a single worker.
        worker: row of this worker.
        workers: number of rows in the file.
    """

    def __init__(self, file: Path | None = None, worker: int = 0, workers: int = 1) -> None:
        self._all: NDArray[np.float64] = (
            np.zeros((workers, len(_NAMES)))
            if file is None
            else np.memmap(file, np.float64, "r+", shape=(workers, len(_NAMES)))
        )
        self._own = self._all[worker]
        # Counters continue from a worker that died in this row; its queue and its cache are gone.
        for name in GAUGES:
            self.set(name, 0)

    @staticmethod
    def create(file: Path, workers: int) -> None:
        """Write the file that the workers share."""
        file.write_bytes(bytes(workers * len(_NAMES) * 8))

    def add(self, name: str, amount: float) -> None:
        """Increase a counter."""
        self._own[_PLACE[name]] += amount

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._own[_PLACE[name]] = value

    def answered(self, status: int, seconds: float) -> None:
        """Record one answer to `/retrieve` or `/documents`."""
        self.add(f"status_{status if status in STATUSES else 500}", 1)
        self.add(f"seconds_{bisect_left(SECONDS, seconds)}", 1)
        self.add("seconds_sum", seconds)

    def searched(self, queries: int, seconds: float) -> None:
        """Record one call of the backend."""
        self.add("batches", 1)
        self.add("batched_queries", queries)
        self.add("backend_seconds", seconds)
        self.add(f"batch_{bisect_left(BATCH, queries)}", 1)
        self.add("batch_sum", queries)

    def total(self, name: str) -> float:
        """Sum over all workers."""
        return float(self._all[:, _PLACE[name]].sum())

    def render(self, fingerprint: str) -> str:
        """All metrics in Prometheus' text format; a label gives the index that this worker serves."""
        lines = []
        for name, text in COUNTERS.items():
            lines += [f"# HELP {PREFIX}_{name}_total {text}", f"# TYPE {PREFIX}_{name}_total counter"]
            lines.append(f"{PREFIX}_{name}_total {self.total(name):.12g}")
        for name, text in GAUGES.items():
            lines += [f"# HELP {PREFIX}_{name} {text}", f"# TYPE {PREFIX}_{name} gauge"]
            lines.append(f"{PREFIX}_{name} {self.total(name):.12g}")
        lines += [f"# HELP {PREFIX}_requests_total answers by status", f"# TYPE {PREFIX}_requests_total counter"]
        for status in STATUSES:
            if count := self.total(f"status_{status}"):
                lines.append(f'{PREFIX}_requests_total{{status="{status}"}} {count:.12g}')
        lines += self._histogram("request_seconds", "time to answer a request", "seconds", SECONDS)
        lines += self._histogram("batch_queries", "queries in a call of the backend", "batch", BATCH)
        lines += [f"# HELP {PREFIX}_index_info the index served", f"# TYPE {PREFIX}_index_info gauge"]
        lines.append(f'{PREFIX}_index_info{{fingerprint="{_escape(fingerprint)}"}} 1')
        return "\n".join(lines) + "\n"

    def _histogram(self, name: str, text: str, prefix: str, bounds: tuple[float, ...]) -> list[str]:
        lines, count = [f"# HELP {PREFIX}_{name} {text}", f"# TYPE {PREFIX}_{name} histogram"], 0.0
        for place, bound in enumerate((*map("{:g}".format, bounds), "+Inf")):
            # Prometheus' buckets are cumulative, ours are not.
            count += self.total(f"{prefix}_{place}")
            lines.append(f'{PREFIX}_{name}_bucket{{le="{bound}"}} {count:.12g}')
        return [
            *lines,
            f"{PREFIX}_{name}_sum {self.total(f'{prefix}_sum'):.12g}",
            f"{PREFIX}_{name}_count {count:.12g}",
        ]


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
