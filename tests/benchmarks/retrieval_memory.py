"""Memory of index build and service at 10^5 and 10^6 passages, with a stand-in encoder (mean word vectors).

    python tests/benchmarks/retrieval_memory.py [--sizes 100000 1000000] [--kinds Flat SQ8 IVF1024,PQ16] [--folder DIR]

Every build and every service is a separate process. Prints two Markdown tables: the build's peak resident memory, and
how much of it is private (RssAnon: what it allocated, the pages of mapped files not counted) at its highest; the
service's private memory, its resident memory, how long it took until it answered, and milliseconds a query.
The last rows say how much more ten times the passages take.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.store import read_json

WORDS = 5000


def make_encoder(folder: Path, dim: int) -> str:
    """A sentence-transformers model that costs next to nothing: random word vectors, averaged."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{number}": number for number in range(WORDS)} | {"[UNK]": WORDS}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    module = StaticEmbedding(tokenizer, embedding_weights=torch.randn(WORDS + 1, dim))
    SentenceTransformer(modules=[module], device="cpu").save_pretrained(str(folder), create_model_card=False)
    return str(folder)


def make_corpus(file: Path, rows: int) -> Path:
    """Passages of 30 made-up words."""
    draw = random.Random(0)
    words = [f"w{number}" for number in range(WORDS)]
    with file.open("w", encoding="utf-8") as stream:
        for row in range(rows):
            text = f'"title {row}"\n' + " ".join(draw.choices(words, k=30))
            stream.write(json.dumps({"id": str(row), "contents": text}) + "\n")
    return file


class Watched:
    """Highest memory of a process, in MB, sampled from /proc until it ends."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.peak_private = self.peak_resident = 0.0
        threading.Thread(target=self._sample, daemon=True).start()
        self._log: list[bytes] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self._log = list(self.process.stderr)

    def _sample(self) -> None:
        while self.process.poll() is None:
            now = memory(self.process.pid)
            self.peak_private = max(self.peak_private, now["RssAnon"])
            self.peak_resident = max(self.peak_resident, now["VmHWM"])
            time.sleep(0.05)

    def wait(self) -> None:
        if self.process.wait() != 0:
            raise SystemExit(b"".join(self._log).decode()[-2000:])


def memory(pid: int) -> dict[str, float]:
    """Fields of /proc/PID/status in MB; zeros when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        lines = []
    fields = {line.split(":")[0]: float(line.split()[1]) / 1024 for line in lines if line.endswith("kB")}
    return {"RssAnon": 0.0, "VmHWM": 0.0, "VmRSS": 0.0} | fields


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "agentic_r_plugin.cli", *arguments]


def serve(index: Path, folder: Path) -> tuple[float, float, float, float]:
    """(seconds until it answers, private MB, resident MB, milliseconds a query) after 300 queries."""
    ready = folder / "ready.json"
    started = time.perf_counter()
    watched = Watched(
        command(
            "serve", "--index", str(index), "--port", "0", "--ready-file", str(ready), "--cache-size", "0",
            'options={mapped: true}',
        )
    )  # fmt: skip
    try:
        while not ready.exists():
            if watched.process.poll() is not None:
                watched.wait()
                raise SystemExit("the service ended")
            time.sleep(0.02)
        opened_s = time.perf_counter() - started
        client = RetrievalClient(read_json(ready)["url"])
        draw = random.Random(1)
        queries = [SearchRequest(query=" ".join(f"w{draw.randrange(WORDS)}" for _ in range(8))) for _ in range(300)]
        client.search(queries[:20], 20)
        asked = time.perf_counter()
        for start in range(20, 300, 10):
            client.search(queries[start : start + 10], 20)
        per_query_ms = 1000 * (time.perf_counter() - asked) / 280
        now = memory(watched.process.pid)
        return opened_s, now["RssAnon"], now["VmRSS"], per_query_ms
    finally:
        watched.process.terminate()
        watched.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", default=["Flat", "SQ8", "IVF1024,PQ16"])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--folder", help="where corpora and indexes go; default: a temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        model = make_encoder(folder / "model", args.dim)
        builds: dict[tuple[str, int], tuple[float, float, float, float]] = {}
        services: dict[tuple[str, int], tuple[float, float, float, float]] = {}
        for rows in args.sizes:
            corpus = make_corpus(folder / f"{rows}.jsonl", rows)
            for kind in args.kinds:
                out = folder / f"{rows}-{kind}"
                started = time.perf_counter()
                watched = Watched(
                    command(
                        "index", "--corpus", str(corpus), "--retriever", model, "--out", str(out), "--kind", kind,
                        "--shard-size", "16384", "--train-rows", "65536",
                    )
                )  # fmt: skip
                watched.wait()
                seconds = time.perf_counter() - started
                size = (out / f"agentic_r_{kind}.index").stat().st_size / 1e6
                builds[kind, rows] = (watched.peak_private, watched.peak_resident, seconds, size)
                services[kind, rows] = serve(out, folder)
                print(f"{kind} {rows}: {builds[kind, rows]} {services[kind, rows]}", file=sys.stderr)
    first, last = args.sizes[0], args.sizes[-1]
    print(
        f"\nBuild, {args.dim} dimensions\n"
        "\n| kind | passages | index MB | peak private MB | peak resident MB | seconds |"
    )
    print("|---|---|---|---|---|---|")
    for (kind, rows), (private, resident, seconds, size) in builds.items():
        print(f"| {kind} | {rows:,} | {size:.0f} | {private:.0f} | {resident:.0f} | {seconds:.0f} |")
    for kind in args.kinds:
        more = builds[kind, last][0] - builds[kind, first][0]
        print(
            f"| {kind} | {last // first} x | | {more:+.0f} | {builds[kind, last][1] - builds[kind, first][1]:+.0f} | |"
        )
    print(
        "\nService, index mapped\n"
        "\n| kind | passages | private MB | resident MB | seconds until it answers | ms/query |"
    )
    print("|---|---|---|---|---|---|")
    for (kind, rows), (opened_s, private, resident, per_query_ms) in services.items():
        print(f"| {kind} | {rows:,} | {private:.0f} | {resident:.0f} | {opened_s:.1f} | {per_query_ms:.1f} |")
    for kind in args.kinds:
        few, many = services[kind, first], services[kind, last]
        print(f"| {kind} | {last // first} x | {many[1] - few[1]:+.0f} | {many[2] - few[2]:+.0f} | | |")


if __name__ == "__main__":
    main()
