"""Dense search backends: an index of `agentic-r index` with its corpus and retriever.

Shapes: Q queries, N rows, D dimensions, K = topk.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from agentic_r_plugin.backends import SearchSpec
from agentic_r_plugin.config import FREE
from agentic_r_plugin.errors import ConfigError, SearchError
from agentic_r_plugin.query import needs_reasoning
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.base import Hit, SearchRequest, bounded_topk, typed_options
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.search.indexing import index as indexes
from agentic_r_plugin.search.indexing.faiss_files import open_index, reason_of, set_search_depth, stored_vectors
from agentic_r_plugin.search.indexing.shards import resolve_devices


class DenseBackend(ABC):
    """Encodes the requests, finds the nearest rows, and reads their passages.

    Args:
        retriever: a loaded retriever or its location; None uses the one named by the index.
        corpus: the corpus file; None uses the one named by the index.
        device: for the retriever.
        batch_size: queries per encoding call.
        options: fields of the class's `Options`.

    Raises:
        ConfigError: the folder holds no finished index.
        IndexMismatchError: the index does not belong to the corpus or the retriever, or its file was truncated.
    """

    name: str

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options accepted in `SearchSpec.options`, for every dense backend."""

        precision: str = "auto"
        """For the retriever."""

    def __init__(
        self,
        index: str | Path,
        retriever: Retriever | str | None = None,
        corpus: str | Path | None = None,
        *,
        device: str = "auto",
        batch_size: int = 64,
        **options: Any,
    ) -> None:
        self.options: Any = self.Options(**options)
        self.folder, self.manifest = Path(index), indexes.read_manifest(index)
        self.index_path = self.folder / self.manifest.index_file
        self._check()
        self.corpus = Corpus(corpus or self.manifest.corpus, table=index)
        try:
            indexes.check_corpus(self.manifest, self.corpus)
            if retriever is None or isinstance(retriever, str):
                precision = self.options.precision
                retriever = indexes.index_retriever(self.manifest, retriever, device=device, precision=precision)
            else:
                indexes.check_retriever(self.manifest, retriever)
            self._open()
        except BaseException:
            self.corpus.close()
            raise
        self.retriever, self.batch_size, self._lock = retriever, batch_size, threading.Lock()
        self.reads_reasoning = needs_reasoning(retriever.record.formulation)

    @classmethod
    def from_spec(cls, spec: SearchSpec) -> DenseBackend:
        """Build from the settings shared by all commands; for the options see the class."""
        if not spec.index:
            raise ConfigError(f"search backend {cls.name!r} needs 'index', a folder built by agentic-r index")
        return cls(
            spec.index,
            spec.retriever or None,
            spec.corpus or None,
            device=spec.device,
            batch_size=spec.batch_size,
            **typed_options(spec, cls.Options),
        )

    def _check(self) -> None:
        """Check options and vectors before anything large is opened."""
        indexes.check_index_file(self.manifest, self.index_path)

    @abstractmethod
    def _open(self) -> None:
        """Open the vectors."""

    @abstractmethod
    def nearest(self, vectors_QD: NDArray[np.float32], topk: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """(scores, rows), both (Q, K), best first; row -1 if an approximate index found fewer."""

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """See `SearchBackend.search`; scores are inner products.

        Raises:
            SearchError: a vector or a score is not finite.
        """
        topk = bounded_topk(topk, len(self.corpus))
        if not requests:
            return []
        with self._lock:
            # A retriever may only be used from one thread at a time.
            vectors = self.retriever.encode_queries(requests, batch_size=self.batch_size)
            scores, rows = self.nearest(vectors, topk)
        # faiss finds nothing for a vector of NaN, which would look like an empty result
        if not (np.isfinite(vectors).all() and np.isfinite(scores[rows >= 0]).all()):
            raise SearchError(
                f"{self.index_path}: a query's vector or a score is not a finite number; the retriever may overflow in "
                f"half precision (set search.options.precision=float32), or the index was built from such vectors"
            )
        return [
            [Hit(passage=self.corpus[row], score=score) for row, score in zip(*pair, strict=True) if row >= 0]
            for pair in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def documents(self, ids: Sequence[str]) -> list[Passage | None]:
        """See `base.open_documents`."""
        return self.corpus.documents(ids)

    def fingerprint(self) -> str:
        """See `SearchBackend.fingerprint`."""
        return self.manifest.fingerprint()

    def close(self) -> None:
        """Close the corpus."""
        self.corpus.close()


class _SearchedByFaiss(DenseBackend):
    """An index that faiss searches, in memory, on disk or on GPUs."""

    _faiss: faiss.Index

    def nearest(self, vectors_QD: NDArray[np.float32], topk: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See `DenseBackend.nearest`."""
        scores, rows = self._faiss.search(vectors_QD, topk)
        # of vectors of length 1, the squared distance is 2 - 2 q·p
        return (np.float32(1) - scores / np.float32(2) if self.manifest.metric == "l2" else scores), rows


class FaissBackend(_SearchedByFaiss):
    """Dense retrieval with faiss on the CPU, in this process."""

    name = "faiss"

    @dataclass(frozen=True, kw_only=True)
    class Options(DenseBackend.Options):
        """Options accepted in `SearchSpec.options`."""

        mapped: bool = field(default=False, metadata=FREE)
        """Map the index from disk instead of reading it into memory; processes then share its pages."""
        nprobe: int = 64
        """Lists that an IVF index scans."""
        ef_search: int = 128
        """Candidates that an HNSW search keeps."""

    def _open(self) -> None:
        self._faiss = open_index(self.index_path, mapped=self.options.mapped)
        set_search_depth(self._faiss, nprobe=self.options.nprobe, ef_search=self.options.ef_search)


class FaissGPUBackend(_SearchedByFaiss):
    """Dense retrieval with faiss on all GPUs of this node; the index is sharded over them. Not yet run on a GPU.

    Raises:
        ConfigError: this faiss has no GPU support, finds no GPU, or cannot put this kind of index on a GPU.
    """

    name = "faiss_gpu"

    @dataclass(frozen=True, kw_only=True)
    class Options(DenseBackend.Options):
        """Options accepted in `SearchSpec.options`."""

        float16: bool = True
        """Store vectors and compute in half precision."""
        nprobe: int = 64
        """Lists that an IVF index scans."""

    def _check(self) -> None:
        if not hasattr(faiss, "GpuMultipleClonerOptions"):
            raise ConfigError(
                "search backend 'faiss_gpu' needs faiss-gpu in place of faiss-cpu (pip install agentic-r-plugin[gpu]); "
                "the backend 'torch' searches exactly on a GPU without it"
            )
        if faiss.get_num_gpus() < 1:
            raise ConfigError("search backend 'faiss_gpu': faiss finds no GPU")
        super()._check()

    def _open(self) -> None:
        # Mapped, because the GPUs hold the vectors: the host needs no copy in memory.
        host = open_index(self.index_path, mapped=True)
        set_search_depth(host, nprobe=self.options.nprobe, ef_search=0)
        options = faiss.GpuMultipleClonerOptions()
        options.shard, options.useFloat16 = True, self.options.float16
        options.useFloat16CoarseQuantizer = False
        try:
            self._faiss = faiss.index_cpu_to_all_gpus(host, options)
        except RuntimeError as error:
            kind = self.manifest.kind
            raise ConfigError(f"index kind {kind!r} cannot be put on GPUs: {reason_of(error)}") from error


class TorchBackend(DenseBackend):
    """Exact dense retrieval in torch: on GPUs without faiss-gpu, or on the CPU from disk, block by block.

    Reads indexes of kind `Flat` and `SQfp16`. On GPUs the vectors are sharded over `search_devices`. If they are stored
    in half precision, the best 2 K + 32 rows are scored again in float32. On the CPU the blocks are read from the file,
    which is mapped, for every batch of queries, so private memory does not depend on the corpus.
    """

    name = "torch"

    @dataclass(frozen=True, kw_only=True)
    class Options(DenseBackend.Options):
        """Options accepted in `SearchSpec.options`."""

        search_devices: str = field(default="auto", metadata=FREE)
        """Such as `cuda:0,cuda:1`; `auto` is every GPU of this node, or the CPU."""
        dtype: str = "float16"
        """Type of the vectors on a GPU: float16 (half the memory) or float32."""
        block_rows: int = field(default=65_536, metadata=FREE)
        """Rows scored at once."""

    def _check(self) -> None:
        if self.options.dtype not in ("float16", "float32"):
            raise ConfigError(f"search backend 'torch': dtype {self.options.dtype!r}: expected float16 or float32")
        super()._check()
        if (kind := self.manifest.kind) not in ("Flat", "SQfp16"):
            raise ConfigError(
                f"{self.index_path}: exact search in torch needs an index of kind Flat or SQfp16, found {kind}"
            )

    def _open(self) -> None:
        rows, block_rows = self.manifest.rows, self.options.block_rows
        read = stored_vectors(open_index(self.index_path, mapped=True)).read
        devices = [torch.device(name) for name in resolve_devices(self.options.search_devices)]
        if devices[0].type == "cpu":
            self._parts = [_Part(0, rows, devices[0], block_rows, read=read)]
            return
        share, dtype = -(-rows // len(devices)), getattr(torch, self.options.dtype)
        self._parts = []
        # Not strict: a small index fills fewer parts than there are devices.
        for begin, device in zip(range(0, rows, share), devices, strict=False):
            end = min(begin + share, rows)
            kept = _on_device(read, begin, end, device, dtype, block_rows)
            self._parts.append(_Part(begin, end, device, block_rows, kept=kept))

    def nearest(self, vectors_QD: NDArray[np.float32], topk: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See `DenseBackend.nearest`."""
        queries = torch.from_numpy(vectors_QD)
        found = [part.nearest(queries, topk) for part in self._parts]
        scores, rows = _best([scores.cpu() for scores, _ in found], [rows.cpu() for _, rows in found], topk)
        return scores.numpy(), rows.numpy()


Read = Callable[[int, int], NDArray[Any]]
"""(first row, end) -> (rows, D) vectors in float32."""


@dataclass
class _Part:
    """Rows `begin` to `end` of an index, searched on one device; either `read` or `kept` is given."""

    begin: int
    end: int
    device: torch.device
    block_rows: int
    """Rows scored at once."""
    read: Read | None = None
    """Reads a block of rows."""
    kept: torch.Tensor | None = None
    """All rows of the part, on the device."""

    @torch.inference_mode()
    def nearest(self, queries_QD: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores, rows) on the device, each (Q, min(K, rows of this part))."""
        queries = queries_QD.to(self.device)
        rough = self.kept is not None and self.kept.dtype != torch.float32
        # Rounding to half precision can swap close scores, so more rows than K are kept and scored again.
        wanted = 2 * topk + 32 if rough else topk
        scores = torch.empty((len(queries), 0), device=self.device)
        rows = torch.empty((len(queries), 0), dtype=torch.int64, device=self.device)
        for start in range(self.begin, self.end, self.block_rows):
            block = self._block(start, min(start + self.block_rows, self.end))
            block_scores = (queries.to(block.dtype) @ block.T).float()
            best, at = block_scores.topk(min(wanted, len(block)), dim=1)
            scores, rows = _best([scores, best], [rows, at + start], wanted)
        return _best([self._exact_scores(queries, rows)], [rows], topk) if rough else (scores, rows)

    def _block(self, start: int, stop: int) -> torch.Tensor:
        if self.kept is not None:
            return self.kept[start - self.begin : stop - self.begin]
        assert self.read is not None
        return torch.from_numpy(self.read(start, stop))

    def _exact_scores(self, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(Q, W) inner products in float32, computed for a few queries at a time."""
        assert self.kept is not None
        # Gathers (step, W, D) vectors, W kept rows per query: about `block_rows` vectors at a time.
        step = max(1, self.block_rows // max(rows.shape[1], 1))
        found = [
            torch.einsum("qwd,qd->qw", self.kept[some - self.begin].float(), query)
            for query, some in zip(queries.split(step), rows.split(step), strict=True)
        ]
        return torch.cat(found)


def _best(scores: list[torch.Tensor], rows: list[torch.Tensor], topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Best K of several (Q, K_i) lists; ties go to the earlier entry."""
    all_scores, all_rows = torch.cat(scores, 1), torch.cat(rows, 1)
    order = all_scores.argsort(dim=1, descending=True, stable=True)[:, :topk]
    return all_scores.gather(1, order), all_rows.gather(1, order)


def _on_device(
    read: Read, begin: int, end: int, device: torch.device, dtype: torch.dtype, block_rows: int
) -> torch.Tensor:
    """Copy rows to the device block by block, so that the host holds at most one block."""
    kept: torch.Tensor | None = None
    for start in range(begin, end, block_rows):
        stop = min(start + block_rows, end)
        block = torch.from_numpy(read(start, stop))
        if kept is None:
            kept = torch.empty((end - begin, block.shape[1]), dtype=dtype, device=device)
        kept[start - begin : stop - begin] = block.to(device=device, dtype=dtype)
    assert kept is not None
    return kept
