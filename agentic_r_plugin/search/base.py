"""What the agent, the stages and the service ask of a retriever. Backends are components of kind `search_backend`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agentic_r_plugin.records import Passage


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
    """Finds passages. A search that finds nothing is an empty list; one that fails raises."""

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """Best `topk` passages of each request, best first; fewer only when the corpus is smaller.

        Raises:
            SearchError: the search could not be carried out.
        """

    def fingerprint(self) -> str:
        """Changes when the corpus, the retriever or the index change."""

    def close(self) -> None:
        """Free what it holds; safe to call twice."""
