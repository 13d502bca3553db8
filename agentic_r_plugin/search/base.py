"""What the agent, the stages and the service ask of a retriever. Backends are components of kind `search_backend`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from agentic_r_plugin.config import load_config, to_dict
from agentic_r_plugin.errors import ConfigError, SearchError, SearchRefusedError
from agentic_r_plugin.records import Passage

if TYPE_CHECKING:
    from agentic_r_plugin.backends import SearchSpec


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """One search of the agent. The backend builds the retriever input with its own checkpoint's formulation."""

    query: str
    question: str | None = None
    """The user's question; None for a plain search, which every formulation treats as the query alone."""
    history: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A passage found."""

    passage: Passage
    score: float


class SearchBackend(Protocol):
    """Finds passages. A search that finds nothing is an empty list; one that fails raises.

    The best passages of a search are taken to be the first ones of a deeper search, which holds for exact indexes, IVF
    and BM25. HNSW and half-precision scores look at more passages for a larger `topk`, so the first ones of a deeper
    search can be better than those of a search for a few; they are then what the agent is shown. A backend of which it
    does not hold at all, since it reranks as many passages as it is asked for, has a true attribute
    `depth_changes_order` and is asked once for each depth.
    """

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """Best `topk` passages of each request, best first; fewer where the corpus is smaller or no more are found.

        Raises:
            SearchError: the search could not be carried out.
        """

    def fingerprint(self) -> str:
        """Changes when the corpus, the retriever or the index change."""

    def close(self) -> None:
        """Free what it holds; safe to call twice."""


def depth_changes_order(search: SearchBackend) -> bool:
    """Whether the best passages of a search may be other than the first ones of a deeper search."""
    return bool(getattr(search, "depth_changes_order", False))


OF_ONE_REQUEST = frozenset({400, 413, 422})
"""Statuses by which a service refuses what it was sent; others refuse the caller, or all requests."""


def search_each(
    search: SearchBackend, requests: Sequence[SearchRequest], topk: int
) -> list[list[Hit] | SearchRefusedError]:
    """As `SearchBackend.search`, but a request that a service refuses (a query that is too long) fails alone.

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
    return [found for request in requests for found in search_each(search, [request], topk)]


def known_options(spec: SearchSpec, *known: str) -> dict[str, Any]:
    """A backend's own options.

    Raises:
        ConfigError: one that it does not have.
    """
    if unknown := sorted(set(spec.options) - set(known)):
        raise ConfigError(f"search backend {spec.backend!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
    return dict(spec.options)


def typed_options(spec: SearchSpec, cls: type) -> dict[str, Any]:
    """A backend's own options, checked against `cls`, the dataclass that declares them, and with its defaults.

    Raises:
        ConfigError: one that it does not have, or of a wrong type.
    """
    return to_dict(load_config(cls, values=known_options(spec, *(item.name for item in fields(cls)))))


def bounded_topk(topk: int, rows: int) -> int:
    """`topk`, or all rows where there are fewer.

    Raises:
        SearchError: below 1.
    """
    if topk < 1:
        raise SearchError(f"expected topk of at least 1, found {topk}")
    return min(topk, rows)
