"""Index files: each kind is what faiss itself would have written, opens mapped, and finds what it should."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from agentic_r_plugin.errors import ConfigError, ManifestMismatchError
from agentic_r_plugin.search.indexing.faiss_files import (
    empty_index,
    open_index,
    set_search_depth,
    stored_vectors,
    write_index,
)

ROWS, DIM = 3000, 16


@pytest.fixture(scope="module")
def vectors():
    found = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def shards(vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    paths = [folder / f"{start}.npy" for start in range(0, ROWS, 700)]
    for path, start in zip(paths, range(0, ROWS, 700), strict=True):
        np.save(path, vectors[start : start + 700])
    return paths


def written(path, shards, kind, **settings):
    write_index(path, shards, **{"kind": kind, "rows": ROWS, "dim": DIM, "train_rows": ROWS} | settings)
    return path


@pytest.mark.parametrize("kind", ["Flat", "SQ8", "SQfp16", "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ4x4", "IVF8_HNSW8,Flat"])
def test_a_streamed_file_is_byte_for_byte_what_faiss_would_write(kind, vectors, shards, tmp_path):
    expected = empty_index(kind, DIM)
    if not expected.is_trained:
        expected.train(vectors)
    expected.add(vectors)
    faiss.write_index(expected, str(tmp_path / "expected"))
    assert written(tmp_path / "found", shards, kind).read_bytes() == (tmp_path / "expected").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "found"]


@pytest.mark.parametrize("kind", ["Flat", "SQ8", "SQfp16", "IVF8,Flat", "IVF8,SQ8", "HNSW16", "IVF8,PQ4x4fs"])
@pytest.mark.parametrize("mapped", [False, True])
def test_every_kind_opens_and_finds_the_nearest(kind, mapped, vectors, shards, tmp_path):
    index = open_index(written(tmp_path / "x", shards, kind), mapped=mapped)
    set_search_depth(index, nprobe=100, ef_search=200)
    rows = index.search(vectors[:50], 10)[1]
    exact = np.argsort(-vectors[:50] @ vectors.T, axis=1)[:, :10]
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows, exact, strict=True)])
    assert recall > (0.3 if "PQ" in kind else 0.95), recall
    assert recall == 1.0 or kind not in ("Flat", "IVF8,Flat")


def test_training_on_a_sample_takes_rows_from_every_shard(shards, tmp_path):
    index = open_index(written(tmp_path / "x", shards, "IVF8,Flat", train_rows=400), mapped=False)
    assert index.ntotal == ROWS and index.nlist == 8
    sizes = [index.invlists.list_size(number) for number in range(8)]
    assert sum(sizes) == ROWS and max(sizes) < ROWS / 2


def test_impossible_kinds_and_shards_are_explained_and_leave_nothing(shards, tmp_path):
    with pytest.raises(ConfigError, match="index kind 'IVF8;PQ' is not possible for 16 dimensions"):
        written(tmp_path / "x", shards, "IVF8;PQ")
    with pytest.raises(ConfigError, match="cannot be trained on 100 vectors"):
        written(tmp_path / "x", shards, "IVF512,Flat", train_rows=100)
    with pytest.raises(ManifestMismatchError, match="expected float32 vectors of 8 numbers; remove it"):
        written(tmp_path / "x", shards, "Flat", dim=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["Flat", "SQfp16"])
def test_vectors_are_read_back_by_row(kind, vectors, shards, tmp_path):
    found = stored_vectors(open_index(written(tmp_path / "x", shards, kind), mapped=True))
    assert (found.rows, found.dim) == (ROWS, DIM)
    np.testing.assert_allclose(found.read(690, 720), vectors[690:720], atol=1e-3 if kind == "SQfp16" else 0)
