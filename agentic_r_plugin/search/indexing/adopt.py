"""Takes over an index or vectors that somebody else encoded: `agentic-r index --adopt FILE`.

| file | becomes |
|---|---|
| a faiss index (Flat, SQ, PQ; HNSW and IVF over these) | a symbolic link to it; nothing is copied |
| byte parts of one file (`part_aa`, `part_ab`), in order | one file, joined as by `cat` |
| several whole indexes | one index; only kinds whose rows can be appended |
| `.npy`, `.safetensors`, `.pkl` (Tevatron: vectors and ids) | an index of the kind that is asked for |

Row i must belong to line i of the corpus (a Tevatron pickle names its rows). A sample of passages is encoded and
compared with the stored vectors; an index that does not agree is refused, with the settings that would agree.

Shapes: N sampled passages, D dimensions.
"""

from __future__ import annotations

import glob
import logging
import pickle
import re
import shutil
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.exhaustive_search import knn_ground_truth
from numpy.typing import NDArray

from agentic_r_plugin.errors import ConfigError, IndexMismatchError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search import families
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import TITLE_FORMS, Retriever
from agentic_r_plugin.search.indexing.faiss_files import (
    ALIASES,
    Matrix,
    VectorBlocks,
    empty_index,
    kind_of,
    open_index,
    reason_of,
    stored_vectors,
    write_index,
)
from agentic_r_plugin.store import atomic_path

log = logging.getLogger(__name__)

Vectors = NDArray[np.float32]

SAMPLE = 64
"""Passages that are encoded and compared."""

_AGREE = 0.1
"""Largest `_Sample.excess` of a vector that agrees, in radians (a cosine of 0.995)."""

_LENGTHS = (64, 128, 156, 180, 200, 256, 300, 350, 384, 512, 1024, 2048, 4096, 8192)
"""Lengths that others cut passages to, tried when vectors do not agree."""

_TRIED = 8
"""Passages of the sample that other settings are tried on."""

_MATRICES, _PICKLES = (".npy", ".safetensors"), (".pkl", ".pickle")
_METRICS = {faiss.METRIC_INNER_PRODUCT: "inner_product", faiss.METRIC_L2: "l2"}


class FaissSource:
    """A faiss index.

    Args:
        index: the index of `path`, or one made from several files, which is written.
        copy: whether `path` is a copy of ours, which is moved; else it is linked to.

    Attributes:
        metric, written_metric: of the stored index, and of the index file that `write` makes.
    """

    def __init__(self, index: faiss.Index, path: Path | None, *, name: str, copy: bool = False) -> None:
        self.index, self.path, self.name, self.copy = index, path, name, copy
        self.rows, self.dim, self.kind = int(index.ntotal), int(index.d), kind_of(index, name)
        if (metric := index.metric_type) not in _METRICS:
            raise IndexMismatchError(f"{name}: expected inner products or L2 distances, found metric {metric} of faiss")
        self.metric = self.written_metric = _METRICS[metric]

    def stored(self, rows: Sequence[int]) -> Vectors:
        """(N, D) vectors of these rows."""
        try:
            # An IVF can look up a row by its number only with a direct map.
            if ivf := faiss.try_extract_index_ivf(self.index):
                ivf.make_direct_map()
            return np.stack([self.index.reconstruct(row) for row in rows])
        except RuntimeError as error:
            found = f"{self.name}: faiss cannot read single rows of this index"
            raise IndexMismatchError(f"{found}: {reason_of(error)}") from error

    def coded(self, vectors_ND: Vectors) -> Vectors:
        """(N, D) vectors as the index would store them."""
        # A graph holds its vectors in another index.
        index = faiss.downcast_index(self.index.storage) if isinstance(self.index, faiss.IndexHNSW) else self.index
        try:
            return index.sa_decode(index.sa_encode(vectors_ND))
        except RuntimeError as error:
            found = f"{self.name}: faiss cannot encode for kind {self.kind}"
            raise IndexMismatchError(f"{found}: {reason_of(error)}") from error

    def nearest(self, vectors_ND: Vectors) -> list[int]:
        """The nearest row of each vector."""
        return self.index.search(vectors_ND, 1)[1][:, 0].tolist()

    def write(self, path: Path, train_rows: int) -> None:
        """Make the index file."""
        # If this is the adopted file itself, `unlink` below would delete the original.
        if self.path is not None and path.exists() and path.samefile(self.path):
            return
        path.unlink(missing_ok=True)  # left by a process that was killed
        if self.path is None:
            with atomic_path(path) as temporary:
                faiss.write_index(self.index, str(temporary))
        elif self.copy:
            self.path.replace(path)
        else:
            path.symlink_to(self.path.resolve())

    def matrices(self) -> list[Matrix]:
        """The vectors of all rows, as stored."""
        return [stored_vectors(self.index)]


class MatrixSource:
    """Vectors in files of matrices, from which an index of `kind` is built; methods as of `FaissSource`."""

    def __init__(self, parts: Sequence[Matrix], kind: str, *, name: str, metric: str = "inner_product") -> None:
        self.parts, self.kind, self.name, self.metric = list(parts), ALIASES.get(kind, kind), name, metric
        self.rows, self.dim, self.written_metric = sum(part.rows for part in parts), parts[0].dim, "inner_product"
        if any(part.dim != self.dim for part in parts):
            raise IndexMismatchError(f"{name}: the files hold vectors of different dimensions")
        empty_index(self.kind, self.dim)

    def stored(self, rows: Sequence[int]) -> Vectors:
        """See `FaissSource`."""
        starts = list(accumulate((part.rows for part in self.parts), initial=0))
        places = [(row, bisect_right(starts, row) - 1) for row in rows]
        found = [self.parts[part].read(row - starts[part], row - starts[part] + 1)[0] for row, part in places]
        return np.stack(found).astype(np.float32)

    def coded(self, vectors_ND: Vectors) -> Vectors:
        """See `FaissSource`."""
        return vectors_ND

    def nearest(self, vectors_ND: Vectors) -> list[int]:
        """See `FaissSource`."""
        blocks = VectorBlocks(self.parts, self.rows, self.dim)
        return knn_ground_truth(vectors_ND, blocks, 1, faiss.METRIC_INNER_PRODUCT)[1][:, 0].tolist()

    def write(self, path: Path, train_rows: int) -> None:
        """See `FaissSource`."""
        write_index(path, self.parts, kind=self.kind, rows=self.rows, dim=self.dim, train_rows=train_rows)

    def matrices(self) -> list[Matrix]:
        """See `FaissSource`."""
        return self.parts


Source = FaissSource | MatrixSource
"""Stored vectors, one per line of the corpus, in the form in which they were found."""


def files_of(names: Sequence[str]) -> list[Path]:
    """The files that paths and patterns name, in the order given; those of one pattern with numbers in their order.

    Raises:
        ConfigError: no such file, or a folder.
    """
    found: list[Path] = []
    for name in names:
        matches = [name] if Path(name).exists() else glob.glob(name)  # noqa: PTH207 (absolute patterns, too)
        if not matches:
            raise ConfigError(f"adopt: no such file: {name}")
        found += sorted(
            map(Path, matches), key=lambda path: [(text, int(n or 0)) for text, n in _PARTS.findall(str(path))]
        )
    if folder := next((path for path in found if path.is_dir()), None):
        raise ConfigError(f"adopt: {folder} is a folder; expected files of faiss, .npy, .safetensors or .pkl")
    return found


_PARTS = re.compile(r"(\D+|^)(\d*)")


def open_source(paths: Sequence[Path], kind: str, corpus: Corpus, work: Path, *, allow_pickle: bool) -> Source:
    """Open what is to be adopted.

    Args:
        kind: of the index to build from a matrix; a faiss index has its own.
        work: folder for parts that must be joined.
        allow_pickle: whether pickles may be read, which can run any code.

    Raises:
        ConfigError: a pickle without `allow_pickle`, or another kind than that of the index.
        IndexMismatchError: not an index or matrix that can be adopted.
    """
    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    if any(path.suffix in _PICKLES for path in paths):
        if not allow_pickle:
            raise ConfigError(f"{name}: reading a pickle runs code that it holds; allow_pickle=true allows that")
        return MatrixSource([_pickled(paths, corpus)], kind, name=name)
    if any(path.suffix in _MATRICES for path in paths):
        return MatrixSource([_matrix(path) for path in paths], kind, name=name)
    source = _faiss_source(paths, name, work)
    if (asked := ALIASES.get(kind, kind)) not in ("Flat", source.kind):
        raise ConfigError(f"{name} is of kind {source.kind}, which kind={asked} cannot change; leave kind out")
    return source


def _faiss_source(paths: Sequence[Path], name: str, work: Path) -> Source:
    try:
        indexes = [open_index(path, mapped=True) for path in paths]
    except IndexMismatchError:
        if len(paths) == 1:
            raise
        # Parts of one file are not indexes by themselves, so they are joined.
        joined = work / "joined.index"
        with joined.open("wb") as stream:
            for path in paths:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, stream, 1 << 24)
        try:
            index = open_index(joined, mapped=True)
        except IndexMismatchError as error:
            raise IndexMismatchError(f"{name}, joined in this order: {error}") from error
        return FaissSource(index, joined, name=name, copy=True)
    if len(paths) == 1:
        return FaissSource(indexes[0], paths[0], name=name)
    kinds = [(kind_of(index, str(path)), index.metric_type) for index, path in zip(indexes, paths, strict=True)]
    if len(set(kinds)) > 1:
        raise IndexMismatchError(f"{name}: expected parts of one kind and metric, found {sorted(set(kinds))}")
    if kinds[0][0] in ("Flat", "SQfp16"):
        # These kinds are decoded and encoded again without loss, so the parts are copied block by block.
        parts = [stored_vectors(index) for index in indexes]
        return MatrixSource(parts, kinds[0][0], name=name, metric=_METRICS.get(kinds[0][1], "other"))
    if not all(map(faiss.try_extract_index_ivf, indexes)):
        raise IndexMismatchError(f"{name}: graphs of several indexes cannot be joined; adopt their vectors instead")
    return FaissSource(_merged([open_index(path, mapped=False) for path in paths], name), None, name=name)


def _merged(indexes: list[faiss.Index], name: str) -> faiss.Index:
    """One IVF index from several with the same lists, in memory."""
    ivfs: list[Any] = [faiss.try_extract_index_ivf(index) for index in indexes]
    centroids = [ivf.quantizer.reconstruct_n(0, ivf.nlist) for ivf in ivfs]
    if not all(np.array_equal(centroids[0], other) for other in centroids[1:]):
        raise IndexMismatchError(f"{name}: the parts were trained apart: their lists have different centroids")
    first = indexes[0]
    for other in indexes[1:]:
        # The rows of this part are numbered after those before it.
        first.merge_from(other, first.ntotal)
    return first


def _matrix(path: Path) -> Matrix:
    """The matrix of a `.npy` or `.safetensors` file, read from disk when it is needed."""
    try:
        if path.suffix == ".npy":
            found = np.load(path, mmap_mode="r")
            _require_matrix(path, found.shape, found.dtype.kind == "f")
            return Matrix(rows=found.shape[0], dim=found.shape[1], read=lambda start, stop: found[start:stop])
        from safetensors import SafetensorError, safe_open

        try:
            tensors = safe_open(str(path), framework="pt")
            names = [name for name in tensors.keys() if len(tensors.get_slice(name).get_shape()) == 2]  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        if len(names) != 1:
            raise IndexMismatchError(f"{path}: expected one matrix, found {len(names)}: {', '.join(names)}")
        part = tensors.get_slice(names[0])
        _require_matrix(path, tuple(part.get_shape()), part.get_dtype() in ("F16", "BF16", "F32", "F64"))
        rows, dim = part.get_shape()
        return Matrix(rows=rows, dim=dim, read=lambda start, stop: part[start:stop].float().numpy())
    except (ValueError, OSError) as error:
        raise IndexMismatchError(f"{path}: not a whole {path.suffix} file: {error}") from error


def _require_matrix(path: Path, shape: tuple[int, ...], floating: bool) -> None:
    if len(shape) != 2 or not floating:
        raise IndexMismatchError(f"{path}: expected a matrix of floats (rows, dimension), found shape {shape}")


def _pickled(paths: Sequence[Path], corpus: Corpus) -> Matrix:
    """The vectors of Tevatron's pickles `(matrix, ids)`, in the order of the corpus."""
    parts: list[NDArray[Any]] = []
    ids: list[str] = []
    for path in paths:
        try:
            with path.open("rb") as stream:
                vectors, names = pickle.load(stream)
            vectors = np.asarray(vectors)
            if len(vectors) != len(names):
                raise ValueError(f"{len(vectors)} vectors and {len(names)} ids")
        except Exception as error:  # unpickling may raise anything
            raise IndexMismatchError(f"{path}: expected a pickle of (vectors, ids): {error}") from error
        _require_matrix(path, vectors.shape, vectors.dtype.kind == "f")
        parts.append(vectors)
        ids += map(str, names)
    place = {name: number for number, name in enumerate(ids)}
    if len(place) != len(ids) or len(ids) != len(corpus):
        raise IndexMismatchError(
            f"{paths[0]}: expected a vector for each of the {len(corpus)} passages of {corpus.path}, found {len(ids)} "
            f"({len(place)} different ids)"
        )
    order = np.array([place.get(passage.id, -1) for passage in corpus])
    if (order < 0).any():
        missing = corpus[int(np.argmin(order))].id
        raise IndexMismatchError(f"{paths[0]}: no vector for passage {missing!r} of {corpus.path}")
    if len(dims := {part.shape[1] for part in parts}) > 1:
        raise IndexMismatchError(f"{paths[0]}: the files hold vectors of different dimensions: {sorted(dims)}")
    vectors = np.concatenate(parts)
    return Matrix(rows=len(ids), dim=vectors.shape[1], read=lambda start, stop: vectors[order[start:stop]])


# --- Does it belong? --------------------------------------------------------------------------------------------------


def require_agreement(source: Source, corpus: Corpus, retriever: Retriever, title_form: str, seed: int) -> None:
    """Refuse stored vectors that are not those of the corpus' passages.

    Raises:
        IndexMismatchError: another number of rows, dimension or metric, or vectors that differ; with what would agree.
    """
    if source.rows != len(corpus):
        raise IndexMismatchError(
            f"{source.name} holds {source.rows} vectors, and corpus {corpus.path} {len(corpus)} passages; "
            "row i of an index must belong to line i of the corpus"
        )
    if source.dim != retriever.dim:
        raise IndexMismatchError(
            f"{source.name} holds vectors of {source.dim} dimensions, and retriever {retriever.source} gives "
            f"{retriever.dim}: it was made with another model"
        )
    drawn = np.random.default_rng(seed).choice(source.rows, min(SAMPLE, source.rows), replace=False)
    rows = sorted({0, source.rows - 1, *drawn.tolist()})
    sample = _Sample(source, rows, [corpus[row] for row in rows])
    own = retriever.encode_passages(sample.passages, title_form=title_form)
    if not (np.isfinite(sample.stored).all() and np.isfinite(own).all()):
        raise IndexMismatchError(
            f"{source.name}: vectors that are not finite numbers, in the index or of the retriever"
        )
    excess = sample.excess(own)
    if excess.max() > _AGREE:
        worst = int(excess.argmax())
        raise IndexMismatchError(
            f"{source.name}: {int((excess > _AGREE).sum())} of {len(rows)} sampled vectors are not those of their "
            f"passages in {corpus.path} (row {rows[worst]}, passage {sample.passages[worst].id!r}: cosine "
            f"{_cosines(sample.stored, own)[worst]:.3f}, expected {_cosines(source.coded(own), own)[worst]:.3f}); "
            f"{_way_out(sample, retriever, title_form, own)}"
        )
    # The angles above do not depend on the vectors' lengths, but inner products do.
    lengths = np.linalg.norm(sample.stored, axis=1) / np.linalg.norm(source.coded(own), axis=1).clip(1e-9)
    if np.abs(lengths - 1).max() > 0.05:
        raise IndexMismatchError(
            f"{source.name}: the stored vectors point where they should, but have {np.median(lengths):.3f} times the "
            f"length that retriever {retriever.source} gives (normalize={retriever.record.normalize}), so inner "
            "products would rank differently"
        )
    # L2 distances and inner products give the same ranking only among vectors of equal length.
    if source.metric != "inner_product" and np.abs(np.linalg.norm(own, axis=1) - 1).max() > 0.01:
        raise IndexMismatchError(
            f"{source.name} compares by metric {source.metric}, and retriever {retriever.source} by inner products of "
            "vectors that are not of length 1: the two rank differently"
        )
    log.warning(
        "%d sampled vectors agree with their passages; lowest cosine %.4f", len(rows),
        _cosines(sample.stored, own).min(),
    )  # fmt: skip


class _Sample:
    """Sampled passages and their stored vectors."""

    def __init__(self, source: Source, rows: list[int], passages: list[Passage]) -> None:
        self.source, self.rows, self.passages, self.stored = source, rows, passages, source.stored(rows)

    def excess(self, own_ND: Vectors, places: Sequence[int] | None = None) -> NDArray[np.float64]:
        """(N,) angle in radians between stored vector and passage vector, minus that between the latter and its code.

        A code of few bits differs from its vector; the right vector's code differs as much, so its excess is near 0.
        """
        stored = self.stored if places is None else self.stored[places]
        return np.arccos(_cosines(stored, own_ND)) - np.arccos(_cosines(self.source.coded(own_ND), own_ND))


def _cosines(a_ND: Vectors, b_ND: Vectors) -> NDArray[np.float64]:
    norms = (np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1)).clip(1e-12)
    return np.clip((a_ND.astype(np.float64) * b_ND).sum(1) / norms, -1, 1)


def _way_out(sample: _Sample, retriever: Retriever, title_form: str, own: Vectors) -> str:
    """Settings with which the sample agrees, found on its shortest and longest passages; or what else may be wrong.

    Changes the retriever's model.
    """
    record, model = retriever.record, retriever.model
    given: dict[str, Any] = {
        "title_form": title_form,
        "passage_prompt": record.passage_prompt,
        "pooling": record.pooling,
        "max_length": record.passage_max_length,
    }
    order = np.argsort([len(passage.contents) for passage in sample.passages])
    longest = families.longest_text(model) or max(_LENGTHS)
    poolings = families.POOLINGS if record.pooling in families.POOLINGS else (record.pooling,)
    prompts = [family.passage_prompt for family in families.FAMILIES.values()]

    def worst(use: dict[str, Any], places: NDArray[np.intp]) -> float:
        if use["pooling"] != families.pooling_of(model, retriever.source):
            families.set_pooling(model, use["pooling"], retriever.source, asked=True)
        changed = replace(
            record, passage_prompt=use["passage_prompt"], pooling=use["pooling"], passage_max_length=use["max_length"]
        )
        try:
            encoder = Retriever(model, changed, precision=retriever.precision, source=retriever.source)
        except ConfigError:  # the prefix leaves no room for the text
            return float("inf")
        vectors = encoder.encode_passages([sample.passages[at] for at in places], title_form=use["title_form"])
        return float(sample.excess(vectors, places.tolist()).max())

    forms = list(
        product(
            dict.fromkeys([title_form, *TITLE_FORMS]),
            dict.fromkeys([record.passage_prompt, *prompts]),
            dict.fromkeys([record.pooling, *poolings]),
        )
    )
    lengths = dict.fromkeys([record.passage_max_length, *(length for length in _LENGTHS if length <= longest)])

    def best_form(use: dict[str, Any]) -> dict[str, Any]:
        uses = (use | {"title_form": form, "passage_prompt": prompt, "pooling": pool} for form, prompt, pool in forms)
        return min(uses, key=lambda use: worst(use, order[:_TRIED]))

    def best_length(use: dict[str, Any]) -> dict[str, Any]:
        return min((use | {"max_length": length} for length in lengths), key=lambda use: worst(use, order[-_TRIED:]))

    # Short passages show the form whatever the length, unless all passages were cut: then the length comes first.
    for first, second in ((best_form, best_length), (best_length, best_form)):
        best = second(first(given))
        if worst(best, np.arange(len(order))) <= _AGREE:
            changes = " ".join(f"{name}={value!r}" for name, value in best.items() if value != given[name])
            return f"all of them agree with {changes}"
    # Only a few rows are looked up: the search covers all stored vectors.
    found = zip(sample.rows, sample.source.nearest(own[:_TRIED]), strict=False)
    moved = [f"line {row} is nearest to row {other}" for row, other in found if row != other][:3]
    return (
        "no prefix, pooling, length or title form that was tried agrees, so it was made with another model or from "
        f"another corpus or order of lines{' (' + ', '.join(moved) + ', counted from 0)' if moved else ''}"
    )
