"""Our retrieval service against a plain FastAPI server that encodes and searches request by request.

    python tests/benchmarks/retrieval_service.py --index INDEX [--clients 64] [--requests 640] [--rounds 2]

INDEX is a folder built by `agentic-r index` (of any size; the retriever is loaded from it). Every client sends one
question-aware query at a time over a kept connection. Interleaved rounds of: the backend in this process in batches of
64; the plain server (sync endpoint, as in Search-R1; and async); our service with one worker. The service runs in a
separate process, the clients in another, all on the same processor. Prints a Markdown table of queries per second,
p50, p99, and the ratios; then the latency of cache hits with one client. Queries are all different, so nothing but the
last line profits from the cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

Sample = tuple[float, list[float]]
"""Seconds of a round, and of each request."""


def questions_of(index: Path, count: int, *, short: bool) -> list[tuple[str, str]]:
    """(question, query) made from the corpus: as long as an agent's, all different."""
    from agentic_r_plugin.search.corpus import Corpus
    from agentic_r_plugin.search.indexing.index import read_manifest

    with Corpus(read_manifest(index).corpus, table=index) as corpus:
        found = []
        for number in range(count):
            passage = corpus[number * 7919 % len(corpus)]
            words = passage.text.split()
            if short:
                found.append((words[0], f"{words[-1]} {number}"))
                continue
            found.append(
                (f"Which year was {' '.join(words[:14])} {number}?", f"{passage.title} {' '.join(words[14:19])}")
            )
        return found


# --- the plain server -------------------------------------------------------------------------------------------------


class Query(BaseModel):
    """Search-R1's request."""

    queries: list[str]
    topk: int = 3
    return_scores: bool = False


def plain_app(index: str, precision: str, *, asynchronous: bool) -> Any:
    """As people write it: model, index and corpus in memory, one request at a time."""
    import faiss
    from fastapi import FastAPI

    from agentic_r_plugin.search.corpus import Corpus
    from agentic_r_plugin.search.encoder import Retriever, autocast
    from agentic_r_plugin.search.indexing.index import read_manifest

    manifest = read_manifest(index)
    model = Retriever.load(manifest.retriever, preset=manifest.preset, precision=precision).model
    vectors = faiss.read_index(str(Path(index) / manifest.index_file))
    documents = [
        {"id": passage.id, "title": passage.title, "text": passage.text, "contents": passage.contents}
        for passage in Corpus(manifest.corpus)
    ]

    def answer(request: Query) -> dict[str, Any]:
        with autocast(model.device, precision):
            encoded = model.encode(request.queries, normalize_embeddings=True, show_progress_bar=False)
        scores, rows = vectors.search(encoded, request.topk)
        return {
            "result": [
                [{"document": documents[row], "score": float(score)} for row, score in zip(*pair, strict=True)]
                for pair in zip(rows, scores, strict=True)
            ]
        }

    app = FastAPI()
    if asynchronous:

        @app.post("/retrieve")
        async def retrieve_async(request: Query) -> dict[str, Any]:
            return answer(request)
    else:

        @app.post("/retrieve")
        def retrieve(request: Query) -> dict[str, Any]:
            return answer(request)

    return app


def serve_plain(index: str, precision: str, port: int, asynchronous: bool) -> None:
    import uvicorn

    uvicorn.run(
        plain_app(index, precision, asynchronous=asynchronous), port=port, log_level="warning", access_log=False
    )


# --- the clients ------------------------------------------------------------------------------------------------------


_HEAD = b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


async def _client(port: int, bodies: list[bytes], latencies: list[float]) -> None:
    """One client over one connection; bare sockets, so that the clients cost the processor little."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for body in bodies:
        started = time.perf_counter()
        writer.write(_HEAD % len(body) + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in answer.split(b"\r\n", 1)[0]:
            raise RuntimeError(f"request failed: {answer!r}")
        length = int(next(line for line in answer.lower().split(b"\r\n") if b"content-length" in line).split(b":")[1])
        await reader.readexactly(length)
        latencies.append(time.perf_counter() - started)
    writer.close()


async def _load(port: int, bodies: list[bytes], clients: int) -> Sample:
    latencies: list[float] = []
    started = time.perf_counter()
    await asyncio.gather(*(_client(port, bodies[at::clients], latencies) for at in range(clients)))
    return time.perf_counter() - started, latencies


def load(port: int, bodies: list[bytes], clients: int) -> Sample:
    """From a separate process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run_load, (port, bodies, clients))


def _run_load(port: int, bodies: list[bytes], clients: int) -> Sample:
    return asyncio.run(_load(port, bodies, clients))


def bodies_of(questions: list[tuple[str, str]], *, aware: bool) -> list[bytes]:
    """Ours takes question and query apart; the plain server takes what the retriever reads."""
    from agentic_r_plugin.query import retrieval_query

    if aware:
        items = [
            {"queries": [query], "questions": [question], "topk": 3, "return_scores": True}
            for question, query in questions
        ]
    else:
        items = [{"queries": [retrieval_query(*pair)], "topk": 3, "return_scores": True} for pair in questions]
    return [json.dumps(item).encode() for item in items]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started_plain(index: str, precision: str, asynchronous: bool) -> tuple[subprocess.Popen[bytes], int]:
    port = free_port()
    command = [sys.executable, __file__, "--plain", str(port), "--index", index, "--precision", precision]
    process = subprocess.Popen([*command, *(["--async"] if asynchronous else [])])
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return process, port
        except OSError:
            if process.poll() is not None:
                raise SystemExit("the plain server ended") from None
            time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=640, help="of a round")
    parser.add_argument("--plain-requests", type=int, default=128, help="of a round of the plain server, which is slow")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="auto", help="of the service; auto is its default")
    parser.add_argument("--plain-precision", default="float32", help="of the plain servers; float32 is their default")
    parser.add_argument("--batch", type=int, default=32, help="of the service: half the clients, so that HTTP overlaps")
    parser.add_argument("--short", action="store_true", help="two words for question and query, not an agent's")
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--async", dest="asynchronous", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        serve_plain(args.index, args.precision, args.plain, args.asynchronous)
        return
    measure(args)


def measure(args: argparse.Namespace) -> None:
    from agentic_r_plugin.search.base import SearchRequest
    from agentic_r_plugin.search.dense import FaissBackend
    from agentic_r_plugin.search.service.server import ServeConfig, running_service

    backend = FaissBackend(args.index, precision=args.precision)
    per_round = args.requests + 2 * args.plain_requests
    questions = questions_of(Path(args.index), per_round * args.rounds + 8, short=args.short)
    batch: list[float] = []
    samples: dict[str, list[Sample]] = {"plain FastAPI, sync": [], "plain FastAPI, async": [], "agentic-r serve": []}
    options = {"precision": args.precision}
    config = ServeConfig(index=args.index, port=0, options=options, cache_size=100_000, batch_size=args.batch)
    sync, sync_port = started_plain(args.index, args.plain_precision, False)
    later, later_port = started_plain(args.index, args.plain_precision, True)
    try:
        with running_service(config) as url:
            port = int(url.rpartition(":")[2])
            for other, aware in ((sync_port, False), (later_port, False), (port, True)):
                load(other, bodies_of(questions[-8:], aware=aware), 4)
            for turn in range(args.rounds):
                part = questions[turn * per_round : (turn + 1) * per_round]
                mine, rest = part[: args.requests], part[args.requests :]
                requests = [SearchRequest(query=query, question=question) for question, query in mine]
                started = time.perf_counter()
                for start in range(0, len(requests), args.clients):
                    backend.search(requests[start : start + args.clients], 3)
                batch.append(len(requests) / (time.perf_counter() - started))
                samples["agentic-r serve"].append(load(port, bodies_of(mine, aware=True), args.clients))
                for kind, other, at in (
                    ("plain FastAPI, sync", sync_port, 0),
                    ("plain FastAPI, async", later_port, args.plain_requests),
                ):
                    chosen = bodies_of(rest[at : at + args.plain_requests], aware=False)
                    samples[kind].append(load(other, chosen, args.clients))
            hits = load(port, bodies_of(questions[: args.requests], aware=True), 1)[1]
    finally:
        for process in (sync, later):
            process.terminate()
            process.wait()
    print_table(batch, samples, hits, args)


def print_table(
    batch: list[float], samples: dict[str, list[Sample]], hits: list[float], args: argparse.Namespace
) -> None:
    best = {kind: max(len(item[1]) / item[0] for item in found) for kind, found in samples.items()}
    ours = best["agentic-r serve"]
    print(
        f"\n{args.clients} clients, one query a request; precision {args.precision} in process and of the service, "
        f"{args.plain_precision} of the plain servers; {os.cpu_count()} cores for all, best of {args.rounds} rounds"
    )
    print("\n| | queries/s | p50 ms | p99 ms | ours is |\n|---|---|---|---|---|")
    print(
        f"| in process, batches of {args.clients} | {max(batch):.1f} | - | - | {100 * ours / max(batch):.0f} % of it |"
    )
    for kind, found in samples.items():
        latencies = 1000 * np.concatenate([item[1] for item in found])
        p50, p99 = np.percentile(latencies, [50, 99])
        ratio = "-" if kind == "agentic-r serve" else f"{ours / best[kind]:.1f} x"
        print(f"| {kind} | {best[kind]:.1f} | {p50:.0f} | {p99:.0f} | {ratio} |")
    p50, p99 = np.percentile(1000 * np.array(hits), [50, 99])
    print(f"\nCache hits, one client: p50 {p50:.2f} ms, p99 {p99:.2f} ms.")


if __name__ == "__main__":
    main()
