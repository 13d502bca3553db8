"""Indexing with several workers, on a full disk, in other kinds: always the vectors one process would have written."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from agentic_r_plugin.errors import ConfigError, IndexMismatchError, RecordError, SearchError
from agentic_r_plugin.search import dense
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import PASSAGES, Corpus
from agentic_r_plugin.search.dense import FaissBackend, FaissGPUBackend, TorchBackend
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.search.indexing import index as indexes
from agentic_r_plugin.search.indexing import shards
from agentic_r_plugin.search.indexing.faiss_files import bytes_per_row
from agentic_r_plugin.search.indexing.index import IndexConfig, read_manifest
from agentic_r_plugin.search.indexing.index import run as build_index

NAME = "agentic_r_Flat.index"
REQUESTS = [SearchRequest(query=f"p{n} p{n + 1}") for n in range(12)]


def config_for(out, corpus, retriever, **settings):
    settings = {"precision": "float32", "shard_size": 16} | settings
    return IndexConfig(corpus=str(corpus), retriever=str(retriever), out=str(out), **settings)


def vectors_of(folder):
    return np.fromfile(folder / NAME, np.float32, offset=45).reshape(-1, 32)


@pytest.mark.parametrize("settings", [{"device": "cpu,cpu"}, {"ray_workers": 2}], ids=["processes", "ray"])
def test_several_workers_write_the_same_vectors(settings, tmp_path, corpus_file, model_folder, index_folder):
    build_index(config_for(tmp_path / "index", corpus_file, model_folder, **settings))
    np.testing.assert_allclose(vectors_of(tmp_path / "index"), vectors_of(index_folder), atol=1e-6)
    assert read_manifest(tmp_path / "index").fingerprint() == read_manifest(index_folder).fingerprint()


def test_a_cluster_of_one_slot(tmp_path, corpus_file, model_folder, index_folder, monkeypatch):
    """Entered, not started: its workers do not follow this process into other folders."""
    import ray

    (tmp_path / "workers" / "shards").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "workers")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        with pytest.raises(ConfigError, match=r"2 workers want 2 CPU in all, the Ray cluster has 1; lower ray_workers"):
            build_index(config_for(tmp_path / "small", corpus_file, model_folder, ray_workers=2))
        (tmp_path / "model").symlink_to(model_folder)
        (tmp_path / "corpus.jsonl").symlink_to(corpus_file)
        monkeypatch.chdir(tmp_path)
        build_index(config_for("index", "corpus.jsonl", "model", ray_workers=1))
        np.testing.assert_allclose(vectors_of(tmp_path / "index"), vectors_of(index_folder), atol=1e-6)
        elsewhere = shards.ShardJob(
            corpus=str(corpus_file), table=str(tmp_path / "index"), folder="shards",
            retriever=str(model_folder), retriever_fingerprint=Retriever.load(model_folder).fingerprint(), load={},
            shard_size=16, batch_size=8, max_batch_tokens=0,
        )  # fmt: skip
        with pytest.raises(ConfigError, match=r"0000000016\.npy: an actor .* on a disk that all machines share"):
            next(shards._on_ray(elsewhere, [16], shards.RayWorkers(count=1)))
        assert (tmp_path / "workers" / elsewhere.path(16)).is_file()
    finally:
        ray.shutdown()


def test_an_address_without_a_cluster_is_an_error(tmp_path, corpus_file, model_folder):
    with pytest.raises(ConfigError, match=r"ray_address='nonsense': no Ray cluster there"):
        build_index(config_for(tmp_path / "i", corpus_file, model_folder, ray_workers=1, ray_address="nonsense"))


def test_a_worker_that_dies_is_an_error(tmp_path, corpus_file, model_folder, monkeypatch):
    monkeypatch.setattr(shards, "_begin", os._exit)
    with pytest.raises(SearchError, match=r"an encoding worker \(devices cpu, cpu\) ended without an error message"):
        build_index(config_for(tmp_path / "index", corpus_file, model_folder, device="cpu,cpu"))
    assert not (tmp_path / "index" / "manifest.json").exists()


def test_a_worker_does_not_mix_in_a_retriever_that_was_changed_meanwhile(tmp_path, corpus_file, model_folder):
    job = shards.ShardJob(
        corpus=str(corpus_file), table=str(tmp_path), retriever=model_folder, retriever_fingerprint="0" * 16,
        load={}, folder=str(tmp_path), shard_size=16, batch_size=8, max_batch_tokens=0,
    )  # fmt: skip
    with pytest.raises(IndexMismatchError, match="was changed while the index was being built"):
        shards.ShardEncoder.open(job, "cpu")


FULL = """
import resource, sys
from agentic_r_plugin import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(cli.main(sys.argv[2:]))
"""


def test_a_full_disk_is_one_line_and_the_run_goes_on_afterwards(tmp_path, corpus_file, model_folder, index_folder):
    out = tmp_path / "index"
    arguments = ["index", "--corpus", corpus_file, "--retriever", model_folder, "--out", out, "--precision", "float32"]
    command = [sys.executable, "-c", FULL, "4000", *map(str, arguments), "--shard-size", "16", "--resume"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)  # a shard fits, the index does not
    assert ended.returncode == 1
    assert "no room to write (File too large); finished shards are kept" in ended.stderr
    assert sorted(path.name for path in (out / ".work").iterdir()) == [f"{n:010d}.npy" for n in (0, 16, 32)]
    assert not (out / NAME).exists() and not list(out.glob("*.tmp"))
    config = config_for(out, corpus_file, model_folder)
    build_index(config, resume=True)
    assert (out / NAME).read_bytes() == (index_folder / NAME).read_bytes()


def test_too_little_disk_is_said_before_anything_is_encoded(tmp_path, corpus_file, model_folder, monkeypatch):
    monkeypatch.setattr(indexes.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConfigError, match=r"needs up to 0\.0 GB of disk .* found 0\.0 GB free"):
        build_index(config_for(tmp_path / "index", corpus_file, model_folder))


def test_the_disk_that_an_index_needs_follows_its_kind(tmp_path, corpus_file, model_folder, monkeypatch):
    monkeypatch.setattr(indexes.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 7000})())
    build_index(config_for(tmp_path / "small", corpus_file, model_folder, kind="SQ8"))
    assert (tmp_path / "small" / "agentic_r_SQ8.index").stat().st_size >= 40 * bytes_per_row("SQ8", 32) == 40 * 32
    with pytest.raises(ConfigError, match="vectors as shards, then the index"):
        build_index(config_for(tmp_path / "large", corpus_file, model_folder))
    assert [bytes_per_row(kind, 32) for kind in ("Flat", "SQfp16", "IVF4,SQ8", "IVF4,PQ8", "HNSW8")] == [
        128, 64, 32 + 12, 8 + 12, 128,
    ]  # fmt: skip


def test_shards_of_an_unfinished_index_serve_another_kind(tmp_path, corpus_file, model_folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(indexes, "write_index", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_index(config_for(tmp_path / "index", corpus_file, model_folder))
    monkeypatch.setattr(Retriever, "encode_passages", lambda *_, **__: pytest.fail("encoded again"))
    build_index(config_for(tmp_path / "index", corpus_file, model_folder, kind="fp16"), resume=True)
    manifest = read_manifest(tmp_path / "index")
    assert (manifest.kind, manifest.index_file) == ("SQfp16", "agentic_r_SQfp16.index")


def test_exact_search_in_torch_finds_what_faiss_finds(tmp_path, index_folder, corpus_file, model_folder):
    expected = FaissBackend(index_folder, precision="float32").search(REQUESTS, 7)
    for block_rows in (5, 1000):
        found = TorchBackend(index_folder, precision="float32", block_rows=block_rows).search(REQUESTS, 7)
        assert [[hit.passage for hit in hits] for hits in found] == [[h.passage for h in hits] for hits in expected]
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose([h.score for h in ours], [h.score for h in theirs], atol=1e-6)
    half = tmp_path / "half"
    build_index(config_for(half, corpus_file, model_folder, kind="fp16"))
    found = TorchBackend(half, precision="float32").search(REQUESTS, 1)
    assert [hits[0].passage for hits in found] == [hits[0].passage for hits in expected]
    quantised = tmp_path / "quantised"
    build_index(config_for(quantised, corpus_file, model_folder, kind="SQ8"))
    assert FaissBackend(quantised).search(REQUESTS, 1)[0][0].passage == expected[0][0].passage
    with pytest.raises(ConfigError, match="needs an index of kind Flat or SQfp16, found SQ8"):
        TorchBackend(quantised)


def test_vectors_in_half_precision_rank_as_in_full():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(5000, 64, generator=generator) * 0.2 + torch.ones(64), dim=1)
    queries, device = vectors[:40] + 0.01 * torch.randn(40, 64, generator=generator), torch.device("cpu")
    expected = (queries @ vectors.T).topk(20, dim=1)
    alone = (queries.half() @ vectors.half().T).float().topk(20, dim=1)
    assert len(set(alone.indices[0].tolist()) & set(expected.indices[0].tolist())) < 20  # what rescoring is for
    for block_rows in (700, 10_000):
        scores, rows = dense._Part(100, 5100, device, block_rows, kept=vectors.half()).nearest(queries, 20)
        shared = [len(set(a) & set(b)) for a, b in zip((rows - 100).tolist(), expected.indices.tolist(), strict=True)]
        assert sum(shared) >= 0.99 * 20 * 40
        np.testing.assert_allclose(scores, expected.values, atol=1e-4)


def test_gpu_backends_say_what_they_lack(index_folder):
    with pytest.raises(ConfigError, match="needs faiss-gpu in place of faiss-cpu"):
        FaissGPUBackend(index_folder)
    with pytest.raises(ConfigError, match="device 'cuda:0': this torch finds no CUDA device"):
        TorchBackend(index_folder, search_devices="cuda:0")
    with pytest.raises(ConfigError, match="device 'gpu'"):
        shards.resolve_devices("gpu")


def test_a_packed_corpus_is_unpacked_once_next_to_the_index(tmp_path, corpus_file, model_folder, index_folder):
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(corpus_file.read_bytes()))
    out = tmp_path / "index"
    build_index(config_for(out, packed, model_folder))
    assert (out / NAME).read_bytes() == (index_folder / NAME).read_bytes()
    assert (out / PASSAGES).read_bytes() == corpus_file.read_bytes()
    backend = FaissBackend(out, precision="float32")
    assert backend.search(REQUESTS, 3) == FaissBackend(index_folder, precision="float32").search(REQUESTS, 3)


def test_a_saved_table_is_used_only_for_the_very_file_it_was_made_from(tmp_path, corpus_file, monkeypatch):
    file = tmp_path / "corpus.jsonl"
    file.write_bytes(corpus_file.read_bytes())
    with Corpus(file) as corpus:
        corpus.save_table(tmp_path)
        fingerprint = corpus.fingerprint()
    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "_scan", lambda *_: pytest.fail("read again"))
        again = Corpus(file, table=tmp_path)
        assert (again.fingerprint(), len(again), again.row_of("d7"), again[39].id) == (fingerprint, 40, 7, "d39")
    file.write_text(file.read_text() + json.dumps({"id": "new", "contents": "x"}) + "\n")
    changed = Corpus(file, table=tmp_path)
    assert len(changed) == 41 and changed.fingerprint() != fingerprint


def test_contents_changed_behind_size_and_date_are_seen(tmp_path, corpus_file):
    file = tmp_path / "corpus.jsonl"
    file.write_bytes(corpus_file.read_bytes())
    with Corpus(file) as corpus:
        corpus.save_table(tmp_path)
        fingerprint = corpus.fingerprint()
    status = file.stat()
    file.write_bytes(file.read_bytes().replace(b"p1 ", b"p2 ", 1))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert Corpus(file, table=tmp_path).fingerprint() != fingerprint


def test_a_row_that_is_missing_is_an_error_by_name_whether_before_or_after_opening(tmp_path, corpus_file, model_folder):
    file = tmp_path / "corpus.jsonl"
    file.write_bytes(corpus_file.read_bytes())
    out = tmp_path / "index"
    build_index(config_for(out, file, model_folder))
    backend = FaissBackend(out, precision="float32")
    lines = file.read_bytes().splitlines(keepends=True)
    with file.open("r+b") as stream:
        stream.truncate(len(b"".join(lines[:20])))
    with pytest.raises(RecordError, match=r"corpus\.jsonl:\d+: no passage is where row \d+ was; the file has"):
        backend.search(REQUESTS, 40)
    with pytest.raises(IndexMismatchError, match=r"40 passages\) does not belong to corpus .* 20 passages\)"):
        FaissBackend(out)
