"""The interface of retrievers. Search backends are components of kind `search_backend`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from agentic_r_plugin.config import load_config, to_dict
from agentic_r_plugin.errors import ConfigError, SearchError, SearchRefusedError
from agentic_r_plugin.query import SearchRequest as SearchRequest
from agentic_r_plugin.records import Passage

if TYPE_CHECKING:
    from agentic_r_plugin.backends import SearchSpec


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A retrieved passage."""

    passage: Passage
    score: float


class SearchBackend(Protocol):
    """Finds passages. A search without results gives an empty list; a search that fails raises.

    A backend with the method `documents(ids)`, which gives a passage or None per id, serves agents that open documents.

    Callers assume that the best passages of a search are the first passages of a deeper search. This holds for exact
    indexes, IVF and BM25. HNSW and half-precision scores examine more passages for a larger `topk`, so the first
    passages of a deeper search can be better than those of a shallow one; the agent is then shown these. A backend for
    which it does not hold at all, because it reranks as many passages as were requested, sets the attribute
    `depth_changes_order` to True and is called once per depth.

    A backend whose results do not depend on the agent's reasoning sets the attribute `reads_reasoning` to False, so
    that caches take searches that differ only in it as one.
    """

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """Best `topk` passages per request, best first; fewer if the corpus is smaller or no more are found.

        Raises:
            SearchError: the search could not be carried out.
        """

    def fingerprint(self) -> str:
        """Changes whenever the corpus, the retriever or the index changes."""

    def close(self) -> None:
        """Free resources; safe to call twice."""


def depth_changes_order(search: SearchBackend) -> bool:
    """Whether the best passages of a search may differ from the first passages of a deeper search."""
    return bool(getattr(search, "depth_changes_order", False))


def reads_reasoning(search: SearchBackend) -> bool:
    """Whether the results of a search may depend on the agent's reasoning."""
    return bool(getattr(search, "reads_reasoning", True))


def rerank_depth(search: SearchBackend) -> int:
    """Passages of each search that a backend ranks again (`rerank.RerankedSearch`); 0: none."""
    return int(getattr(search, "rerank_depth", 0))


OF_ONE_REQUEST = frozenset({400, 413, 422})
"""HTTP statuses that refuse one request for its content; other 4xx statuses refuse the caller or all requests."""


def search_each(
    search: SearchBackend, requests: Sequence[SearchRequest], topk: int
) -> list[list[Hit] | SearchRefusedError]:
    """Like `SearchBackend.search`, but a request that a service refuses (such as a long query) fails on its own.

    Raises:
        SearchError: the search could not be carried out, or the service refuses the caller.
    """
    if not requests:
        return []
    try:
        return list(search.search(requests, topk))
    except SearchRefusedError as error:
        if error.status not in OF_ONE_REQUEST:
            raise
        if len(requests) == 1:
            return [error]
    # A refusal does not say which request caused it, so each is sent alone.
    return [found for request in requests for found in search_each(search, [request], topk)]


def open_documents(search: SearchBackend, ids: Sequence[str]) -> list[Passage | None]:
    """The documents with these ids, None for an unknown id, from a backend with the method `documents(ids)`.

    Raises:
        SearchError: the backend has no such method, or could not answer.
    """
    if not ids:
        return []
    documents = getattr(search, "documents", None)
    if documents is None:
        raise SearchError(f"{type(search).__name__} cannot open documents: it has no method documents(ids)")
    return list(documents(ids))


def typed_options(spec: SearchSpec, cls: type) -> dict[str, Any]:
    """The backend-specific options with their defaults, checked against `cls`, the dataclass that declares them.

    Raises:
        ConfigError: an unknown option, or one of the wrong type.
    """
    known = [item.name for item in fields(cls)]
    if unknown := sorted(set(spec.options) - set(known)):
        raise ConfigError(f"search backend {spec.backend!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
    return to_dict(load_config(cls, values=spec.options))


def bounded_topk(topk: int, rows: int) -> int:
    """`topk`, or the number of rows if it is smaller.

    Raises:
        SearchError: `topk` is below 1.
    """
    if topk < 1:
        raise SearchError(f"expected topk of at least 1, found {topk}")
    return min(topk, rows)
