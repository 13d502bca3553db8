"""The search backends that come with this package (component kind `search_backend`).

| name | searches | vectors lie | approximate kinds |
|---|---|---|---|
| `faiss` | on the CPU | in memory, or mapped from disk | all |
| `faiss_gpu` | on all GPUs of a node, with faiss-gpu | sharded over the GPUs, as float16 | Flat, SQ, IVF |
| `torch` | in torch, exactly, on any device | sharded over the GPUs, or read from disk in blocks | (exact) |
| `bm25` | words, on the CPU | in memory, or mapped from disk | (exact) |
| `service` | over HTTP | elsewhere | |

The dense ones live in `dense`; this module imports neither faiss nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentic_r_plugin.config import FREE, fingerprint
from agentic_r_plugin.errors import ConfigError, IndexMismatchError
from agentic_r_plugin.search.base import Hit, SearchRequest, bounded_topk, typed_options
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.store import read_json, write_json

if TYPE_CHECKING:
    from agentic_r_plugin.backends import SearchSpec


_BM25_KEY = "bm25.json"
"""Written last: its presence means that the folder is whole."""


class BM25Backend:
    """Sparse retrieval in this process (bm25s), stemmed and without stop words on both sides.

    The query alone is searched for: a formulation is part of a trained retriever, and BM25 has none.

    Args:
        corpus: the corpus file.
        k1, b: BM25's parameters; the defaults are Anserini's.
        folder: where the index is kept, and mapped from, once it has been built; empty: it is built every time, and
            held in memory. (Building holds the corpus' words in memory either way.)

    Raises:
        IndexMismatchError: the folder holds an index of another corpus or of other parameters.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What `SearchSpec.options` may hold."""

        k1: float = 0.9
        b: float = 0.4
        folder: str = field(default="", metadata=FREE)

    def __init__(self, corpus: str | Path, *, k1: float = 0.9, b: float = 0.4, folder: str = "") -> None:
        import bm25s
        import Stemmer

        self._stem, self._tokenize = Stemmer.Stemmer("english"), bm25s.tokenize
        self.corpus, self._k1, self._b = Corpus(corpus, table=folder), k1, b
        kept = Path(folder) / _BM25_KEY if folder else None
        if kept is not None and kept.is_file():
            if (found := read_json(kept)) != self.fingerprint():
                raise IndexMismatchError(
                    f"{folder}: BM25 index {found} does not belong to corpus {corpus} with k1 {k1:g} and b {b:g} "
                    f"({self.fingerprint()}); remove it or choose another folder"
                )
            self._bm25 = bm25s.BM25.load(folder, mmap=True)
            return
        self._bm25 = bm25s.BM25(k1=k1, b=b)
        self._bm25.index(self._tokens([passage.contents for passage in self.corpus]), show_progress=False)
        if kept is not None:
            self._bm25.save(folder)
            self.corpus.save_table(folder)
            write_json(kept, self.fingerprint())

    @classmethod
    def from_spec(cls, spec: SearchSpec) -> BM25Backend:
        """From the settings shared by all commands; options: `k1`, `b`, `folder`."""
        if not spec.corpus:
            raise ConfigError("search backend 'bm25' needs 'corpus', a corpus file")
        return cls(spec.corpus, **typed_options(spec, cls.Options))

    def _tokens(self, texts: list[str]) -> Any:
        return self._tokenize(texts, stopwords="en", stemmer=self._stem, return_ids=False, show_progress=False)

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """See `SearchBackend.search`; passages that share no term with the query have score 0."""
        topk = bounded_topk(topk, len(self.corpus))
        if not requests:
            return []
        tokens = [found or [""] for found in self._tokens([request.query for request in requests])]
        rows, scores = self._bm25.retrieve(tokens, k=topk, show_progress=False, n_threads=0)
        return [
            [Hit(passage=self.corpus[row], score=score) for row, score in zip(*pair, strict=True)]
            for pair in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

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

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What `SearchSpec.options` may hold."""

        token_env: str = field(default="", metadata=FREE)
        max_connections: int = field(default=32, metadata=FREE)

    def __init__(self, client: RetrievalClient) -> None:
        self.client = client

    @classmethod
    def from_spec(cls, spec: SearchSpec) -> ServiceBackend:
        """From the settings shared by all commands; options: `token_env`, `max_connections`."""
        if not spec.url:
            raise ConfigError("search backend 'service' needs 'url', such as http://127.0.0.1:8000")
        options = typed_options(spec, cls.Options)
        token = token_from_env(options.pop("token_env"))
        return cls(
            RetrievalClient(spec.url, timeout_s=spec.timeout_s, retries=spec.max_retries, token=token, **options)
        )

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """See `SearchBackend.search`."""
        return self.client.search(requests, topk)

    def fingerprint(self) -> str:
        """The service's own, when it says one; else its address."""
        return self.client.fingerprint()

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
