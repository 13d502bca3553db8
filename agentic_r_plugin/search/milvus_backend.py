"""The search backend `milvus`: an index of `agentic-r index` whose vectors are in Milvus."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_r_plugin.backends import SearchSpec
from agentic_r_plugin.config import FREE, fingerprint
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.search.dense import DenseBackend
from agentic_r_plugin.search.indexing.milvus import Collection


class MilvusBackend(DenseBackend):
    """Dense retrieval with Milvus: a cluster, one server, or milvus-lite in this process."""

    name = "milvus"

    @dataclass(frozen=True, kw_only=True)
    class Options(DenseBackend.Options):
        """Options accepted in `SearchSpec.options`."""

        uri: str = field(default="", metadata=FREE)
        """In place of the one that the index was built with; likewise `token_env`."""
        token_env: str = field(default="", metadata=FREE)
        filter: str = ""
        """Expression over `row` and the stored fields; only passages that satisfy it are found."""
        params: dict[str, Any] = field(default_factory=dict)
        """Search parameters of the kind, such as `{ef: 256}`."""
        consistency: str = ""
        """Strong, Bounded, Session or Eventually; empty: the collection's own."""
        timeout_s: float = field(default=60.0, metadata=FREE)
        """For one request."""

    def _check(self) -> None:
        if self.manifest.milvus is None:
            raise ConfigError(f"{self.folder}: its vectors are not in Milvus; leave search.backend out")

    def _open(self) -> None:
        where = {name: getattr(self.options, name) for name in ("uri", "token_env", "timeout_s")}
        self._collection = Collection(self.manifest, self.folder, **where)
        try:
            self._collection.check()
        except BaseException:
            self._collection.close()
            raise

    @classmethod
    def from_spec(cls, spec: SearchSpec) -> DenseBackend:
        """See `DenseBackend.from_spec`."""
        return super().from_spec(replace(spec, options={"timeout_s": spec.timeout_s} | spec.options))

    def nearest(self, vectors_QD: NDArray[np.float32], topk: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """See `DenseBackend.nearest`."""
        use = {name: getattr(self.options, name) for name in ("filter", "params", "consistency")}
        return self._collection.search(vectors_QD, topk, **use)

    def fingerprint(self) -> str:
        """See `SearchBackend.fingerprint`; with a filter, another one."""
        whole = super().fingerprint()
        return fingerprint(whole, self.options.filter) if self.options.filter else whole

    def close(self) -> None:
        """Close the connection and the corpus."""
        self._collection.close()
        super().close()
