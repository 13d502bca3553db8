"""Adapters between our search backends and FlashRAG's retrievers, in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentic_r_plugin.config import fingerprint
from agentic_r_plugin.errors import ConfigError, SearchError
from agentic_r_plugin.query import needs_reasoning, retriever_input
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.base import Hit, SearchBackend, SearchRequest
from agentic_r_plugin.storage.fingerprints import path_fingerprint

FlashRAGDoc = dict[str, str]
"""FlashRAG's passage: id, title, text, contents."""


def to_doc(passage: Passage) -> FlashRAGDoc:
    """Convert a passage to the form that FlashRAG's pipelines and metrics read."""
    return {"id": passage.id, "title": passage.title, "text": passage.text, "contents": passage.contents}


_DECIDING = ("retrieval_method", "retrieval_model_path", "index_path", "corpus_path", "instruction", "bm25_backend")
"""Keys of FlashRAG's configuration that can change the results of its retrievers."""


class AgenticRetriever:
    """Any search backend as FlashRAG's retriever: pass it to a pipeline as `retriever=`.

    FlashRAG's own pipelines pass only the query, so a retriever trained on `Question [SEP] query` does not get the
    question from them. `AgenticSearchPipeline` and the keyword `questions` pass both.

    Args:
        backend: search backend that finds the passages.
        topk: default number of passages per query (FlashRAG's `retrieval_topk`).
    """

    def __init__(self, backend: SearchBackend, *, topk: int = 3) -> None:
        self.backend = backend
        self.topk = topk

    def search(
        self, query: str, num: int | None = None, return_score: bool = False, *, question: str | None = None
    ) -> Any:
        """Passages of one query: `docs`, or `(docs, scores)` with `return_score`."""
        found = self.batch_search([query], num, return_score, questions=None if question is None else [question])
        return (found[0][0], found[1][0]) if return_score else found[0]

    def batch_search(
        self,
        query: Sequence[str],
        num: int | None = None,
        return_score: bool = False,
        *,
        questions: Sequence[str] | None = None,
    ) -> Any:
        """Passages of each query, best first: `[docs]`, or `([docs], [scores])` with `return_score`.

        A result has no more passages than the corpus and no duplicates (FlashRAG fills up with the last passage).

        Raises:
            SearchError: the search failed.
        """
        queries = [query] if isinstance(query, str) else list(query)
        if questions is not None and len(questions) != len(queries):
            raise ConfigError(f"expected one question per query, found {len(questions)} for {len(queries)}")
        requests = [
            SearchRequest(query=text, question=questions[i] if questions is not None else None)
            for i, text in enumerate(queries)
        ]
        hits = self.backend.search(requests, self.topk if num is None else num) if requests else []
        docs = [[to_doc(hit.passage) for hit in row] for row in hits]
        scores = [[hit.score for hit in row] for row in hits]
        return (docs, scores) if return_score else docs


class FlashRAGBackend:
    """A FlashRAG retriever as a search backend, so that agents can search FlashRAG's indexes.

    Args:
        retriever: an object with FlashRAG's `batch_search(queries, num, return_score)`.
        formulation: registered query formulation that builds the retriever's input.
    """

    def __init__(self, retriever: Any, *, formulation: str = "query") -> None:
        self.retriever = retriever
        self.formulation = formulation
        self.depth_changes_order = bool(getattr(retriever, "use_reranker", False))
        self.reads_reasoning = needs_reasoning(formulation)
        # Scores of a reranker may be 0 or less, so they do not show which passages only fill up a result.
        self._is_bm25 = "bm25" in type(retriever).__name__.lower() and not self.depth_changes_order

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """Best `topk` passages of each request.

        Repeated passages are kept once. Passages with which FlashRAG's BM25 fills up a result (score 0, no word in
        common) are dropped. FlashRAG's encoders cut the end of an input that is longer than `query_max_length`, also if
        that is the query after a long reasoning.

        Raises:
            SearchError: the number of results differs from the number of queries.
        """
        inputs = [retriever_input(request, self.formulation) for request in requests]
        docs, scores = self.retriever.batch_search(inputs, num=topk, return_score=True)
        if len(docs) != len(inputs) or len(scores) != len(inputs):
            raise SearchError(f"expected {len(inputs)} results from {type(self.retriever).__name__}, found {len(docs)}")
        return [self._hits(*row) for row in zip(docs, scores, strict=True)]

    def _hits(self, docs: Sequence[FlashRAGDoc], scores: Sequence[float]) -> list[Hit]:
        hits: dict[str, Hit] = {}
        for doc, score in zip(docs, scores, strict=True):
            if self._is_bm25 and score <= 0:
                continue
            passage = Passage.from_contents(str(doc["id"]), doc["contents"])
            hits.setdefault(passage.id, Hit(passage=passage, score=float(score)))
        return list(hits.values())

    def fingerprint(self) -> str:
        """Fingerprint of the retriever's class and formulation, and of the files named in its configuration."""
        retriever, kind = self.retriever, type(self.retriever).__name__
        settings = getattr(retriever, "config", None) or {}
        named = {name: str(settings[name]) for name in _DECIDING if name in settings and settings[name] is not None}
        files = {name: [where, path_fingerprint(where)] for name, where in named.items()}
        return fingerprint(kind, self.formulation, files)

    def close(self) -> None:
        """Nothing to free."""
