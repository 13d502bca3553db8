"""FlashRAG's retrieval cache for agentic search: results of searches, kept in a file.

FlashRAG's cache key is the query. Here it also contains the question, the earlier queries and the reasoning, because a
retriever may read them, and the file records its index and retriever. The configuration keys are FlashRAG's:
`save_retrieval_cache`, `use_retrieval_cache`, `retrieval_cache_path` (default `{save_dir}/retrieval_cache.jsonl`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentic_r_plugin.errors import ConfigError, ManifestMismatchError, RecordError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.base import (
    Hit,
    SearchBackend,
    SearchRequest,
    depth_changes_order,
    open_documents,
    reads_reasoning,
)
from agentic_r_plugin.store import drop_torn_end, dump_line, parse_line

SCHEMA = "retrieval_cache/1"
FILE = "retrieval_cache.jsonl"


class CachedSearch:
    """A search backend with a persistent cache of results.

    Args:
        backend: searched for requests that are not in the cache.
        path: JSON Lines: a header with the backend's fingerprint, then one search per line. An incomplete last line is
            ignored.
        save: whether new results are added to the file.

    Raises:
        ManifestMismatchError: the file belongs to another index or retriever.
        RecordError: a line is broken.
    """

    def __init__(self, backend: SearchBackend, path: Path, *, save: bool = True) -> None:
        self.backend, self.path, self.save = backend, path, save
        self.looked_up = 0
        """Number of searches answered from the cache."""
        self.depth_changes_order = depth_changes_order(backend)
        self.reads_reasoning = reads_reasoning(backend)
        self._kept: dict[SearchRequest, dict[int, list[Hit]]] = {}
        if save:
            drop_torn_end(path)
        # A kill while the header was written leaves an empty file; its header is written again.
        if path.is_file() and path.stat().st_size:
            self._read()
        elif save:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(dump_line({"schema": SCHEMA, "search": backend.fingerprint()}))

    def _read(self) -> None:
        content = self.path.read_bytes()
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
            data = parse_line(line, self.path, number)
            try:
                if number == 1:
                    self._check(data)
                    continue
                request = SearchRequest(
                    query=data["query"],
                    question=data["question"],
                    history=tuple(data["history"]),
                    reasoning=data.get("reasoning", ""),
                )
                hits = [
                    Hit(passage=Passage.from_contents(row["id"], row["contents"]), score=row["score"])
                    for row in data["passages"]
                ]
                self._kept.setdefault(request, {})[data["topk"]] = hits
            except (KeyError, TypeError) as error:
                raise RecordError(
                    f"expected a cached search, found {line[:80]!r}", path=self.path, line=number
                ) from error

    def _check(self, head: Any) -> None:
        if head["schema"] != SCHEMA:
            raise RecordError(f"expected schema {SCHEMA!r}, found {head['schema']!r}", path=self.path, line=1)
        if head["search"] != self.backend.fingerprint():
            raise ManifestMismatchError(
                f"{self.path} holds the searches of another index or retriever; use another retrieval_cache_path"
            )

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """See `SearchBackend.search`. A request that is not cached, or not to this depth, is searched once."""
        if not self.reads_reasoning:
            requests = [replace(request, reasoning="") for request in requests]
        missing = [request for request in dict.fromkeys(requests) if self._known(request, topk) is None]
        self.looked_up += len(requests) - len(missing)
        if missing:
            found = self.backend.search(missing, topk)
            for request, hits in zip(missing, found, strict=True):
                self._kept.setdefault(request, {})[topk] = hits
            if self.save:
                with self.path.open("ab") as stream:
                    stream.writelines(dump_line(_line(request, topk, self._kept[request][topk])) for request in missing)
        return [self._known(request, topk) or [] for request in requests]

    def _known(self, request: SearchRequest, topk: int) -> list[Hit] | None:
        """Cached result of a search to this depth, or to a larger one if depth does not change the order; else None."""
        kept = self._kept.get(request, {})
        depth = topk if self.depth_changes_order else max(kept, default=0)
        return kept[depth][:topk] if depth >= topk and depth in kept else None

    def documents(self, ids: Sequence[str]) -> list[Passage | None]:
        """See `base.open_documents`."""
        return open_documents(self.backend, ids)

    def fingerprint(self) -> str:
        """The backend's fingerprint: the cache does not change any result."""
        return self.backend.fingerprint()

    def close(self) -> None:
        """Close the backend. The file needs no closing: it is complete after every search."""
        self.backend.close()


def _line(request: SearchRequest, topk: int, hits: Sequence[Hit]) -> dict[str, Any]:
    passages = [{"id": hit.passage.id, "contents": hit.passage.contents, "score": hit.score} for hit in hits]
    asked = {"question": request.question, "query": request.query, "history": request.history}
    asked |= {"reasoning": request.reasoning} if request.reasoning else {}
    return {**asked, "topk": topk, "passages": passages}


def with_cache(config: Any, backend: SearchBackend) -> SearchBackend:
    """Wrap `backend` in a cache if FlashRAG's configuration asks for one.

    Raises:
        ConfigError: the cache to use does not exist, or the cache to save exists and may not be used.
        ManifestMismatchError, RecordError: as `CachedSearch`.
    """
    use, save = bool(config["use_retrieval_cache"]), bool(config["save_retrieval_cache"])
    if not (use or save):
        return backend
    path = Path(config["retrieval_cache_path"] or Path(config["save_dir"]) / FILE)
    if use and not save and not path.is_file():
        raise ConfigError(f"use_retrieval_cache: there is no cache at {path} (retrieval_cache_path)")
    if save and not use and path.is_file():
        raise ConfigError(f"save_retrieval_cache: {path} is there already; set use_retrieval_cache to go on with it")
    return CachedSearch(backend, path, save=save)
