"""Reranking: the best passages of any search backend are scored again by a slower and better model.

Components of kind `reranker` give the scores; `RerankedSearch` is the only place that applies them. `backends` puts it
around the search backend wherever a search has a section `rerank`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from agentic_r_plugin.config import fingerprint
from agentic_r_plugin.errors import SearchError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.base import (
    Hit,
    SearchBackend,
    SearchRequest,
    bounded_topk,
    depth_changes_order,
    open_documents,
    reads_reasoning,
)

if TYPE_CHECKING:
    from agentic_r_plugin.backends import SearchSpec


class Reranker(Protocol):
    """Scores passages that a search found.

    The attribute `reads_reasoning`, if it is False, says that no score depends on the agent's reasoning.
    """

    @classmethod
    def from_spec(cls, spec: SearchSpec) -> Reranker:
        """Build from `spec.rerank` and `spec.device`.

        Raises:
            ConfigError: wrong settings, or the model cannot be loaded.
        """

    def score(self, requests: Sequence[SearchRequest], passages: Sequence[Sequence[Passage]]) -> list[list[float]]:
        """One finite score per passage of each request, higher is better; equal inputs give equal scores."""

    def fingerprint(self) -> str:
        """Changes whenever scores may change."""

    def close(self) -> None:
        """Free resources; safe to call twice."""


class RerankedSearch:
    """A search backend whose best passages are ranked again.

    Ties keep the retrieval order. Passages that a search finds below its `depth` best follow in retrieval order, with
    scores that continue below the lowest one in the retriever's distances. So the best passages of a search are the
    first of a deeper one, as `SearchBackend` requires.

    Args:
        backend: finds the passages; closed with this.
        reranker: scores them; closed with this.
        depth: passages per request that are scored.
    """

    def __init__(self, backend: SearchBackend, reranker: Reranker, depth: int) -> None:
        self.backend, self.reranker, self.rerank_depth = backend, reranker, depth
        self.reads_reasoning = reads_reasoning(backend) or bool(getattr(reranker, "reads_reasoning", True))
        self.depth_changes_order = depth_changes_order(backend)
        self.corpus: Any = getattr(backend, "corpus", None)

    def search(self, requests: Sequence[SearchRequest], topk: int, depth: int = 0) -> list[list[Hit]]:
        """See `SearchBackend.search`.

        Args:
            depth: passages that are scored in this search; 0: as built.

        Raises:
            SearchError: the search failed, or the reranker did not give one finite score per passage.
        """
        topk, depth = bounded_topk(topk, topk), depth or self.rerank_depth
        # The same `depth` passages are scored for every topk, so a shallow search is the beginning of a deep one.
        found = self.backend.search(requests, max(topk, depth))
        best = [hits[:depth] for hits in found]
        scores = self.reranker.score(requests, [[hit.passage for hit in hits] for hits in best])
        if [len(row) for row in scores] != [len(hits) for hits in best]:
            raise SearchError(f"the reranker gave {sum(map(len, scores))} scores for {sum(map(len, best))} passages")
        if not all(math.isfinite(score) for row in scores for score in row):
            raise SearchError(
                "the reranker gave a score that is not a finite number; it may overflow in half precision (set "
                "rerank.options.precision=float32)"
            )
        return [_ranked(hits, row)[:topk] for hits, row in zip(found, scores, strict=True)]

    def documents(self, ids: Sequence[str]) -> list[Passage | None]:
        """See `base.open_documents`."""
        return open_documents(self.backend, ids)

    def fingerprint(self) -> str:
        """See `SearchBackend.fingerprint`."""
        return fingerprint("rerank/1", self.backend.fingerprint(), self.reranker.fingerprint(), self.rerank_depth)

    def close(self) -> None:
        """Close the backend and the reranker."""
        self.backend.close()
        self.reranker.close()


def order_of(scores: Sequence[float]) -> list[int]:
    """Places in descending order of their scores; among equals, in the order given.

    >>> order_of([1.0, 3.0, 1.0])
    [1, 0, 2]
    """
    return sorted(range(len(scores)), key=lambda place: -scores[place])


def _ranked(hits: Sequence[Hit], scores: Sequence[float]) -> list[Hit]:
    """The first hits in the order of their scores, then the others."""
    best = [replace(hits[place], score=scores[place]) for place in order_of(scores)]
    others = hits[len(scores) :]
    return best + [replace(hit, score=best[-1].score + hit.score - hits[len(scores) - 1].score) for hit in others]
