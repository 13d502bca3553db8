"""The retrieval service behind HTTP: batches concurrent searches, caches results, swaps backends.

Requests that arrive within a few milliseconds share one backend call, because encoding 32 queries at once costs little
more than encoding one. The next batch fills while the backend works, so under load no request waits for the window.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain

from agentic_r_plugin.errors import SearchError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.base import Hit, SearchBackend, SearchRequest, open_documents
from agentic_r_plugin.search.service.metrics import Metrics

_HITS_PER_RESULT = 32
"""Average passages per cached result: deep searches must not fill the memory."""


class OverloadedError(SearchError):
    """Too many searches are waiting."""


@dataclass
class _Waiting:
    """Searches of one HTTP request that were not in the cache."""

    requests: list[SearchRequest]
    topk: int
    depth: int
    future: asyncio.Future[list[list[Hit]]]
    since_s: float
    """Arrival time on the event loop's clock."""


class SearchService:
    """Batching and caching on top of a backend. Call `start`, `stop` and `swap` on the serving event loop.

    Args:
        backend: called from one thread, one batch at a time; closed when it is replaced.
        max_batch: queries per backend call, unless a single request holds more.
        window_ms: how long a batch waits for more queries after its first.
        cache_size: results in the cache (least recently used), with 32 passages each on average; 0 disables it.
        max_waiting: maximum number of waiting queries; further searches are refused.
    """

    def __init__(
        self,
        backend: SearchBackend,
        *,
        max_batch: int,
        window_ms: float,
        cache_size: int,
        max_waiting: int,
        metrics: Metrics | None = None,
    ) -> None:
        self.backend, self.metrics = backend, metrics or Metrics()
        self.fingerprint = backend.fingerprint()
        self.accepting = True
        """False while the service shuts down."""
        self._max_batch, self._window_s = max_batch, window_ms / 1000
        self._cache: OrderedDict[bytes, tuple[int, list[Hit]]] = OrderedDict()
        self._cache_size, self._max_waiting, self._waiting = cache_size, max_waiting, 0
        self._cached_hits = 0
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        # One thread: a backend is called with one batch at a time, and jobs run in the order they were submitted.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the batching task."""
        self._worker = asyncio.get_running_loop().create_task(self._work())

    @property
    def ready(self) -> bool:
        """Whether searches are accepted and answered."""
        return self.accepting and self._worker is not None and not self._worker.done()

    def swap(self, backend: SearchBackend) -> None:
        """Use another backend from now on; the old one finishes the current batch and is then closed.

        No search is dropped: waiting searches are answered by the new backend.
        """
        old, self.backend = self.backend, backend
        self.fingerprint = backend.fingerprint()
        self._cache.clear()
        self._cached_hits = 0
        self.metrics.set("cache_entries", 0)
        self.metrics.add("reloads", 1)
        # The thread runs one job at a time, so the old backend is closed after the batch that it is working on.
        self._thread.submit(old.close)

    async def stop(self) -> None:
        """Stop; the current batch is finished, waiting searches are refused."""
        self.accepting = False
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        while self._queue:
            _fail(self._queue.popleft(), OverloadedError("the service is shutting down"))
        self._thread.shutdown(wait=True)

    async def search(self, requests: Sequence[SearchRequest], topk: int, depth: int = 0) -> list[list[Hit]]:
        """Hits of each request, from the cache or the backend.

        Args:
            depth: passages to rank again, for a backend that reranks; 0: as many as it is built for.

        Raises:
            OverloadedError: too many queries are waiting.
            SearchError: the backend failed.
        """
        self.metrics.add("queries", len(requests))
        known = {request: hits for request in set(requests) if (hits := self._cached(request, topk, depth)) is not None}
        missing = [request for request in dict.fromkeys(requests) if request not in known]
        self.metrics.add("cache_hits", len(requests) - sum(request not in known for request in requests))
        if missing:
            known |= zip(missing, await self._enqueue(missing, topk, depth), strict=True)
        return [known[request] for request in requests]

    async def documents(self, ids: Sequence[str]) -> list[Passage | None]:
        """The documents with these ids; None for an unknown id.

        Raises:
            OverloadedError: too many queries are waiting.
            SearchError: the backend failed, or cannot open documents.
        """
        self._admit(len(ids))
        try:
            # On the thread of the searches, so that a swap closes this backend only afterwards.
            work = asyncio.get_running_loop().run_in_executor(self._thread, open_documents, self.backend, ids)
        except RuntimeError as error:  # the thread was shut down
            raise OverloadedError("the service is shutting down") from error
        self._wait(len(ids))
        try:
            return await work
        except SearchError:
            raise
        except Exception as error:
            self.metrics.add("backend_errors", 1)
            raise SearchError(f"the search backend failed: {type(error).__name__}: {error}") from error
        finally:
            self._wait(-len(ids))

    def _admit(self, count: int) -> None:
        # A single large request is accepted while nothing waits; otherwise it could never be served.
        if self._waiting and self._waiting + count > self._max_waiting:
            raise OverloadedError(f"{self._waiting} queries are waiting already")

    async def _enqueue(self, requests: list[SearchRequest], topk: int, depth: int) -> list[list[Hit]]:
        self._admit(len(requests))
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[list[Hit]]] = loop.create_future()
        self._wait(len(requests))
        try:
            self._queue.append(_Waiting(requests, topk, depth, future, loop.time()))
            self._arrived.set()
            return await future
        finally:
            self._wait(-len(requests))

    def _wait(self, change: int) -> None:
        self._waiting += change
        self.metrics.set("waiting", self._waiting)

    async def _work(self) -> None:
        while True:
            groups = await self._next_batch()
            try:
                while groups:
                    (topk, depth) = next(iter(groups))
                    await self._search_group(groups.pop((topk, depth)), topk, depth)
            finally:  # `stop` cancels between two groups, too
                for item in chain.from_iterable(groups.values()):
                    _fail(item, OverloadedError("the service is shutting down"))

    async def _next_batch(self) -> dict[tuple[int, int], list[_Waiting]]:
        """Next batch of waiting searches, by topk and depth: at once if full, else after the window of its first."""
        loop = asyncio.get_running_loop()
        while True:
            # Clear before counting, so that a search arriving in between ends the wait below.
            self._arrived.clear()
            waiting = sum(len(item.requests) for item in self._queue)
            left_s = self._queue[0].since_s + self._window_s - loop.time() if self._queue else None
            if waiting >= self._max_batch or (left_s is not None and left_s <= 0):
                break
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left_s)
        groups: dict[tuple[int, int], list[_Waiting]] = defaultdict(list)
        taken = 0
        # The first is taken whatever its size: one request may hold more queries than a batch.
        while self._queue and (not taken or taken + len(self._queue[0].requests) <= self._max_batch):
            item = self._queue.popleft()
            taken += len(item.requests)
            if not item.future.done():  # the client may have disconnected
                groups[item.topk, item.depth].append(item)
        return groups

    async def _search_group(self, group: list[_Waiting], topk: int, depth: int) -> None:
        requests = list(dict.fromkeys(request for item in group for request in item.requests))
        started, backend = time.perf_counter(), self.backend
        search: Callable[..., list[list[Hit]]] = backend.search
        if depth:
            search = partial(search, depth=depth)
        work = asyncio.get_running_loop().run_in_executor(self._thread, search, requests, topk)
        try:
            # A running backend call cannot be interrupted; the shield lets it finish when `stop` cancels this task.
            results = await asyncio.shield(work)
            if len(results) != len(requests):
                raise SearchError(f"{len(requests)} searches given, {len(results)} results returned")
        except asyncio.CancelledError:
            for item in group:
                _fail(item, OverloadedError("the service is shutting down"))
            raise
        except Exception as error:
            self.metrics.add("backend_errors", 1)
            for item in group:
                _fail(item, SearchError(f"the search backend failed: {type(error).__name__}: {error}"))
            return
        self.metrics.searched(len(requests), time.perf_counter() - started)
        found = dict(zip(requests, results, strict=True))
        # After a swap these hits come from the old index: return them, but do not cache them for the new one.
        if backend is self.backend:
            for request, hits in found.items():
                self._remember(request, topk, hits, depth)
            self.metrics.set("cache_entries", len(self._cache))
        for item in group:
            if not item.future.done():
                item.future.set_result([found[request] for request in item.requests])

    def _cached(self, request: SearchRequest, topk: int, depth: int = 0) -> list[Hit] | None:
        if not self._cache_size:
            return None
        entry = self._cache.get(key := _key(request, depth))
        # The first passages of a deeper search serve a shallower one (see `SearchBackend`).
        if entry is None or entry[0] < topk:
            return None
        self._cache.move_to_end(key)
        return entry[1][:topk]

    def _remember(self, request: SearchRequest, topk: int, hits: list[Hit], depth: int = 0) -> None:
        if not self._cache_size:
            return
        known_topk, known = self._cache.get(key := _key(request, depth), (0, []))
        # A deeper result that is cached serves this depth, too.
        if known_topk > topk:
            return
        self._cache[key] = (topk, hits)
        self._cache.move_to_end(key)
        self._cached_hits += len(hits) - len(known)
        while len(self._cache) > self._cache_size or self._cached_hits > _HITS_PER_RESULT * self._cache_size:
            _, (_, dropped) = self._cache.popitem(last=False)
            self._cached_hits -= len(dropped)


def _key(request: SearchRequest, depth: int) -> bytes:
    """A 16-byte cache key: with its history a request can be a million characters long."""
    return hashlib.blake2b(repr((request, depth)).encode(), digest_size=16).digest()


def _fail(item: _Waiting, error: SearchError) -> None:
    if not item.future.done():
        item.future.set_exception(error)
