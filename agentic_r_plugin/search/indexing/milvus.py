"""The vectors of an index in a Milvus collection, in place of a faiss file.

`agentic-r index milvus.uri=…` encodes a corpus as always and puts the vectors into a collection. The index folder holds
the manifest and the corpus' table, so that every command takes it as any other index folder. A row of the collection is
a row number of the corpus, its vector, and the fields that filters need; passages are read from the corpus.

The name of a collection ends with a fingerprint of its contents. So another retriever or kind gets another collection,
a reload can switch between them, and nothing is overwritten.

Shapes: Q queries, D dimensions, K = topk.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faiss
import numpy as np
from numpy.typing import NDArray

from agentic_r_plugin.config import FREE, fingerprint, setting
from agentic_r_plugin.credentials import read_secret, redacted, refuse_secrets
from agentic_r_plugin.errors import (
    AgenticRError,
    ConfigError,
    IndexMismatchError,
    ManifestMismatchError,
    SearchError,
    SearchUnavailableError,
    UpstreamError,
)
from agentic_r_plugin.progress import progress
from agentic_r_plugin.search.indexing.faiss_files import Matrix, VectorBlocks
from agentic_r_plugin.storage.fingerprints import LITE_FOLDER
from agentic_r_plugin.store import read_json

if TYPE_CHECKING:
    from agentic_r_plugin.records import Passage
    from agentic_r_plugin.search.corpus import Corpus
    from agentic_r_plugin.search.indexing.index import IndexManifest
    from agentic_r_plugin.storage.claim import Claim

log = logging.getLogger(__name__)

Vectors = NDArray[np.float32]

LITE = "lite"
"""The address of milvus-lite, embedded in this process, with its files in the index folder."""

LITE_KINDS = ("FLAT", "HNSW", "HNSW_SQ", "IVF_FLAT", "IVF_SQ8", "AUTOINDEX")
"""Kinds that milvus-lite can load; it accepts others and fails later."""

FIELDS = ("id", "title", "metadata")
"""Fields of a passage that can be stored for filters."""

_TEXT_BYTES = 65_535
"""Milvus' limit for a text and for the JSON of one row."""

_BATCH = 1024
"""Rows of one write, and queries of one search: messages below Milvus' limit of 64 MB."""

_SAMPLE, _CHECKED_TOPK = 32, 20
"""Vectors that are searched after a build, and the depth that is compared with exact search."""

_TIE = 1e-5
"""Scores that differ by less are equal: sums of floats depend on their order."""


_NOT_FOUND, _NOT_LOADED = 100, 101
"""Milvus' codes of a collection that does not exist, and of one that is not in the memory of the server."""


class _NotLoadedError(SearchError):
    """The collection is not in the memory of the server, which was restarted or released it."""


@dataclass(frozen=True, kw_only=True)
class MilvusSettings:
    """Where `agentic-r index` puts the vectors."""

    uri: str = setting(
        "server (http://HOST:19530/DATABASE), or lite: embedded in the index folder; empty: a faiss file",
        {"decides": bool},
        default="",
    )
    token_env: str = setting("environment variable that holds its token or user:password", FREE, default="")
    prefix: str = setting("of the collection's name; a fingerprint follows", FREE, default="agentic_r")
    params: dict[str, Any] = setting(
        "parameters of the kind, such as {M: 32, efConstruction: 200}", default_factory=dict
    )
    fields: list[str] = setting(f"of passages, stored for filters: {', '.join(FIELDS)}", default_factory=list)
    timeout_s: float = setting("for one request", FREE, default=60.0)

    def __post_init__(self) -> None:
        if self.uri and self.uri != LITE and "://" not in self.uri:
            raise ConfigError(f"milvus.uri={self.uri!r}: expected an address such as http://HOST:19530, or {LITE}")
        if not re.fullmatch(r"[A-Za-z_]\w{0,199}", self.prefix, re.ASCII):
            raise ConfigError(f"milvus.prefix={self.prefix!r}: expected letters, digits and _, at most 200")
        if unknown := set(self.fields) - set(FIELDS):
            raise ConfigError(f"milvus.fields: {min(unknown)!r}: expected some of {', '.join(FIELDS)}")
        way_out = "put it into an environment variable and give that variable's name as milvus.token_env"
        refuse_secrets("milvus", {"uri": self.uri, "token_env": self.token_env, "params": self.params}, way_out)


def placed(settings: MilvusSettings, manifest: IndexManifest) -> IndexManifest:
    """The manifest of an index whose vectors go into a collection."""
    kind = manifest.kind.upper()
    contents = manifest.vectors_fingerprint(), manifest.precision, kind, settings.params, sorted(settings.fields)
    place = {
        "uri": settings.uri,
        "token_env": settings.token_env,
        "collection": f"{settings.prefix}_{fingerprint(*contents)}",
        "params": dict(settings.params),
        "fields": sorted(settings.fields),
    }
    return replace(manifest, kind=kind, milvus=place)


def in_milvus(index: str | Path) -> bool:
    """Whether the vectors of a finished index are in Milvus."""
    manifest = Path(index) / "manifest.json"
    return bool(index) and manifest.is_file() and read_json(manifest).get("milvus") is not None


_open_files: Counter[str] = Counter()
"""Clients of each embedded database of this process. The last one closes it, so that another process can open it."""

_opening = threading.Lock()  # for `_open_files`, and for opening and closing clients


class Collection:
    """The collection of an index.

    Args:
        uri, token_env: in place of those that the index was built with.
        timeout_s: for one request.

    Raises:
        ConfigError: pymilvus is missing, the token is refused, or another process has the embedded database open.
        SearchUnavailableError: no server answers at the address.
    """

    def __init__(
        self,
        manifest: IndexManifest,
        folder: str | Path,
        *,
        uri: str = "",
        token_env: str = "",
        timeout_s: float = 60.0,
    ) -> None:
        assert manifest.milvus is not None
        self.manifest, self.place, self.timeout_s = manifest, manifest.milvus, timeout_s
        self.name, self.uri = self.place["collection"], uri or self.place["uri"]
        self._token = read_secret(token_env or self.place["token_env"], "milvus token_env")
        self._file = str(Path(folder).resolve() / LITE_FOLDER) if self.uri == LITE else ""
        self._client: Any = self._connect()

    def _connect(self) -> Any:
        extra = "milvus-lite" if self._file else "milvus"
        try:
            import pymilvus

            if self._file:
                import milvus_lite  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"milvus.uri={self.uri} needs the package {error.name}: pip install agentic-r-plugin[{extra}]"
            ) from error
        for library in ("pymilvus", "milvus_lite", "grpc._server"):  # they print the errors that are raised here
            logging.getLogger(library).setLevel(logging.CRITICAL)
        with _opening:
            client = self._call(pymilvus.MilvusClient, self._file or self.uri, token=self._token or "")
            _open_files[self._file] += 1
        return client

    def _call(self, function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        from grpc import RpcError
        from pymilvus import MilvusException

        try:
            return function(*arguments, **{"timeout": self.timeout_s} | settings)
        except (MilvusException, RpcError) as error:
            found = self._error(error)
        raise found  # outside of `except`: a chained error could show the token

    def _error(self, error: Any) -> AgenticRError:
        parts = [getattr(error, "message", "") or str(error)]
        if hasattr(error.__cause__, "details"):  # of gRPC: a refused token is reported as a failure to connect
            parts.append(f"{error.__cause__.code().name}: {error.__cause__.details()}")
        text = redacted("; ".join(dict.fromkeys(parts)), self._token)
        if "Open local milvus failed" in text:
            return ConfigError(
                f"{self._file}: milvus-lite cannot open it, since another process has it open (it takes one process): "
                f"end that one or use one worker; or share it with milvus-lite server --data-dir {self._file} and "
                "search.options.uri=http://127.0.0.1:19530"
            )
        where = f"Milvus at {self._file or self.uri}, collection {self.name}"
        if getattr(error, "code", None) == _NOT_LOADED:
            return _NotLoadedError(f"{where}: {text}")
        if getattr(error, "code", None) == _NOT_FOUND:
            return IndexMismatchError(f"{where}: no such collection; build the index again with agentic-r index")
        if re.search(r"unauthenticated|auth check|permission|privilege", text, re.IGNORECASE):
            given = "the token" if self._token else "requests without a token (token_env is not set)"
            return ConfigError(f"{where}: the server refuses {given}: {text}")
        if re.search(r"fail connecting|unavailable|illegal connection|deadline|timeout", text, re.IGNORECASE):
            return SearchUnavailableError(f"{where}: no answer within {self.timeout_s:g} s: {text}")
        return SearchError(f"{where}: {text}")

    # --- building -----------------------------------------------------------------------------------------------------

    def create(self) -> None:
        """Create the collection and its index, as far as they do not exist.

        Raises:
            ConfigError: the server refuses the kind or its parameters; a collection made here is dropped.
        """
        from pymilvus import DataType

        if self._file and self.manifest.kind not in LITE_KINDS:
            raise ConfigError(f"index kind {self.manifest.kind}: milvus-lite has {', '.join(LITE_KINDS)}")
        if made := not self.exists():
            schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
            schema.add_field("row", DataType.INT64, is_primary=True)
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self.manifest.dim)
            for name in self.place["fields"]:
                text = {"max_length": _TEXT_BYTES} if name != "metadata" else {}
                schema.add_field(name, DataType.VARCHAR if text else DataType.JSON, **text)
            self._call(self._client.create_collection, self.name, schema=schema)
        # A resume: an earlier run has created it.
        if self._index():
            return
        index = self._client.prepare_index_params()
        settings = {"index_type": self.manifest.kind, "metric_type": "IP", "params": self.place["params"]}
        index.add_index("vector", index_name="vector", **settings)
        try:
            self._call(self._client.create_index, self.name, index)
        except SearchError as error:
            if made:
                self._call(self._client.drop_collection, self.name)
            raise ConfigError(f"index kind {self.manifest.kind}, {self.place['params']}: {error}") from error

    def exists(self) -> bool:
        """Whether the server has the collection."""
        return bool(self._call(self._client.has_collection, self.name))

    def write(self, rows: Sequence[Mapping[str, Any]], *, again: bool) -> None:
        """Store rows; `again`: some may be there already, and are replaced."""
        self._call(self._client.upsert if again else self._client.insert, self.name, list(rows))

    def complete(self) -> None:
        """Wait until all rows are indexed and in the memory of the server."""
        self._call(self._client.flush, self.name, timeout=None)
        with progress(total=self.manifest.rows, desc="Milvus indexes", unit="passage") as shown:
            done = 0
            while (found := self._index())["state"] != "Finished":
                if found["state"] == "Failed":
                    raise SearchError(f"Milvus at {self.uri}: it could not index collection {self.name}")
                before, done = done, max(done, int(found["indexed_rows"]))
                shown.update(done - before)
                time.sleep(1)
        self.load()

    def load(self) -> None:
        """Have the server load the collection, which may take minutes."""
        self._call(self._client.load_collection, self.name, timeout=None)

    def _index(self) -> dict[str, Any]:
        return dict(self._call(self._client.describe_index, self.name, "vector") or {})

    # --- reading ------------------------------------------------------------------------------------------------------

    def search(
        self,
        vectors_QD: Vectors,
        topk: int,
        *,
        filter: str = "",
        params: Mapping[str, Any] | None = None,
        consistency: str = "",
    ) -> tuple[Vectors, NDArray[np.int64]]:
        """(scores, rows), both (Q, K), best first; row -1 where fewer were found.

        A collection that the server does not have in memory is loaded first.

        Raises:
            SearchError: the server cannot answer, or refuses the filter, the parameters or the depth.
            SearchUnavailableError: no answer within `timeout_s`, or not loaded within it.
        """
        scores = np.full((len(vectors_QD), topk), -np.inf, np.float32)
        rows = np.full((len(vectors_QD), topk), -1, np.int64)
        settings: dict[str, Any] = {"consistency_level": consistency} if consistency else {}
        search = {"metric_type": "IP", "params": self._depth(params or {}, topk)}
        for start in range(0, len(vectors_QD), _BATCH):
            ask = partial(
                self._call, self._client.search, self.name, vectors_QD[start : start + _BATCH], filter, topk, ["row"],
                search, anns_field="vector", **settings,
            )  # fmt: skip
            try:
                found = ask()
            except _NotLoadedError:
                self._call(self._client.load_collection, self.name)
                found = ask()
            for number, hits in enumerate(found, start):
                scores[number, : len(hits)] = [hit["distance"] for hit in hits]
                rows[number, : len(hits)] = [hit["row"] for hit in hits]
        return scores, rows

    def _depth(self, params: Mapping[str, Any], topk: int) -> dict[str, Any]:
        """Parameters of a search, with those that faiss has by default; a graph needs at least K candidates."""
        kind = self.manifest.kind
        if kind.startswith("HNSW"):
            return {**params, "ef": max(params.get("ef", 128), topk)}
        if kind == "DISKANN":
            return {**params, "search_list": max(params.get("search_list", 128), topk)}
        if kind.startswith("IVF"):
            return {"nprobe": min(64, self.place["params"].get("nlist", 128)), **params}
        return dict(params)

    def count(self) -> int:
        """Rows, after all writes."""
        found = self._call(self._client.query, self.name, "", ["count(*)"], consistency_level="Strong")
        return int(found[0]["count(*)"])

    def sample(self) -> str:
        """Fingerprint of the vectors of 16 rows."""
        rows = np.linspace(0, self.manifest.rows - 1, num=min(16, self.manifest.rows), dtype=np.int64).tolist()
        found = self._call(self._client.query, self.name, f"row in {rows}", ["row", "vector"])
        vectors = {item["row"]: np.asarray(item["vector"], np.float32).tobytes().hex() for item in found}
        return fingerprint([vectors.get(row) for row in rows])

    def check(self) -> None:
        """Load the collection, and compare it with the manifest.

        Raises:
            IndexMismatchError: no such collection, or one of another dimension, metric, kind, size or content.
        """
        manifest = self.manifest
        described = self._call(self._client.describe_collection, self.name)
        dims = [item["params"].get("dim") for item in described["fields"] if item["name"] == "vector"]
        index = self._index()
        self.load()
        compared: Iterable[tuple[str, Any, Any]] = (
            ("dimensions", [manifest.dim], [int(dim) for dim in dims]),
            ("metric", "IP", index.get("metric_type")),
            ("kind", manifest.kind, index.get("index_type")),
            ("rows", manifest.rows, self.count()),
            ("vectors", manifest.index_sample, self.sample()),
        )
        for what, expected, found in compared:
            if found != expected:
                raise IndexMismatchError(
                    f"Milvus at {self._file or self.uri}, collection {self.name}: expected {what} {expected}, found "
                    f"{found}: it was changed or replaced after the build; build the index again with agentic-r index"
                )

    def close(self) -> None:
        """Close the connection; safe to call twice."""
        if self._client is None:
            return
        with _opening:
            self._client.close()
            self._client = None
            _open_files[self._file] -= 1
            if self._file and not _open_files[self._file]:
                from milvus_lite.server_manager import server_manager_instance

                server_manager_instance.release_server(self._file)

    def __enter__(self) -> Collection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prepare(manifest: IndexManifest, held: Claim, *, timeout_s: float) -> None:
    """Create the collection before the vectors are encoded, or find that of an interrupted run; notes it for `load`.

    Raises:
        ManifestMismatchError: the collection exists, and this folder did not begin it.
        ConfigError, SearchError: see `Collection`. What this run has written so far is removed.
    """
    begun = held.noted("milvus", {})
    try:
        with Collection(manifest, held.out, timeout_s=timeout_s) as collection:
            exists = collection.exists()
            if exists and begun.get("collection") != collection.name:
                raise ManifestMismatchError(
                    f"Milvus at {collection.uri}: collection {collection.name} exists, and {held.out} did not begin "
                    "it; drop it, or choose another milvus.prefix"
                )
            note = {"collection": collection.name, "rows": begun["rows"] if exists else 0, "again": exists}
            held.note(milvus=note)
            collection.create()
    except AgenticRError:
        if not begun and not held.work.exists():
            shutil.rmtree(held.out / LITE_FOLDER, ignore_errors=True)
            held.manifest.unlink()
        raise


def load(
    manifest: IndexManifest, held: Claim, parts: Sequence[Path | Matrix], corpus: Corpus, *, timeout_s: float
) -> IndexManifest:
    """Put all vectors into the collection, and compare its results with exact search.

    After a kill, the rows after the last acknowledged block are written again, as replacements.

    Args:
        parts: files or matrices with the vectors of all rows, in the order of the corpus.

    Returns:
        The manifest with a sample of the vectors, and the share of the exact top 20 that the collection finds.

    Raises:
        SearchError: the server fails, or holds another number of rows at the end.
        UpstreamError: the exact kind does not find what exact search finds.
    """
    assert manifest.milvus is not None
    note: dict[str, Any] = held.noted("milvus")
    fields, start = manifest.milvus["fields"], 0
    vectors = VectorBlocks(parts, manifest.rows, manifest.dim)
    exact = _ExactSearch(vectors.sample(min(_SAMPLE, manifest.rows)), manifest.rows)
    with Collection(manifest, held.out, timeout_s=timeout_s) as collection:
        with progress(total=manifest.rows, initial=note["rows"], desc="Milvus", unit="passage") as shown:
            for block in vectors:
                # Also blocks that are stored already: exact search needs all vectors.
                exact.add(block, start)
                for first in range(0, len(block), _BATCH):
                    part = block[first : first + _BATCH]
                    rows = range(start + first, start + first + len(part))
                    if rows.stop > note["rows"]:
                        stored = ({name: _stored(corpus[row], name) for name in fields} for row in rows)
                        collection.write(
                            [
                                {"row": row, "vector": vector} | more
                                for row, vector, more in zip(rows, part, stored, strict=True)
                            ],
                            again=note["again"],
                        )
                        held.note(milvus=note | {"rows": rows.stop})
                        shown.update(len(part))
                start += len(block)
        collection.complete()
        if (count := collection.count()) != manifest.rows:
            held.note(milvus=note | {"rows": 0})
            raise SearchError(
                f"Milvus at {collection.uri}: collection {collection.name} holds {count} rows, expected "
                f"{manifest.rows}; --resume writes all of them again"
            )
        share = exact.share(collection.search(exact.queries_QD, exact.topk, consistency="Strong")[1])
        log.warning("Milvus %s finds %.1f %% of the exact top %d", manifest.kind, 100 * share, exact.topk)
        if manifest.kind == "FLAT" and share < 1:
            raise UpstreamError(f"Milvus at {collection.uri}: kind FLAT finds {share:.1%} of what exact search finds")
        return replace(manifest, index_sample=collection.sample(), milvus=manifest.milvus | {"recall": round(share, 4)})


def _stored(passage: Passage, name: str) -> Any:
    """A field of a passage for filters, cut to Milvus' limit; metadata beyond it is left out."""
    if name != "metadata":
        # The limit is in bytes; a character that it would split is dropped.
        return str(getattr(passage, name)).encode()[:_TEXT_BYTES].decode(errors="ignore")
    metadata = dict(passage.metadata)
    if len(json.dumps(metadata, ensure_ascii=False).encode()) <= _TEXT_BYTES:
        return metadata
    log.warning("passage %r: its metadata is longer than the %d bytes that Milvus takes: filters do not see it",
                passage.id, _TEXT_BYTES)  # fmt: skip
    return {}


class _ExactSearch:
    """Exact top 2 K of a few queries, over blocks of vectors that pass by."""

    def __init__(self, queries_QD: Vectors, rows: int) -> None:
        self.queries_QD, self.topk = queries_QD, _CHECKED_TOPK
        # More than K, so that rows tied with the K-th are known.
        self._best = faiss.ResultHeap(len(queries_QD), min(2 * self.topk, rows), keep_max=True)

    def add(self, block: Vectors, start: int) -> None:
        """Search a block whose first row is `start`."""
        kept = min(self._best.k, len(block))
        scores, rows = faiss.knn(self.queries_QD, block, kept, metric=faiss.METRIC_INNER_PRODUCT)
        self._best.add_result(scores, rows + start)

    def share(self, rows_QK: NDArray[np.int64]) -> float:
        """Share of the exact top K among the rows found; a row with the score of the last one is as good as that."""
        self._best.finalize()
        last = min(self.topk, self._best.k) - 1
        good = [
            len(set(found) & set(rows[scores >= scores[last] - _TIE])) / (last + 1)
            for found, rows, scores in zip(rows_QK.tolist(), self._best.I, self._best.D, strict=True)
        ]
        return float(np.mean(good))
