"""The search backend `milvus`: an index of `agentic-r index` whose vectors are in Milvus."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_r_plugin.backends import SearchSpec
from agentic_r_plugin.config import FREE, fingerprint
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.search.dense import DenseBackend
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.search.indexing.milvus import Collection


class MilvusBackend(DenseBackend):
    """Dense retrieval with Milvus: a cluster, one server, or milvus-lite in this process.

    Args (in addition to those of `DenseBackend`):
        uri, token_env: in place of those that the index was built with.
        filter: expression over `row` and the stored fields; only passages that satisfy it are found.
        params: search parameters of the kind, such as `{ef: 256}`.
        consistency: Strong, Bounded, Session or Eventually; empty: the collection's own.
        timeout_s: for one request.
    """

    name = "milvus"

    @dataclass(frozen=True, kw_only=True)
    class Options(DenseBackend.Options):
        """Options accepted in `SearchSpec.options`."""

        uri: str = field(default="", metadata=FREE)
        token_env: str = field(default="", metadata=FREE)
        filter: str = ""
        params: dict[str, Any] = field(default_factory=dict)
        consistency: str = ""
        timeout_s: float = field(default=60.0, metadata=FREE)

    def __init__(
        self,
        index: str | Path,
        retriever: Retriever | str | None = None,
        corpus: str | Path | None = None,
        *,
        uri: str = "",
        token_env: str = "",
        filter: str = "",
        params: dict[str, Any] | None = None,
        consistency: str = "",
        timeout_s: float = 60.0,
        **shared: Any,
    ) -> None:
        super().__init__(index, retriever, corpus, **shared)
        self._filter = filter
        self._search: dict[str, Any] = {"filter": filter, "params": params or {}, "consistency": consistency}
        try:
            self._collection = Collection(self.manifest, index, uri=uri, token_env=token_env, timeout_s=timeout_s)
        except BaseException:
            self.corpus.close()
            raise
        try:
            self._collection.check()
        except BaseException:
            self.close()
            raise

    def _check_vectors(self) -> None:
        if self.manifest.milvus is None:
            raise ConfigError(f"{self.index_path.parent}: its vectors are not in Milvus; leave search.backend out")

    @classmethod
    def from_spec(cls, spec: SearchSpec) -> DenseBackend:
        """See `DenseBackend.from_spec`."""
        return super().from_spec(replace(spec, options={"timeout_s": spec.timeout_s} | spec.options))

    def nearest(self, vectors_QD: NDArray[np.float32], topk: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See `DenseBackend.nearest`."""
        return self._collection.search(vectors_QD, topk, **self._search)

    def fingerprint(self) -> str:
        """See `SearchBackend.fingerprint`; with a filter, another one."""
        whole = super().fingerprint()
        return fingerprint(whole, self._filter) if self._filter else whole

    def close(self) -> None:
        """Close the connection and the corpus."""
        self._collection.close()
        super().close()
