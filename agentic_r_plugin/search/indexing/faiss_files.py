"""Writes and opens faiss index files without holding the corpus' vectors in memory.

faiss holds an index in memory while it is built. For the kinds that matter for large corpora the file ends with the
codes of the vectors, so this module writes these files itself, shard by shard, in faiss' format:

| kind (faiss' factory string) | layout after the header | memory of the build |
|---|---|---|
| `Flat`, `SQ8`, `SQfp16` | codes, in row order | one shard |
| `IVF…,Flat`, `IVF…,SQ8`, `IVF…,PQ…` | per list its codes, then its row numbers | one shard, and the training sample |
| others (`HNSW32`, `PQ64`, `OPQ…`) | faiss' own | the whole index |

Each file is read back and searched before it is renamed to its final name; a test compares it byte for byte with
faiss' own. All indexes use inner products. faiss documents no file format, so the header is taken from the installed
faiss by serialising an empty index, and checked.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from agentic_r_plugin.errors import ConfigError, IndexMismatchError, ManifestMismatchError, UpstreamError
from agentic_r_plugin.store import atomic_path

log = logging.getLogger(__name__)

ALIASES = {"fp16": "SQfp16", "FP16": "SQfp16", "flat": "Flat", "sq8": "SQ8"}
"""Aliases of kinds."""

_ROWS = slice(8, 16)
"""Bytes of faiss' header that hold the number of vectors."""


_DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")


def require_one_faiss() -> None:
    """Refuse several faiss packages: they install into one folder and overwrite each other's files.

    Raises:
        ConfigError: more than one is installed.
    """
    if len(several := [name for name in _DISTRIBUTIONS if any(distributions(name=name))]) > 1:
        raise ConfigError(
            f"{' and '.join(several)} are installed into one folder and mixed there; keep one: pip uninstall "
            f"{' '.join(several)}, then pip install {several[-1]} (with CUDA) or {several[0]}"
        )


require_one_faiss()


def reason_of(error: RuntimeError) -> str:
    """What an error of faiss says, without the place in its sources."""
    return str(error).strip().splitlines()[-1]


def empty_index(kind: str, dim: int) -> faiss.Index:
    """An untrained index.

    Raises:
        ConfigError: faiss does not know the kind, or it does not fit the dimension.
    """
    try:
        return faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(
            f"index kind {kind!r} is not possible for {dim} dimensions: {reason_of(error)}; known are Flat, SQ8, "
            "SQfp16, IVF4096,Flat, IVF4096,SQ8, IVF4096,PQ64, HNSW32 and the like (faiss' index_factory)"
        ) from error


def kind_of(index: faiss.Index, name: str) -> str:
    """The factory string of an index that was read; of transforms before it, the classes.

    Args:
        name: of its file, for messages.

    Raises:
        IndexMismatchError: a kind whose rows cannot be compared with vectors.
    """
    found: Any = faiss.downcast_index(index)
    if isinstance(found, faiss.IndexPreTransform):
        chain: Any = found.chain
        steps = [faiss.downcast_VectorTransform(chain.at(place)) for place in range(chain.size())]
        return ",".join([*(type(step).__name__ for step in steps), kind_of(found.index, name)])
    if isinstance(found, faiss.IndexHNSW):
        graph: Any = found.hnsw
        storage = kind_of(found.storage, name)
        return f"HNSW{graph.nb_neighbors(1)}" + ("" if storage == "Flat" else f",{storage}")
    lists = f"IVF{found.nlist}," if isinstance(found, faiss.IndexIVF) else ""
    if type(found) in (faiss.IndexFlat, faiss.IndexFlatIP, faiss.IndexFlatL2, faiss.IndexIVFFlat):
        return f"{lists}Flat"
    scalar = type(found) in (faiss.IndexScalarQuantizer, faiss.IndexIVFScalarQuantizer)
    if scalar and found.sq.qtype in _SCALARS:
        return lists + _SCALARS[found.sq.qtype]
    if type(found) in (faiss.IndexPQ, faiss.IndexIVFPQ):
        return f"{lists}PQ{found.pq.M}" + ("" if found.pq.nbits == 8 else f"x{found.pq.nbits}")
    raise IndexMismatchError(
        f"{name}: expected a Flat, SQ or PQ index, or HNSW or IVF over one of these, found {type(found).__name__}"
    )


_SCALARS = {
    faiss.ScalarQuantizer.QT_8bit: "SQ8",
    faiss.ScalarQuantizer.QT_6bit: "SQ6",
    faiss.ScalarQuantizer.QT_4bit: "SQ4",
    faiss.ScalarQuantizer.QT_fp16: "SQfp16",
    faiss.ScalarQuantizer.QT_bf16: "SQbf16",
}


def bytes_per_row(kind: str, dim: int) -> int:
    """Disk space of a vector while an index is built: its code and, for an IVF, its row and list numbers.

    For graphs and transforms, whose code size faiss does not expose, the size of the raw vector.
    """
    index = empty_index(kind, dim)
    if isinstance(index, faiss.IndexIVF):
        return int(index.code_size) + 8 + 4
    return int(index.code_size) if isinstance(index, faiss.IndexFlatCodes) else 4 * dim


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """(rows, dim) vectors that are read in blocks."""

    rows: int
    dim: int
    read: Callable[[int, int], NDArray[Any]]
    """(start, stop) -> these rows, in any floating-point type."""


_BLOCK = 16_384
"""Rows of a matrix that are read at once."""


def write_index(
    path: Path, shards: Sequence[Path | Matrix], *, kind: str, rows: int, dim: int, train_rows: int
) -> None:
    """Write the index file of `kind` over the vectors of `shards`.

    Args:
        shards: `.npy` files of (n, dim) float32, or matrices, with `rows` rows in total.
        train_rows: maximum number of vectors in the training sample, which is held in memory.

    Raises:
        ConfigError: an invalid kind, or too few vectors to train it.
        ManifestMismatchError: a shard of another shape or type.
        UpstreamError: the installed faiss cannot read what was written.
    """
    index = empty_index(kind, dim)
    vectors = VectorBlocks(shards, rows, dim)
    if not index.is_trained:
        _train(index, vectors, kind, train_rows)
    with atomic_path(path) as temporary:
        if isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer):
            _write_codes(temporary, index, vectors)
        elif isinstance(index, faiss.IndexIVF) and _lists_at(index) is not None:
            _write_lists(temporary, index, vectors)
        else:
            _write_whole(temporary, index, vectors, kind)
        _check(temporary, path, vectors)


class VectorBlocks:
    """The vectors of shards or matrices as float32, one shard or block of a matrix at a time."""

    def __init__(self, shards: Sequence[Path | Matrix], rows: int, dim: int) -> None:
        self.shards, self.rows, self.dim = list(shards), rows, dim

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        for shard in self.shards:
            if isinstance(shard, Matrix):
                for start in range(0, shard.rows, _BLOCK):
                    yield np.ascontiguousarray(shard.read(start, min(start + _BLOCK, shard.rows)), np.float32)
                continue
            vectors: NDArray[np.float32] = np.load(shard)
            if vectors.ndim != 2 or vectors.shape[1] != self.dim or vectors.dtype != np.float32:
                raise ManifestMismatchError(f"{shard}: expected float32 vectors of {self.dim} numbers; remove it")
            yield np.ascontiguousarray(vectors)

    def __len__(self) -> int:
        return sum(-(-shard.rows // _BLOCK) if isinstance(shard, Matrix) else 1 for shard in self.shards)

    def sample(self, count: int) -> NDArray[np.float32]:
        """(count, D) vectors drawn uniformly from all shards; the same sample in every call."""
        if count >= self.rows:
            return np.concatenate(list(self))
        chosen = np.sort(np.random.default_rng(0).choice(self.rows, count, replace=False))
        parts, start = [], 0
        for vectors in self:
            stop = start + len(vectors)
            parts.append(vectors[chosen[(chosen >= start) & (chosen < stop)] - start])
            start = stop
        return np.concatenate(parts)


def _train(index: faiss.Index, vectors: VectorBlocks, kind: str, train_rows: int) -> None:
    sample = vectors.sample(train_rows)
    log.info("training %s on %d vectors", kind, len(sample))
    try:
        index.train(sample)
    except RuntimeError as error:
        found = f"index kind {kind!r} cannot be trained on {len(sample)} vectors"
        raise ConfigError(f"{found}: {reason_of(error)}") from error


def _header(index: faiss.Index, rows: int, end: int | None) -> bytearray:
    """The serialised empty index up to `end`, with the number of rows filled in."""
    # Bytes 0-3: faiss' code of the class, 4-7: dimension, 8-15: number of rows (little-endian).
    header = bytearray(faiss.serialize_index(index).tobytes()[:end])
    # faiss does not document its format: refuse to patch a header whose fields are not where they are expected.
    if int.from_bytes(header[4:8], "little") != index.d or any(header[_ROWS]):
        raise UpstreamError(f"faiss {faiss.__version__} writes an unknown header for {type(index).__name__}")
    header[_ROWS] = rows.to_bytes(8, "little")
    return header


def _write_codes(path: Path, index: faiss.Index, vectors: VectorBlocks) -> None:
    """Write the header, the number of code units and the codes; a unit is a float for `Flat`, else a byte."""
    flat = isinstance(index, faiss.IndexFlat)
    units = vectors.rows * (index.d if flat else index.sa_code_size())
    with path.open("wb") as stream:
        # The empty index ends with an 8-byte count of code units, 0; leave it out and write the real count.
        stream.write(_header(index, vectors.rows, -8))
        stream.write(units.to_bytes(8, "little"))
        for part in vectors:
            stream.write(part.data if flat else index.sa_encode(part).data)


def _lists_at(index: faiss.IndexIVF) -> int | None:
    """Offset of the inverted lists in the serialised empty index; None if their kind is not supported here."""
    data = faiss.serialize_index(index).tobytes()
    # An empty index stores its list sizes in the sparse form ("sprs"); a full one in the dense form ("full").
    tail = b"ilar" + index.nlist.to_bytes(8, "little") + index.code_size.to_bytes(8, "little") + b"sprs" + bytes(8)
    return len(data) - len(tail) if data.endswith(tail) else None


def _write_lists(path: Path, index: faiss.IndexIVF, vectors: VectorBlocks) -> None:
    """Write the lists in two passes: assign each vector to a list, then write its code and row number into place."""
    at = _lists_at(index)
    assert at is not None
    header = _header(index, vectors.rows, at)
    header += b"ilar" + index.nlist.to_bytes(8, "little") + index.code_size.to_bytes(8, "little")
    # Where a list begins depends on the sizes of all lists before it, so the first pass only assigns. The assignments
    # (4 bytes per vector) go to disk to keep memory at one shard.
    with path.with_name(path.name + ".lists").open("w+b") as assigned:
        try:
            sizes = np.zeros(index.nlist, np.int64)
            for part in tqdm(vectors, total=len(vectors), desc="assign", unit="shard", mininterval=1.0):
                lists = index.quantizer.search(part, 1)[1].ravel()
                sizes += np.bincount(lists, minlength=index.nlist)
                assigned.write(lists.astype(np.int32).data)
            assigned.seek(0)
            header += b"full" + index.nlist.to_bytes(8, "little") + sizes.tobytes()
            # Each list is its codes followed by its 8-byte row numbers.
            ends = len(header) + np.cumsum(sizes * (index.code_size + 8))
            codes_at = ends - sizes * (index.code_size + 8)
            rows_at = codes_at + sizes * index.code_size
            with path.open("wb") as stream:
                stream.write(header)
                stream.flush()
                # Writes go to scattered places: reserve the whole file first, so that a full disk is noticed now.
                os.posix_fallocate(stream.fileno(), 0, max(int(ends[-1]), 1))
                start = 0
                for part in tqdm(vectors, total=len(vectors), desc="write", unit="shard", mininterval=1.0):
                    lists = np.frombuffer(assigned.read(4 * len(part)), np.int32).astype(np.int64)
                    _place(stream.fileno(), index, part, lists, start, codes_at, rows_at)
                    start += len(part)
        finally:
            Path(assigned.name).unlink()


def _place(
    file: int,
    index: faiss.IndexIVF,
    vectors: NDArray[np.float32],
    lists: NDArray[np.int64],
    start: int,
    codes_at: NDArray[np.int64],
    rows_at: NDArray[np.int64],
) -> None:
    """Write one shard's codes and row numbers into their lists, and advance the lists' write positions."""
    codes = np.zeros((len(vectors), index.code_size), np.uint8)
    index.encode_vectors(len(vectors), faiss.swig_ptr(vectors), faiss.swig_ptr(lists), faiss.swig_ptr(codes))
    # A stable sort keeps the rows of a list in ascending order, as faiss writes them, and makes one write per list.
    order = np.argsort(lists, kind="stable")
    found, begins, counts = np.unique(lists[order], return_index=True, return_counts=True)
    numbers = (order + start).astype(np.int64)
    for number, begin, count in zip(found.tolist(), begins.tolist(), counts.tolist(), strict=True):
        chosen = slice(begin, begin + count)
        os.pwrite(file, codes[order[chosen]].data, int(codes_at[number]))
        os.pwrite(file, numbers[chosen].data, int(rows_at[number]))
        codes_at[number] += count * index.code_size
        rows_at[number] += count * 8


def _write_whole(path: Path, index: faiss.Index, vectors: VectorBlocks, kind: str) -> None:
    log.warning("an index of kind %s is built in memory, which must hold all of its %d rows", kind, vectors.rows)
    for part in tqdm(vectors, total=len(vectors), desc="add", unit="shard", mininterval=1.0):
        index.add(part)
    faiss.write_index(index, str(path))


def _check(written: Path, path: Path, vectors: VectorBlocks) -> None:
    index = open_index(written, mapped=True)
    first = next(iter(vectors))[:1]
    if index.ntotal != vectors.rows or index.d != vectors.dim:
        raise UpstreamError(f"{path}: faiss reads {index.ntotal} x {index.d}, expected {vectors.rows} x {vectors.dim}")
    # A search reads codes and row numbers at the offsets written above; garbage there shows as an impossible row.
    row = int(index.search(first, 1)[1][0, 0])
    if not -1 <= row < vectors.rows:
        raise UpstreamError(f"{path}: faiss finds row {row} of {vectors.rows} in what was written")


def open_index(path: Path, *, mapped: bool) -> faiss.Index:
    """Open faiss' index of a file, in memory or mapped (as far as the kind can be mapped: vectors, lists or codes).

    Raises:
        IndexMismatchError: not a faiss index.
    """
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        raise IndexMismatchError(f"{path}: faiss cannot read this index: {str(error).splitlines()[0]}") from error


def set_search_depth(index: faiss.Index, *, nprobe: int, ef_search: int) -> None:
    """Set the search effort of approximate kinds: lists of an IVF, candidates of an HNSW; exact kinds ignore it."""
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if isinstance(inner, faiss.IndexIVF):
        inner.nprobe = min(nprobe, inner.nlist)
    elif isinstance(inner, faiss.IndexHNSW):
        inner.hnsw.efSearch = ef_search


def stored_vectors(index: faiss.Index) -> Matrix:
    """The vectors of all rows, decoded from their codes; those of a mapped index are read from disk."""
    return Matrix(
        rows=int(index.ntotal), dim=int(index.d), read=lambda start, stop: index.reconstruct_n(start, stop - start)
    )
