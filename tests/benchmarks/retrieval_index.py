"""Our index build against FlashRAG's, same model, precision, lengths and corpus, interleaved in one run.

    AGENTIC_R_DATA=DATA python tests/benchmarks/retrieval_index.py [--passages 2000] [--rounds 2]

Prints a Markdown table: passages per second from corpus file to index file, their ratio, the lowest cosine between the
two builders' vectors, how many of 100 questions get the same 20 passages, and the share of the machine's own matrix
multiplication that encoding reaches (useful floating point operations only: padding does not count). FlashRAG's batch
is 64, which is faster on a CPU than its default of 512.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever, resolve
from agentic_r_plugin.search.indexing.index import IndexConfig
from agentic_r_plugin.search.indexing.index import run as build_index
from agentic_r_plugin.store import read_lines


def matmul_peak(dtype: torch.dtype, size: int = 2048) -> float:
    """Best of five square products, in floating point operations per second."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def useful_flops(retriever: Retriever, corpus: Corpus) -> float:
    """Of one pass over the corpus: weights times tokens, and attention."""
    config = retriever.model[0].auto_model.config  # type: ignore[union-attr]
    width, layers, inner = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    weights = layers * (4 * width * width + 2 * width * inner)
    total = 0.0
    for passage in corpus:
        tokens = retriever.model.tokenizer(
            passage.contents, truncation=True, max_length=retriever.record.passage_max_length
        )
        length = len(tokens["input_ids"])
        total += 2 * weights * length + 4 * layers * width * length * length
    return total


def build_ours(corpus: Path, model: str, folder: Path, precision: str, max_length: int, device: str) -> float:
    started = time.perf_counter()
    build_index(
        IndexConfig(
            corpus=str(corpus), retriever=model, out=str(folder), precision=precision, max_length=max_length,
            preset="plain", device=device,
        )
    )  # fmt: skip
    return time.perf_counter() - started


def build_theirs(corpus: Path, model: str, folder: Path, max_length: int, batch_size: int) -> float:
    from flashrag.retriever.index_builder import Index_Builder

    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        Index_Builder(
            retrieval_method="minilm", model_path=model, corpus_path=str(corpus), save_dir=str(folder),
            max_length=max_length, batch_size=batch_size, use_fp16=False, pooling_method="mean", instruction="",
            faiss_type="Flat",
        ).build_index()  # fmt: skip
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=2000, help="drawn at random; 0: all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--flashrag-batch", type=int, default=64)
    args = parser.parse_args()
    if "AGENTIC_R_DATA" not in os.environ:
        parser.error("AGENTIC_R_DATA: expected the folder that holds hotpotqa/corpus.jsonl")
    data = Path(os.environ["AGENTIC_R_DATA"]) / "hotpotqa"
    model = resolve("builtin:minilm")
    lines = (data / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    if args.passages:
        lines = random.Random(0).sample(lines, args.passages)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        corpus.write_text("".join(lines), encoding="utf-8")
        seconds: dict[str, list[float]] = {"FlashRAG": [], "ours": [], "ours, two processes": [], "ours, bfloat16": []}
        for turn in range(args.rounds):
            theirs = folder / f"theirs-{turn}"
            seconds["FlashRAG"].append(build_theirs(corpus, model, theirs, args.max_length, args.flashrag_batch))
            for kind, precision, device in (
                ("ours", "float32", "cpu"),
                ("ours, two processes", "float32", "cpu,cpu"),
                ("ours, bfloat16", "bfloat16", "cpu"),
            ):
                out = folder / f"{kind}-{turn}"
                seconds[kind].append(build_ours(corpus, model, out, precision, args.max_length, device))
        retriever = Retriever.load(model, preset="plain", precision="float32", passage_max_length=args.max_length)
        flops = useful_flops(retriever, Corpus(corpus))
        peak = {torch.float32: matmul_peak(torch.float32), torch.bfloat16: matmul_peak(torch.bfloat16)}
        reference = faiss.read_index(str(folder / "theirs-0" / "minilm_Flat.index"))
        questions = [line["question"] for _, line in read_lines(data / "dev.jsonl")][:100]
        queries = retriever.encode_queries([SearchRequest(query=question) for question in questions])
        expected = reference.search(queries, 20)[1]
        print(f"\n{len(lines)} passages, best of {args.rounds} interleaved rounds, {torch.get_num_threads()} threads")
        print(
            "\n| builder | passages/s | ratio | share of matmul peak | lowest cosine | same top 20 |"
            "\n|---|---|---|---|---|---|"
        )
        for kind, times in seconds.items():
            best = min(times)
            top = peak[torch.bfloat16 if "bfloat16" in kind else torch.float32]
            cells = ["-", "-"]
            if kind != "FlashRAG":
                found = faiss.read_index(str(folder / f"{kind}-0" / "agentic_r_Flat.index"))
                ours, theirs_ = found.reconstruct_n(0, found.ntotal), reference.reconstruct_n(0, found.ntotal)
                rows = found.search(queries, 20)[1]
                same = np.mean([set(a) == set(b) for a, b in zip(rows, expected, strict=True)])
                cells = [f"{(ours * theirs_).sum(1).min():.6f}", f"{100 * same:.0f} %"]
            ratio = min(seconds["FlashRAG"]) / best
            row = [kind, f"{len(lines) / best:.1f}", f"{ratio:.2f}", f"{100 * flops / best / top:.0f} %", *cells]
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
