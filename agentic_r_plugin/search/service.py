"""What the retrieval service does behind HTTP: puts concurrent searches together, remembers results, counts.

Requests that arrive within a few milliseconds are one call of the backend, because encoding 32 queries at once costs
little more than encoding one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from agentic_r_plugin.errors import SearchError
from agentic_r_plugin.search.base import Hit, SearchBackend, SearchRequest


class OverloadedError(SearchError):
    """Too many searches are waiting."""


@dataclass
class _Waiting:
    """Searches of one HTTP request that were not in the cache."""

    requests: list[SearchRequest]
    topk: int
    future: asyncio.Future[list[list[Hit]]]


class SearchService:
    """Batches, cache and counters over a backend. `start` and `stop` are called on the serving event loop.

    Args:
        backend: asked from one thread, one batch at a time.
        max_batch: queries of one backend call, unless a single request brings more.
        window_ms: how long a batch waits for company after its first query.
        cache_size: results kept, least recently used dropped first; 0 keeps none.
        max_waiting: queries waiting at most; beyond it searches are refused.
    """

    def __init__(
        self, backend: SearchBackend, *, max_batch: int, window_ms: float, cache_size: int, max_waiting: int
    ) -> None:
        self.backend, self.metrics = backend, Metrics()
        self._max_batch, self._window_s = max_batch, window_ms / 1000
        self._cache: OrderedDict[SearchRequest, tuple[int, list[Hit]]] = OrderedDict()
        self._cache_size, self._max_waiting, self._waiting = cache_size, max_waiting, 0
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work."""
        self._worker = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Stop working; the batch in hand is finished, waiting searches are refused."""
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        while not self._queue.empty():
            _fail(self._queue.get_nowait(), OverloadedError("the service is shutting down"))
        self._thread.shutdown(wait=True)

    async def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """Hits of each request, from the cache or from a batch.

        Raises:
            OverloadedError: too many queries are waiting.
            SearchError: the backend failed.
        """
        self.metrics.add("queries", len(requests))
        known = {request: hits for request in set(requests) if (hits := self._cached(request, topk)) is not None}
        missing = [request for request in dict.fromkeys(requests) if request not in known]
        self.metrics.add("cache_hits", len(requests) - sum(request not in known for request in requests))
        if missing:
            known |= zip(missing, await self._enqueue(missing, topk), strict=True)
        return [known[request] for request in requests]

    async def _enqueue(self, requests: list[SearchRequest], topk: int) -> list[list[Hit]]:
        if self._waiting and self._waiting + len(requests) > self._max_waiting:
            raise OverloadedError(f"{self._waiting} queries are waiting already")
        future: asyncio.Future[list[list[Hit]]] = asyncio.get_running_loop().create_future()
        self._waiting += len(requests)
        try:
            self._queue.put_nowait(_Waiting(requests, topk, future))
            return await future
        finally:
            self._waiting -= len(requests)

    async def _work(self) -> None:
        while True:
            for topk, group in (await self._next_batch()).items():
                await self._search_group(group, topk)

    async def _next_batch(self) -> dict[int, list[_Waiting]]:
        """Waiting searches by topk, gathered until the window closes or the batch is full."""
        batch = [await self._queue.get()]
        deadline = asyncio.get_running_loop().time() + self._window_s
        while sum(len(item.requests) for item in batch) < self._max_batch:
            timeout_s = deadline - asyncio.get_running_loop().time()
            if timeout_s <= 0 and self._queue.empty():
                break
            try:
                batch.append(await asyncio.wait_for(self._queue.get(), max(timeout_s, 0.0005)))
            except asyncio.TimeoutError:
                break
        groups: dict[int, list[_Waiting]] = defaultdict(list)
        for item in batch:
            if not item.future.done():  # its client may have given up
                groups[item.topk].append(item)
        return groups

    async def _search_group(self, group: list[_Waiting], topk: int) -> None:
        requests = list(dict.fromkeys(request for item in group for request in item.requests))
        started = time.perf_counter()
        work = asyncio.get_running_loop().run_in_executor(self._thread, self.backend.search, requests, topk)
        try:
            results = await asyncio.shield(work)
        except asyncio.CancelledError:
            for item in group:
                _fail(item, OverloadedError("the service is shutting down"))
            raise
        except Exception as error:
            self.metrics.add("backend_errors", 1)
            for item in group:
                _fail(item, SearchError(f"the search backend failed: {type(error).__name__}: {error}"))
            return
        self.metrics.add("batches", 1)
        self.metrics.add("batched_queries", len(requests))
        self.metrics.add("backend_seconds", time.perf_counter() - started)
        found = dict(zip(requests, results, strict=True))
        for request, hits in found.items():
            self._remember(request, topk, hits)
        for item in group:
            if not item.future.done():
                item.future.set_result([found[request] for request in item.requests])

    def _cached(self, request: SearchRequest, topk: int) -> list[Hit] | None:
        entry = self._cache.get(request)
        if entry is None or entry[0] < topk:
            return None
        self._cache.move_to_end(request)
        return entry[1][:topk]

    def _remember(self, request: SearchRequest, topk: int, hits: list[Hit]) -> None:
        if self._cache_size and self._cache.get(request, (0, []))[0] <= topk:
            self._cache[request] = (topk, hits)
            self._cache.move_to_end(request)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)


def _fail(item: _Waiting, error: SearchError) -> None:
    if not item.future.done():
        item.future.set_exception(error)


class Metrics:
    """Counters and a latency histogram, as Prometheus text."""

    BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

    def __init__(self) -> None:
        self.counters: dict[str, float] = dict.fromkeys(
            ("queries", "cache_hits", "batches", "batched_queries", "backend_seconds", "backend_errors"), 0
        )
        self.requests: dict[int, int] = defaultdict(int)
        self._buckets, self._sum, self._count = [0] * len(self.BUCKETS_S), 0.0, 0

    def add(self, name: str, amount: float) -> None:
        """Count."""
        self.counters[name] += amount

    def answered(self, status: int, seconds: float) -> None:
        """Note one answer to `/retrieve`."""
        self.requests[status] += 1
        self._sum, self._count = self._sum + seconds, self._count + 1
        for place, bound in enumerate(self.BUCKETS_S):
            self._buckets[place] += seconds <= bound

    def render(self) -> str:
        """Prometheus' text format."""
        prefix = "agentic_r_search"
        lines = []
        for name, value in self.counters.items():
            lines += [f"# TYPE {prefix}_{name}_total counter", f"{prefix}_{name}_total {value:g}"]
        lines.append(f"# TYPE {prefix}_requests_total counter")
        lines += [f'{prefix}_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.requests.items())]
        lines.append(f"# TYPE {prefix}_request_seconds histogram")
        for bound, count in zip(self.BUCKETS_S, self._buckets, strict=True):
            lines.append(f'{prefix}_request_seconds_bucket{{le="{bound:g}"}} {count}')
        lines.append(f'{prefix}_request_seconds_bucket{{le="+Inf"}} {self._count}')
        lines += [f"{prefix}_request_seconds_sum {self._sum:g}", f"{prefix}_request_seconds_count {self._count}"]
        return "\n".join(lines) + "\n"
