"""Milvus (milvus-lite, or a server) against faiss: same top 20, queries per second, memory.

    python tests/benchmarks/vector_engines.py --rows 13337 [--dim 384] [--vectors FILE.npy] [--uri server]

`--uri` is `lite`, `server` (one of the package `milvus`, started for each row of the table) or an address.

Vectors are clustered at random (unit length, 1 cluster per 100 rows), or those of a `.npy` file; queries are noisy
copies of rows. Every engine is a process that builds its index and answers batches of 64. Prints a Markdown table:
seconds of the build, the share of faiss Flat's top 20 that is found, queries per second in batches and one by one, and
the private and resident memory, while it answers, of the process that searches (`server`: the server; an address: the
client). faiss is given `--threads` threads; a server takes what it finds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.retrieval_memory import memory

TOPK, BATCH = 20, 64
Search = Callable[[np.ndarray], np.ndarray]


def make_vectors(rows: int, dim: int) -> np.ndarray:
    """(rows, dim) float32 of unit length, around rows / 100 centers."""
    draw = np.random.default_rng(0)
    centers = draw.standard_normal((max(1, rows // 100), dim), np.float32)
    vectors = np.empty((rows, dim), np.float32)
    for start in range(0, rows, 65_536):
        part = vectors[start : start + 65_536]
        part[:] = centers[draw.integers(len(centers), size=len(part))]
        part += 0.7 * draw.standard_normal(part.shape, np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def make_queries(vectors: np.ndarray, count: int) -> np.ndarray:
    draw = np.random.default_rng(1)
    found = vectors[draw.choice(len(vectors), count)] + 0.03 * draw.standard_normal(
        (count, vectors.shape[1]), np.float32
    )
    return np.ascontiguousarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def faiss_search(vectors: np.ndarray, kind: str, folder: Path, threads: int) -> Search:
    import faiss

    from agentic_r_plugin.search.indexing.faiss_files import Matrix, open_index, set_search_depth, write_index

    rows, dim = vectors.shape
    whole = Matrix(rows=rows, dim=dim, read=lambda start, stop: vectors[start:stop])
    write_index(folder / "index", [whole], kind=kind, rows=rows, dim=dim, train_rows=65_536)
    index = open_index(folder / "index", mapped=False)
    set_search_depth(index, nprobe=64, ef_search=128)
    faiss.omp_set_num_threads(threads)
    return lambda queries: index.search(queries, TOPK)[1]


def milvus_search(vectors: np.ndarray, kind: str, folder: Path, uri: str) -> Search:
    from agentic_r_plugin.search.indexing import milvus
    from agentic_r_plugin.search.indexing.faiss_files import Matrix
    from agentic_r_plugin.search.indexing.index import IndexManifest
    from agentic_r_plugin.storage.claim import Output

    rows, dim = vectors.shape
    empty: dict[str, str] = {}
    manifest = IndexManifest(
        method="benchmark", rows=rows, dim=dim, metric="inner_product", kind=kind, corpus="", corpus_fingerprint=kind,
        retriever="", retriever_fingerprint="", retriever_record={}, preset="auto", formulation_override=None,
        max_length_override=None, versions=empty,
    )  # fmt: skip
    params = {"M": 32, "efConstruction": 40} if kind == "HNSW" else {}  # as faiss' HNSW32
    settings = milvus.MilvusSettings(uri=uri, params=params, prefix="benchmark")
    manifest = milvus.placed(settings, manifest)
    whole = Matrix(rows=rows, dim=dim, read=lambda start, stop: vectors[start:stop])
    with Output(out=folder, made_from={}, done="manifest.json", folder=True).claim(resume=True) as held:
        held.begin()
        milvus.prepare(manifest, held, timeout_s=600)
        manifest = milvus.load(manifest, held, [whole], None, timeout_s=600)  # type: ignore[arg-type]  # no fields: no corpus is read
    collection = milvus.Collection(manifest, folder, timeout_s=600)
    collection.check()
    return lambda queries: collection.search(queries, TOPK)[1]


def measure(args: argparse.Namespace) -> None:
    """In a child: build, search, print figures, save the rows found."""
    vectors = np.load(args.vectors, mmap_mode="r")
    queries = np.load(f"{args.vectors}.queries.npy")
    engine, _, kind = args.engine.partition(" ")
    folder = Path(args.folder)
    with running_server(folder) if engine == "milvus" and args.uri == "server" else nullcontext() as server:
        measure_search(args, vectors, queries, engine, kind, server)


@contextmanager
def running_server(folder: Path) -> Iterator[Any]:
    """The Milvus of the package `milvus` (a `MilvusServer`), with its files next to the folder."""
    import milvus

    server = milvus.MilvusServer()
    server.set_base_dir(f"{folder}-server")
    server.start()
    try:
        yield server
    finally:
        server.stop()


def measure_search(
    args: argparse.Namespace, vectors: np.ndarray, queries: np.ndarray, engine: str, kind: str, server: Any
) -> None:
    """Of one engine; `server`: that of `running_server`, or None."""
    folder = Path(args.folder)
    uri = f"http://127.0.0.1:{server.listen_port}" if server else args.uri
    started = time.perf_counter()
    opened = (
        faiss_search(vectors, kind, folder, args.threads)
        if engine == "faiss"
        else milvus_search(vectors, kind, folder, uri)
    )
    build_s = time.perf_counter() - started
    opened(queries[:BATCH])
    started = time.perf_counter()
    found = [opened(queries[start : start + BATCH]) for start in range(0, len(queries), BATCH)]
    batched_s = time.perf_counter() - started
    started = time.perf_counter()
    for number in range(args.single):
        opened(queries[number : number + 1])
    single_s = time.perf_counter() - started
    now = memory(server.server_proc.pid if server else os.getpid())
    np.save(folder / "found.npy", np.concatenate(found))
    print(
        json.dumps(
            {
                "build_s": build_s,
                "batched": len(queries) / batched_s,
                "single": args.single / single_s,
                "private": now["RssAnon"],
                "resident": now["VmRSS"],
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=13_337)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--vectors", help="(rows, dim) float32 .npy in place of random ones")
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--single", type=int, default=32, help="queries that are also asked one by one")
    parser.add_argument("--engines", nargs="+", default=["faiss Flat", "faiss HNSW32", "milvus FLAT", "milvus HNSW"])
    parser.add_argument("--uri", default="lite")
    parser.add_argument("--threads", type=int, default=1, help="of faiss")
    parser.add_argument("--folder", help="where vectors and indexes go; default: a temporary folder")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        measure(args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        vectors = np.load(args.vectors) if args.vectors else make_vectors(args.rows, args.dim)
        rows, dim = vectors.shape
        np.save(folder / "vectors.npy", vectors)
        np.save(folder / "vectors.npy.queries.npy", make_queries(vectors, args.queries))
        del vectors
        print(f"{rows} rows of {dim} dimensions, {args.queries} queries\n")
        print("| engine | build s | same top 20 | queries/s, batches of 64 | one by one | private MB | resident MB |")
        print("|---|---|---|---|---|---|---|")
        exact = None
        for engine in args.engines:
            own = folder / engine.replace(" ", "-")
            own.mkdir()
            command = [
                sys.executable,
                __file__,
                "--engine",
                engine,
                "--vectors",
                str(folder / "vectors.npy"),
                "--folder",
            ]
            ended = subprocess.run(
                [*command, str(own), "--uri", args.uri, "--single", str(args.single), "--threads", str(args.threads)],
                stdout=subprocess.PIPE,
                check=True,
            )
            figures = json.loads(ended.stdout.splitlines()[-1])
            found = np.load(own / "found.npy")
            exact = found if exact is None else exact
            same = np.mean([len(set(a) & set(b)) / TOPK for a, b in zip(found.tolist(), exact.tolist(), strict=True)])
            print(
                f"| {engine} | {figures['build_s']:.1f} | {same:.2%} | {figures['batched']:.0f} "
                f"| {figures['single']:.0f} | {figures['private']:.0f} | {figures['resident']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
