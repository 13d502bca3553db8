"""Seconds and peak memory of conversions and adoption at 10^5 and 10^6 rows, each in a separate process.

    python tests/benchmarks/files_scale.py [--sizes 100000 1000000] [--folder DIR]
    python tests/benchmarks/files_scale.py --adopt CORPUS [--copies 75] [--retriever builtin:minilm]

The first form makes articles, questions, and a JSON list of questions with contexts (ten paragraphs each), and converts
them. The second encodes a corpus, adopts its vectors (as a matrix, and as an index of faiss), and then adopts an index
of that corpus repeated COPIES times under other ids: the vector of each row is that of its text, so the
sample agrees as with a real corpus. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.benchmarks.retrieval_memory import Watched, command

WORDS = [f"word{number}" for number in range(5000)]


def text(draw: random.Random, words: int = 60) -> str:
    """Sentences of fifteen made-up words."""
    return " ".join(" ".join(draw.choices(WORDS, k=15)) + "." for _ in range(words // 15))


def write_articles(file: Path, rows: int) -> None:
    """Articles of one passage."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for row in range(rows):
            stream.write(json.dumps({"id": str(row), "title": f"Title {row}", "text": text(draw)}) + "\n")


def write_questions(file: Path, rows: int) -> None:
    """Rows of Search-R1's hub copies, whose ids begin again in the second set."""
    with file.open("w", encoding="utf-8") as stream:
        for row in range(rows):
            source, number = ("nq", row) if row < rows // 2 else ("hotpotqa", row - rows // 2)
            place = {"split": "train", "index": number}
            values = {"id": f"train_{number}", "question": f"Who is {row}?", "golden_answers": [str(row)]}
            stream.write(json.dumps(values | {"data_source": source, "extra_info": place}) + "\n")


def write_contexts(file: Path, rows: int) -> None:
    """HotpotQA's original form, one JSON list, with `rows` different paragraphs."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for start in range(0, rows, 10):
            context = [[f"Title {row}", [text(draw)]] for row in range(start, start + 10)]
            row = {"_id": f"q{start}", "question": "Who?", "answer": "x", "context": context,
                   "supporting_facts": [[context[0][0], 0]]}  # fmt: skip
            stream.write(("[" if not start else ", ") + json.dumps(row))
        stream.write("]")


CONVERSIONS = {
    "articles": (write_articles, "corpus", "jsonl"),
    "contexts": (write_contexts, "corpus", "json"),
    "questions": (write_questions, "questions", "jsonl"),
}


def measured(arguments: list[str]) -> tuple[float, float, float, float]:
    """(seconds, seconds of processors, peak private MB, peak resident MB) of a command."""
    started, before = time.perf_counter(), cpu_seconds()
    watched = Watched(command(*arguments))
    watched.wait()
    return time.perf_counter() - started, cpu_seconds() - before, watched.peak_private, watched.peak_resident


def cpu_seconds() -> float:
    """Seconds of processors of all children that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def convert(folder: Path, sizes: list[int], kinds: list[str]) -> None:
    """Print the table of the conversions."""
    print("| `convert` | rows | seconds | CPU seconds | peak private MB | peak resident MB |")
    print("|---|---|---|---|---|---|")
    for name, (write, kind, suffix) in ((name, CONVERSIONS[name]) for name in kinds):
        for rows in sizes:
            file, out = folder / f"{name}.{suffix}", folder / "out.jsonl"
            write(file, rows)
            spent = measured(["convert", kind, "--in", str(file), "--out", str(out)])
            cells = " | ".join(f"{value:.0f}" for value in spent)
            print(f"| {kind}, {name} | {rows:,} | {cells} |", flush=True)
            for made in folder.glob("out.jsonl*"):
                made.unlink()
            file.unlink()


def adopt(folder: Path, corpus: Path, copies: int, retriever: str) -> None:
    """Print the table of encoding and adoption."""
    import faiss

    from agentic_r_plugin.search.indexing.faiss_files import open_index, stored_vectors, write_index
    from agentic_r_plugin.search.indexing.index import read_manifest

    def row(what: str, rows: int, spent: tuple[float, float, float, float]) -> None:
        print(f"| {what} | {rows:,} | {' | '.join(f'{value:.0f}' for value in spent)} |", flush=True)

    print("| | rows | seconds | CPU seconds | peak private MB | peak resident MB |\n|---|---|---|---|---|---|")
    given = ["index", "--retriever", retriever, "--device", "cpu"]
    encoded = folder / "encoded"
    spent = measured([*given, "--corpus", str(corpus), "--out", str(encoded)])
    manifest = read_manifest(encoded)
    row("encoding", manifest.rows, spent)
    part = stored_vectors(open_index(encoded / manifest.index_file, mapped=True))
    vectors = part.read(0, manifest.rows)
    np.save(folder / "vectors.npy", vectors)
    graph = faiss.IndexHNSWFlat(manifest.dim, 32, faiss.METRIC_INNER_PRODUCT)
    graph.add(vectors)
    faiss.write_index(graph, str(folder / "hnsw.index"))
    files = {"Flat": encoded / manifest.index_file, "HNSW32": folder / "hnsw.index", "npy": folder / "vectors.npy"}
    for name, file in files.items():
        adopted = [*given, "--corpus", str(corpus), "--out", str(folder / name), "--adopt", str(file)]
        row(f"adoption, {name}", manifest.rows, measured(adopted))
    many = folder / "many.jsonl"
    lines = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    with many.open("w", encoding="utf-8") as stream:
        for copy in range(copies):
            stream.writelines(json.dumps(line | {"id": f"{copy}-{line['id']}"}) + "\n" for line in lines)
    rows = copies * manifest.rows
    write_index(folder / "many.index", [part] * copies, kind="Flat", rows=rows, dim=manifest.dim, train_rows=1)
    adopted = [*given, "--corpus", str(many), "--out", str(folder / "many"), "--adopt", str(folder / "many.index")]
    row("adoption, Flat", rows, measured(adopted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", default=list(CONVERSIONS), choices=list(CONVERSIONS))
    parser.add_argument("--adopt", type=Path, help="corpus to encode and adopt; no conversions then")
    parser.add_argument("--copies", type=int, default=75)
    parser.add_argument("--retriever", default="builtin:minilm")
    parser.add_argument("--folder", help="where files go; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        if args.adopt:
            adopt(Path(name), args.adopt.absolute(), args.copies, args.retriever)
        else:
            convert(Path(name), args.sizes, args.kinds)


if __name__ == "__main__":
    sys.exit(main())
