"""`agentic-r index`: encodes a corpus and writes a flat inner-product index that faiss and FlashRAG read as theirs.

The index folder holds `{method}_Flat.index` (row i is the corpus' row i) and `manifest.json`, which is written last: a
folder with a manifest is whole. Shards of vectors are kept while the work lasts, so that an interrupted run goes on.
Memory does not grow with the corpus, and the index can be mapped instead of read.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import faiss
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from agentic_r_plugin.config import fingerprint, save_config
from agentic_r_plugin.errors import (
    ConfigError,
    IndexMismatchError,
    ManifestMismatchError,
    OutputExistsError,
    RecordError,
    UpstreamError,
)
from agentic_r_plugin.records import Record
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.store import atomic_path, read_json, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_WORK, _SHARDS = "work.json", "shards"


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Settings of `agentic-r index`."""

    corpus: str = field(metadata={"help": "corpus file: jsonl, jsonl.gz or parquet with id and contents"})
    retriever: str = field(metadata={"help": "retriever checkpoint folder, hub name, or builtin:minilm"})
    out: str = field(metadata={"help": "index folder to write"})
    method: str = field(default="agentic_r", metadata={"help": "FlashRAG's retrieval_method; names the index file"})
    preset: str = field(default="auto", metadata={"help": "prefixes of an untrained model: auto, e5, bge, plain"})
    formulation: str | None = field(default=None, metadata={"help": "query formulation in place of the recorded one"})
    max_length: int | None = field(default=None, metadata={"help": "tokens of query and passage, in place of recorded"})
    device: str = field(default="auto", metadata={"help": "auto: cuda where there is one, else cpu"})
    precision: str = field(default="auto", metadata={"help": "float32, bfloat16, or auto: bfloat16 where native"})
    batch_size: int = field(default=32, metadata={"help": "passages encoded at once"})
    shard_size: int = field(default=2048, metadata={"help": "passages between two resume points"})

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.shard_size < 1:
            raise ConfigError("batch_size and shard_size must be at least 1")
        if not self.method or "/" in self.method:
            raise ConfigError(f"method {self.method!r} must be usable as a file name")


@dataclass(frozen=True, kw_only=True)
class IndexManifest(Record):
    """What an index was made from; its presence means that the index is whole."""

    schema: ClassVar[str | None] = "index/1"

    method: str
    rows: int
    dim: int
    metric: str
    corpus: str
    corpus_fingerprint: str
    retriever: str
    retriever_fingerprint: str
    retriever_record: dict[str, Any]
    """Formulation, prefixes and lengths, as in the retriever's own record."""
    preset: str
    formulation_override: str | None
    max_length_override: int | None
    versions: dict[str, str]

    @property
    def index_file(self) -> str:
        """Name of the faiss file, as FlashRAG builds it."""
        return f"{self.method}_Flat.index"

    def fingerprint(self) -> str:
        """Changes when corpus, retriever or use of the retriever change; not when files move."""
        return fingerprint(self.corpus_fingerprint, self.retriever_fingerprint, self.rows, self.dim, self.metric)


def run(config: IndexConfig, *, resume: bool = False) -> None:
    """Build the index that `config` describes.

    Raises:
        OutputExistsError: the folder is not empty and `resume` is off.
        ManifestMismatchError: the folder was begun, or finished, with other inputs.
        RecordError, ConfigError: a broken corpus or retriever; nothing is written then.
    """
    build_index(config, resume=resume)


def build_index(config: IndexConfig, *, resume: bool = False) -> IndexManifest:
    """As `run`, returning the manifest."""
    out = Path(config.out)
    if not resume and out.exists() and any(out.iterdir()):
        raise OutputExistsError(f"{out} is not empty; choose another folder, remove it, or pass --resume to go on")
    with Corpus(config.corpus) as corpus:
        overrides = _overrides(config.formulation, config.max_length)
        retriever = Retriever.load(
            config.retriever, preset=config.preset, device=config.device, precision=config.precision, **overrides
        )
        manifest = _manifest(config, corpus, retriever)
        if (out / MANIFEST).is_file():
            _require_same(out, read_manifest(out), manifest)
            shutil.rmtree(out / _SHARDS, ignore_errors=True)
            return manifest
        _begin(out, manifest, config)
        shards = _encode_shards(corpus, retriever, out / _SHARDS, config)
        write_flat_index(out / manifest.index_file, shards, rows=manifest.rows, dim=manifest.dim)
        save_config(config, out / "config.yaml")
        write_json(out / MANIFEST, manifest.to_dict())
        shutil.rmtree(out / _SHARDS)
        (out / _WORK).unlink()
        log.info("indexed %d passages in %s", manifest.rows, out)
        return manifest


def _overrides(formulation: str | None, max_length: int | None) -> dict[str, Any]:
    return {"formulation": formulation, "query_max_length": max_length, "passage_max_length": max_length}


def _manifest(config: IndexConfig, corpus: Corpus, retriever: Retriever) -> IndexManifest:
    folder = Path(config.retriever)
    return IndexManifest(
        method=config.method,
        rows=len(corpus),
        dim=retriever.dim,
        metric="inner_product",
        corpus=str(corpus.path.resolve()),
        corpus_fingerprint=corpus.fingerprint(),
        retriever=str(folder.resolve()) if folder.exists() else config.retriever,
        retriever_fingerprint=retriever.fingerprint(),
        retriever_record=retriever.record.to_dict(),
        preset=config.preset,
        formulation_override=config.formulation,
        max_length_override=config.max_length,
        versions={name: version(name) for name in ("torch", "transformers", "sentence-transformers")}
        | {"faiss": str(faiss.__version__)},
    )


def _require_same(out: Path, found: IndexManifest, wanted: IndexManifest) -> None:
    if found.fingerprint() != wanted.fingerprint():
        raise ManifestMismatchError(
            f"{out} holds an index of {found.corpus} by {found.retriever}, made from other contents than those of "
            f"{wanted.corpus} and {wanted.retriever} now; remove it or choose another folder"
        )


def _begin(out: Path, manifest: IndexManifest, config: IndexConfig) -> None:
    """Note what the shards are made from, or check that those found were made from the same."""
    key = {"index": manifest.fingerprint(), "shard_size": config.shard_size}
    (out / _SHARDS).mkdir(parents=True, exist_ok=True)
    if (out / _WORK).is_file():
        if (found := read_json(out / _WORK)) != key:
            raise ManifestMismatchError(
                f"{out} was begun with another corpus, retriever or shard_size ({found} instead of {key}); remove it"
            )
    elif any((out / _SHARDS).iterdir()):
        raise ManifestMismatchError(f"{out / _SHARDS} holds vectors of unknown origin; remove {out}")
    else:
        write_json(out / _WORK, key)


def _encode_shards(corpus: Corpus, retriever: Retriever, folder: Path, config: IndexConfig) -> list[Path]:
    """One `.npy` of (rows, D) float32 per shard; those that are there are kept."""
    paths = []
    with tqdm(total=len(corpus), desc="index", unit="passage", mininterval=1.0) as progress:
        for start in range(0, len(corpus), config.shard_size):
            stop = min(start + config.shard_size, len(corpus))
            path = folder / f"{start:010d}.npy"
            if not path.is_file():
                passages = [corpus[row] for row in range(start, stop)]
                vectors = retriever.encode_passages(passages, batch_size=config.batch_size)
                if not np.isfinite(vectors).all():
                    raise RecordError(
                        f"retriever {config.retriever} gives vectors that are not finite for rows {start}-{stop - 1}",
                        path=corpus.path,
                    )
                with atomic_path(path) as temporary, temporary.open("wb") as stream:
                    np.save(stream, vectors)
            paths.append(path)
            progress.update(stop - start)
    return paths


_FAISS_HEADER_BYTES = 45
"""fourcc, dimension (4), rows (8), 2 unused (16), trained (1), metric (4), count of floats (8)."""


def write_flat_index(path: Path, shards: Iterable[Path], *, rows: int, dim: int) -> None:
    """Write faiss' own file of an `IndexFlatIP` without holding its vectors in memory.

    Args:
        shards: `.npy` files of (n, dim) float32 whose rows add up to `rows`.

    Raises:
        UpstreamError: this faiss writes another header, or cannot read what was written.
    """
    header = bytearray(faiss.serialize_index(faiss.IndexFlatIP(dim)).tobytes())
    if len(header) != _FAISS_HEADER_BYTES or header[:4] != b"IxFI":
        raise UpstreamError(
            f"faiss {faiss.__version__} writes an unknown header for IndexFlatIP; expected 45 bytes IxFI"
        )
    header[8:16] = rows.to_bytes(8, "little")
    header[37:45] = (rows * dim).to_bytes(8, "little")
    with atomic_path(path) as temporary:
        with temporary.open("wb") as stream:
            stream.write(header)
            for shard in shards:
                vectors: NDArray[np.float32] = np.load(shard, mmap_mode="r")
                if vectors.ndim != 2 or vectors.shape[1] != dim or vectors.dtype != np.float32:
                    raise ManifestMismatchError(f"{shard}: expected float32 vectors of {dim} numbers; remove it")
                stream.write(np.ascontiguousarray(vectors).data)
        index = open_flat_index(temporary, mapped=True)
        if index.ntotal != rows or index.d != dim:
            raise UpstreamError(f"{path}: faiss reads {index.ntotal} x {index.d}, expected {rows} x {dim}")


def open_flat_index(path: Path, *, mapped: bool) -> faiss.Index:
    """faiss' index of a file, in memory or mapped.

    Raises:
        IndexMismatchError: missing or not a faiss index.
    """
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        raise IndexMismatchError(f"{path}: faiss cannot read this index: {str(error).splitlines()[0]}") from error


def read_manifest(folder: str | Path) -> IndexManifest:
    """The manifest of a finished index.

    Raises:
        ConfigError: no index there, or one that was not finished.
        RecordError: a broken manifest.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        state = "an unfinished index; go on with --resume" if (folder / _WORK).is_file() else "no index there"
        raise ConfigError(f"{folder}: {state} (agentic-r index builds one)")
    try:
        return IndexManifest.from_dict(read_json(folder / MANIFEST))
    except RecordError as error:
        raise RecordError(str(error), path=folder / MANIFEST) from error


def index_retriever(
    manifest: IndexManifest, name: str | None = None, *, device: str = "auto", precision: str = "auto"
) -> Retriever:
    """The retriever an index was made with, loaded as it was then.

    Args:
        name: where it lies now; None means where it lay.

    Raises:
        IndexMismatchError: the retriever found there is another one.
    """
    overrides = _overrides(manifest.formulation_override, manifest.max_length_override)
    name = name or manifest.retriever
    retriever = Retriever.load(name, preset=manifest.preset, device=device, precision=precision, **overrides)
    check_retriever(manifest, retriever)
    return retriever


def check_retriever(manifest: IndexManifest, retriever: Retriever) -> None:
    """Raises `IndexMismatchError` unless the index was made with this retriever."""
    if (found := retriever.fingerprint()) != manifest.retriever_fingerprint:
        raise IndexMismatchError(
            f"index built with retriever {manifest.retriever} ({manifest.retriever_fingerprint}, formulation "
            f"{manifest.retriever_record.get('formulation')}) does not belong to retriever {retriever.source} "
            f"({found}, formulation {retriever.record.formulation}); build it again with agentic-r index"
        )


def check_corpus(manifest: IndexManifest, corpus: Corpus) -> None:
    """Raises `IndexMismatchError` unless the index was made from this corpus."""
    if (found := corpus.fingerprint()) != manifest.corpus_fingerprint:
        raise IndexMismatchError(
            f"index built from corpus {manifest.corpus} ({manifest.corpus_fingerprint}, {manifest.rows} passages) does "
            f"not belong to corpus {corpus.path} ({found}, {len(corpus)} passages); build it again with agentic-r index"
        )
