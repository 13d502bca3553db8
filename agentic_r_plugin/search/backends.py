"""The search backends of this package (component kind `search_backend`).

| name | searches | vectors are | approximate kinds |
|---|---|---|---|
| `faiss` | on the CPU | in memory, or mapped from disk | all |
| `faiss_gpu` | on all GPUs of a node, with faiss-gpu | sharded over the GPUs, as float16 | Flat, IVF (with SQ too) |
| `torch` | in torch, exactly, on any device | sharded over the GPUs, or read from disk in blocks | (exact) |
| `bm25` | words, on the CPU | in memory, or mapped from disk | (exact) |
| `milvus` | in a Milvus collection | on the servers, or embedded | all of Milvus |
| `service` | over HTTP | on the server | |
| `hybrid` | several of these, fused by reciprocal rank (`hybrid`) | as theirs | as theirs |

The dense backends are in `dense`; this module imports neither faiss nor torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentic_r_plugin.answers import UNSPACED
from agentic_r_plugin.config import FREE, fingerprint
from agentic_r_plugin.credentials import read_secret
from agentic_r_plugin.errors import ConfigError, IndexMismatchError, RecordError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.base import Hit, SearchRequest, bounded_topk, typed_options
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.store import read_json, write_json

if TYPE_CHECKING:
    from agentic_r_plugin.backends import SearchSpec


_BM25_KEY = "bm25.json"
"""Written last: its presence means that the index folder is complete."""

_PAIRED = f"{UNSPACED}\u0900-\u0963\u0966-\u0dff"
"""Scripts without spaces, and Indic ones: their words have spaces, but `\\w` does not match their vowel signs."""

_RUN = re.compile(f"[{_PAIRED}]+")
_TOKEN = rf"(?u)[{_PAIRED}]+|\b\w\w+\b"


def cut_runs(text: str, *, singles: bool = False) -> str:
    """Split text of scripts without spaces into overlapping pairs of characters; other text is unchanged.

    Args:
        singles: also add every single character, so that a one-character query matches (for passages).

    >>> cut_runs("Li Bai (李白出生) 唐"), cut_runs("李白", singles=True)
    ('Li Bai ( 李白 白出 出生 )  唐 ', ' 李白 李 白 ')
    """

    if text.isascii():
        return text

    def cut(found: re.Match[str]) -> str:
        run = found.group()
        pairs = [run[at : at + 2] for at in range(len(run) - 1)]
        return f" {' '.join([*pairs, *run] if singles or not pairs else pairs)} "

    return _RUN.sub(cut, text)


class BM25Backend:
    """Sparse retrieval in this process (bm25s), stemmed and without stop words on both sides.

    Only the query is searched for: a formulation belongs to a trained retriever, and BM25 has none. Words are runs of
    at least two letters or digits; in scripts without spaces, pairs of characters (`cut_runs`).

    Args:
        k1, b: BM25's parameters; the defaults are Anserini's.
        folder: where the index is stored, and mapped from once it exists; empty builds it every time and holds it in
            memory. (Building holds the words of the corpus in memory either way.)

    Raises:
        IndexMismatchError: the folder holds an index of another corpus, other parameters or an earlier version.
        RecordError: a broken corpus, or one without words.
    """

    reads_reasoning = False

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options accepted in `SearchSpec.options`."""

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
                    f"({self.fingerprint()}), or an earlier version built it with other rules for words; remove it or "
                    "choose another folder"
                )
            self._bm25 = bm25s.BM25.load(folder, mmap=True)
            return
        self._bm25 = bm25s.BM25(k1=k1, b=b)
        words = self._tokens([cut_runs(passage.contents, singles=True) for passage in self.corpus])
        if not any(words):
            raise RecordError("no passage holds a word that BM25 could find", path=self.corpus.path)
        self._bm25.index(words, show_progress=False)
        if kept is not None:
            self._bm25.save(folder)
            self.corpus.save_table(folder)
            write_json(kept, self.fingerprint())

    @classmethod
    def from_spec(cls, spec: SearchSpec) -> BM25Backend:
        """Build from the settings shared by all commands; options: `k1`, `b`, `folder`."""
        if not spec.corpus:
            raise ConfigError("search backend 'bm25' needs 'corpus', a corpus file")
        return cls(spec.corpus, **typed_options(spec, cls.Options))

    def _tokens(self, texts: list[str]) -> Any:
        return self._tokenize(
            texts, token_pattern=_TOKEN, stopwords="en", stemmer=self._stem, return_ids=False, show_progress=False
        )

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """See `SearchBackend.search`; passages that share no word with the query are not found."""
        topk = bounded_topk(topk, len(self.corpus))
        if not requests:
            return []
        words = self._tokens([cut_runs(request.query) for request in requests])
        tokens = [found or [""] for found in words]  # bm25s rejects an empty query
        rows, scores = self._bm25.retrieve(tokens, k=topk, show_progress=False, n_threads=0)
        return [
            # bm25s pads with passages of score 0, which share no word with the query
            [Hit(passage=self.corpus[row], score=score) for row, score in zip(*pair, strict=True) if score > 0]
            for pair in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def documents(self, ids: Sequence[str]) -> list[Passage | None]:
        """See `base.open_documents`."""
        return self.corpus.documents(ids)

    def fingerprint(self) -> str:
        """See `SearchBackend.fingerprint`."""
        return fingerprint("bm25/2", self.corpus.fingerprint(), self._k1, self._b, _TOKEN)

    def close(self) -> None:
        """Unmap the corpus."""
        self.corpus.close()


class ServiceBackend(RetrievalClient):
    """Retrieval over HTTP (`agentic-r serve`, or any server of the same wire format)."""

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options accepted in `SearchSpec.options`."""

        token_env: str = field(default="", metadata=FREE)
        max_connections: int = field(default=32, metadata=FREE)
        max_batch: int = field(default=256, metadata=FREE)

    @classmethod
    def from_spec(cls, spec: SearchSpec) -> ServiceBackend:
        """Build from the settings shared by all commands; options: `token_env`, `max_connections`, `max_batch`."""
        if not spec.url:
            raise ConfigError("search backend 'service' needs 'url', such as http://127.0.0.1:8000")
        options = typed_options(spec, cls.Options)
        token = read_secret(options.pop("token_env"), "search.options.token_env")
        return cls(spec.url, timeout_s=spec.timeout_s, retries=spec.max_retries, token=token, **options)
