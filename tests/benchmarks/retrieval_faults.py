"""Faults of the retrieval service under load: index swapped, worker killed, index cut, corpus row gone, disk full.

    python tests/benchmarks/retrieval_faults.py --index INDEX [--clients 16] [--reloads 5]

INDEX is a folder built by `agentic-r index`; a second index over its corpus turned round is built from its first 500
passages. Prints a Markdown table of what was asked, what failed and what was said; fails when a request failed that
should not have. Plain requests are sent without retries; with a killed worker, the requests in its hands may fail, and
the client's retries must hide it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from agentic_r_plugin.errors import SearchError
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.indexing.index import read_manifest
from agentic_r_plugin.search.service.server import ServeConfig, running_service


class Load:
    """Clients that ask one after the other until asked to stop."""

    def __init__(self, url: str, clients: int, *, retries: int) -> None:
        self.url, self.retries, self.stop = url, retries, False
        self.good, self.failed = 0, [""][:0]
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def _ask(self, client: int) -> None:
        asking = RetrievalClient(self.url, retries=self.retries, timeout_s=60)
        number = 0
        while not self.stop:
            number += 1
            try:
                found = asking.search([SearchRequest(query=f"river {client} {number}", question="Which river?")], 3)
                fault = "" if len(found[0]) == 3 else f"{len(found[0])} hits"
            except SearchError as error:
                fault = str(error)
            with self._lock:
                self.good += not fault
                self.failed += [fault] if fault else []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop = True
        for thread in self._threads:
            thread.join()


def turned_round(index: Path, folder: Path) -> Path:
    """An index of the first 500 passages, last first."""
    manifest = read_manifest(index)
    file, out = folder / "turned.jsonl", folder / "turned"
    with Corpus(manifest.corpus, table=index) as corpus:
        rows = [corpus[row] for row in range(min(500, len(corpus)))][::-1]
    lines = (json.dumps({"id": passage.id, "contents": passage.contents}) + "\n" for passage in rows)
    file.write_text("".join(lines), encoding="utf-8")
    run("index", "--corpus", str(file), "--retriever", manifest.retriever, "--out", str(out), check=True)
    return out


def run(*arguments: str, check: bool = False, limit_bytes: int | None = None) -> tuple[int, str]:
    """Exit code and last line on stderr of one of our commands."""

    def limited() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = [sys.executable, "-m", "agentic_r_plugin.cli", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, check=False)
    if check and ended.returncode:
        raise SystemExit(ended.stderr[-2000:])
    return ended.returncode, ended.stderr.strip().splitlines()[-1]


@contextmanager
def serving(index: Path, **settings: int) -> Iterator[str]:
    with running_service(ServeConfig(index=str(index), port=0, allow_reload=True, cache_size=0, **settings)) as url:
        yield url


def workers_of(url: str) -> list[int]:
    """Process ids of the service's workers, as children of the process that listens there."""
    port = int(url.rpartition(":")[2])
    inode = next(
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
    )
    holders = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            holds = any(str(link.readlink()) == f"socket:[{inode}]" for link in (process / "fd").iterdir())
            if holds and b"spawn_main" in (process / "cmdline").read_bytes():
                holders.append(int(process.name))
        except OSError:
            continue
    return holders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--reloads", type=int, default=5)
    args = parser.parse_args()
    rows: list[tuple[str, str, str]] = []
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        other = turned_round(args.index, folder)
        for workers in (1, 2):
            with serving(args.index, workers=workers) as url, Load(url, args.clients, retries=0) as load:
                times = []
                for turn in range(args.reloads):
                    time.sleep(1)
                    started = time.perf_counter()
                    RetrievalClient(url).reload(str((other, args.index)[turn % 2]))
                    times.append(time.perf_counter() - started)
            failed |= bool(load.failed)
            took = f"{args.reloads} reloads, the longest {max(times):.1f} s"
            rows.append(
                (f"reload under load, {workers} worker(s)", f"{load.good} good, {len(load.failed)} failed", took)
            )
        with serving(args.index, workers=2) as url:
            with Load(url, args.clients, retries=6) as load:
                time.sleep(1)
                for _ in range(3):
                    os.kill(workers_of(url)[0], signal.SIGKILL)
                    time.sleep(3)
                deadline = time.monotonic() + 60
                while len(workers_of(url)) < 2 and time.monotonic() < deadline:
                    time.sleep(0.2)
            back = len(workers_of(url))
            ready = httpx.get(f"{url}/ready").status_code
        failed |= bool(load.failed) or back != 2 or ready != 200
        rows.append(
            ("worker killed, 3 times", f"{load.good} good, {len(load.failed)} failed", f"{back} workers at the end")
        )

        cut = folder / "cut"
        shutil.copytree(other, cut)
        with (cut / "agentic_r_Flat.index").open("r+b") as stream:
            stream.truncate(1000)
        rows.append(("index file cut", *explained(*run("serve", "--index", str(cut), "--port", "0"))))
        with serving(other) as url:
            try:
                RetrievalClient(url).reload(str(cut))
                said = "accepted"
            except SearchError as error:
                said = str(error).partition("HTTP ")[2]
            good = len(RetrievalClient(url).search([SearchRequest(query="river")], 3)[0])
        failed |= not said.startswith("400") or good != 3
        rows.append(("reload to a cut index", f"{good} of 3 hits from the old one", said[:160]))
        lines = (folder / "turned.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "turned.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
        rows.append(("corpus row missing", *explained(*run("serve", "--index", str(other), "--port", "0"))))
        (folder / "turned.jsonl").write_text("".join(lines), encoding="utf-8")
        arguments = ["index", "--corpus", str(folder / "turned.jsonl"), "--retriever", read_manifest(other).retriever]
        arguments += ["--out", str(folder / "full"), "--shard-size", "100"]
        rows.append(("disk full while indexing", *explained(*run(*arguments, limit_bytes=400_000))))
        code, _ = run(*arguments, "--resume")
        rows.append(("the same with --resume and room", f"exit {code}", ""))
        failed |= code != 0 or any(row[1] == "exit 0" for row in rows[3:4] + rows[5:7])
    print("\n| fault | outcome | said |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(cell.replace("|", "/").replace(name, "DIR") for cell in row) + " |")
    if failed:
        raise SystemExit("a request failed that should not have, or a fault went unnoticed")


def explained(code: int, message: str) -> tuple[str, str]:
    return f"exit {code}", message[:200]


if __name__ == "__main__":
    main()
