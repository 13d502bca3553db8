"""The search backends that come with this package (component kind `search_backend`)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentic_r_plugin.config import fingerprint
from agentic_r_plugin.errors import ConfigError, SearchError
from agentic_r_plugin.search.base import Hit, SearchRequest
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.search.corpus import Corpus

if TYPE_CHECKING:
    from agentic_r_plugin.backends import SearchSpec
    from agentic_r_plugin.search.encoder import Retriever


class FaissBackend:
    """Dense retrieval in this process: an index of `agentic-r index` with its corpus and its retriever.

    Args:
        index: the index folder.
        retriever: a loaded retriever or where it lies; None means the one the index names.
        corpus: the corpus file; None means the one the index names.
        device: for the retriever.
        precision: for the retriever.
        batch_size: queries encoded at once.
        mapped: map the vectors from disk instead of reading them into memory.

    Raises:
        ConfigError: no finished index there.
        IndexMismatchError: the index does not belong to the corpus or the retriever.
    """

    def __init__(
        self,
        index: str | Path,
        retriever: Retriever | str | None = None,
        corpus: str | Path | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        batch_size: int = 64,
        mapped: bool = False,
    ) -> None:
        from agentic_r_plugin.search import index as indexes

        self.manifest = indexes.read_manifest(index)
        self._faiss = indexes.open_flat_index(Path(index) / self.manifest.index_file, mapped=mapped)
        self.corpus = Corpus(corpus or self.manifest.corpus)
        indexes.check_corpus(self.manifest, self.corpus)
        if retriever is None or isinstance(retriever, str):
            retriever = indexes.index_retriever(self.manifest, retriever, device=device, precision=precision)
        else:
            indexes.check_retriever(self.manifest, retriever)
        self.retriever, self.batch_size, self._lock = retriever, batch_size, threading.Lock()

    @classmethod
    def from_spec(cls, spec: SearchSpec) -> FaissBackend:
        """From the settings shared by all commands; options: `precision`, `mapped`."""
        if not spec.index:
            raise ConfigError("search backend 'faiss' needs 'index', a folder built by agentic-r index")
        return cls(
            spec.index,
            spec.retriever or None,
            spec.corpus or None,
            device=spec.device,
            batch_size=spec.batch_size,
            **_options(spec, "precision", "mapped"),
        )

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """See `SearchBackend.search`; scores are inner products."""
        topk = _bounded(topk, len(self.corpus))
        if not requests:
            return []
        with self._lock:
            vectors = self.retriever.encode_queries(requests, batch_size=self.batch_size)
            scores, rows = self._faiss.search(vectors, topk)
        return [
            [
                Hit(passage=self.corpus[int(row)], score=float(score))
                for row, score in zip(*pair, strict=True)
                if row >= 0
            ]
            for pair in zip(rows, scores, strict=True)
        ]

    def fingerprint(self) -> str:
        """See `SearchBackend.fingerprint`."""
        return self.manifest.fingerprint()

    def close(self) -> None:
        """Unmap the corpus."""
        self.corpus.close()


class BM25Backend:
    """Sparse retrieval in this process (bm25s), stemmed and without stop words on both sides.

    The query alone is searched for: a formulation is part of a trained retriever, and BM25 has none.

    Args:
        corpus: the corpus file.
        k1, b: BM25's parameters; the defaults are Anserini's.
    """

    def __init__(self, corpus: str | Path, *, k1: float = 0.9, b: float = 0.4) -> None:
        import bm25s
        import Stemmer

        self._stem, self._tokenize = Stemmer.Stemmer("english"), bm25s.tokenize
        self.corpus, self._k1, self._b = Corpus(corpus), k1, b
        self._bm25 = bm25s.BM25(k1=k1, b=b)
        self._bm25.index(self._tokens([passage.contents for passage in self.corpus]), show_progress=False)

    @classmethod
    def from_spec(cls, spec: SearchSpec) -> BM25Backend:
        """From the settings shared by all commands; options: `k1`, `b`."""
        if not spec.corpus:
            raise ConfigError("search backend 'bm25' needs 'corpus', a corpus file")
        return cls(spec.corpus, **_options(spec, "k1", "b"))

    def _tokens(self, texts: list[str]) -> Any:
        return self._tokenize(texts, stopwords="en", stemmer=self._stem, return_ids=False, show_progress=False)

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """See `SearchBackend.search`; passages that share no term with the query have score 0."""
        topk = _bounded(topk, len(self.corpus))
        if not requests:
            return []
        tokens = [found or [""] for found in self._tokens([request.query for request in requests])]
        rows, scores = self._bm25.retrieve(tokens, k=topk, show_progress=False, n_threads=0)
        return _hits(self.corpus, rows, scores)

    def fingerprint(self) -> str:
        """See `SearchBackend.fingerprint`."""
        return fingerprint("bm25", self.corpus.fingerprint(), self._k1, self._b)

    def close(self) -> None:
        """Unmap the corpus."""
        self.corpus.close()


class ServiceBackend:
    """Retrieval over HTTP (`agentic-r serve`, or any server of the same wire format).

    Args:
        client: how to reach it.
    """

    def __init__(self, client: RetrievalClient) -> None:
        self.client = client

    @classmethod
    def from_spec(cls, spec: SearchSpec) -> ServiceBackend:
        """From the settings shared by all commands; options: `token_env`, `max_connections`."""
        if not spec.url:
            raise ConfigError("search backend 'service' needs 'url', such as http://127.0.0.1:8000")
        options = _options(spec, "token_env", "max_connections")
        token = token_from_env(str(options.pop("token_env", "")))
        return cls(
            RetrievalClient(spec.url, timeout_s=spec.timeout_s, retries=spec.max_retries, token=token, **options)
        )

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """See `SearchBackend.search`."""
        return self.client.search(requests, topk)

    def fingerprint(self) -> str:
        """The service's own, when it says one; else its address."""
        return str(self.client.health().get("fingerprint", self.client.url))

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


def token_from_env(name: str) -> str | None:
    """The access token in environment variable `name`; None for an empty name.

    Raises:
        ConfigError: the variable is not set.
    """
    import os

    if not name:
        return None
    if not (token := os.environ.get(name)):
        raise ConfigError(f"environment variable {name} is not set; it must hold the retrieval service's token")
    return token


def _options(spec: SearchSpec, *known: str) -> dict[str, Any]:
    if unknown := sorted(set(spec.options) - set(known)):
        raise ConfigError(f"search backend {spec.backend!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
    return dict(spec.options)


def _hits(corpus: Corpus, rows: Any, scores: Any) -> list[list[Hit]]:
    """Of (N, topk) rows and scores; faiss fills with row -1 what it did not find."""
    return [
        [Hit(passage=corpus[row], score=score) for row, score in zip(*pair, strict=True) if row >= 0]
        for pair in zip(rows.tolist(), scores.tolist(), strict=True)
    ]


def _bounded(topk: int, rows: int) -> int:
    if topk < 1:
        raise SearchError(f"expected topk of at least 1, found {topk}")
    return min(topk, rows)
