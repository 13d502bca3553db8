"""kill -9 at random moments over all data stages: the same bytes in the end, and no finished LLM call made twice.

    python -m tests.benchmarks.kills [--kills 50] [--kind local|ray] [--questions 120] [--seed 0]

A loopback server speaks the OpenAI protocol as agent and judge, and answers by a hash of what it is asked (some judge
replies are bad, some stay bad and become judge errors). First every stage runs uninterrupted, one unit a batch, and the
server notes which request belongs to which unit. Then the stages run in a process that is killed, with all its
children, again and again at random moments spread over the stages, and resumed; a request of a unit that was kept
before its process began is a call made twice. At the end the files must equal those of the first run byte for
byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from agentic_r_plugin.cli import main as agentic_r
from agentic_r_plugin.data.stages import runner
from agentic_r_plugin.store import read_json, read_lines
from tests.llm.loopback import Answer, chat, serve

ROOT = Path(__file__).parents[2]
AGENT = ROOT / "recipes" / "quickstart" / "agent"
STAGES = ("trajectories", "candidates", "sub-answers", "relevance", "correctness", "groups")
DELAY_S = 0.01
QUICK = ("candidates", "groups")
"""Stages that ask no model: they are over before one looks."""
QUICK_S, SLOW_S = 0.08, 0.6
"""A kill comes at most so long after its stage went on."""


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Server:
    """Answers requests, and knows whose they are."""

    def __init__(self, questions: dict[str, str]) -> None:
        from transformers import AutoTokenizer

        self.gold = questions
        self.tokenizer = AutoTokenizer.from_pretrained(AGENT)
        self.unit_of: dict[str, tuple[str, str]] = {}
        self.current: tuple[str, str] | None = None
        self.finished: set[tuple[str, str]] = set()
        self.twice: list[tuple[str, str]] = []
        self.unknown = 0
        self.calls: Counter[str] = Counter()

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if self.current is not None:
            self.unit_of[key] = self.current
        else:
            time.sleep(DELAY_S)
            unit = self.unit_of.get(key)
            if unit is None:
                self.unknown += 1
            elif unit in self.finished:
                self.twice.append(unit)
        self.calls[key] += 1
        return self.chat(body) if path.endswith("chat/completions") else self.complete(body)

    def complete(self, body: dict[str, Any]) -> Answer:
        """The agent: searches one to three times, answers rightly from some of what it is shown."""
        prompt = self.tokenizer.decode(body["prompt"])
        question = re.search(r"Question: (.*)", prompt).group(1)
        made, wanted = prompt.count("<search>"), 1 + digest(question) % 3
        if made < wanted:
            text = f"<think>I look.</think><search> {question.split()[-1]} part {made + 1} </search>"
        else:
            right = digest(prompt) % 3 == 0
            text = f"<think>I read.</think><answer> {self.gold[question] if right else 'unknown'} </answer>"
        return 200, {"choices": [{"text": text}], "usage": {"prompt_tokens": len(body["prompt"])}}

    def chat(self, body: dict[str, Any]) -> Answer:
        """The judge: one reply in eight is bad, and those on some queries stay bad."""
        prompt = body["messages"][0]["content"]
        asked = int(re.search(r"exactly (\d+)", prompt).group(1))
        if digest(prompt) % 29 == 0 or digest(json.dumps(body, sort_keys=True)) % 8 == 0:
            return chat("I am not sure [1].")
        if "strings" in prompt:
            return chat(json.dumps([f"fact {number}" for number in range(asked)]))
        scores = [digest(f"{prompt} {number}") % 101 for number in range(asked)]
        return chat(json.dumps(scores))


def commands(folder: Path, url: str) -> dict[str, list[str]]:
    file = {name: str(folder / f"{name}.jsonl") for name in STAGES}
    questions, corpus = str(folder.parent / "questions.jsonl"), str(folder.parent / "corpus.jsonl")
    llm = ["llm.backend=openai", f"llm.url={url}", "llm.model=m", f"llm.tokenizer={AGENT}", "llm.concurrency=4"]
    search = ["search.backend=bm25", f"search.corpus={corpus}"]
    limits = "limits={max_tokens: 4000, max_response_tokens: 300, max_observation_tokens: 900}"
    scored = ["--candidates", file["candidates"], "--corpus", corpus]
    lenient = "max_error_share=0.5"
    return {
        "trajectories": ["--in", questions, *llm, *search, "protocol=compact", limits],
        "candidates": ["--in", file["trajectories"], *search, "protocol=compact"],
        "sub-answers": ["--in", file["trajectories"], *llm, lenient],
        "relevance": [*scored, "--sub-answers", file["sub-answers"], "--scorer", "listwise_judge", *llm, lenient],
        "correctness": [*scored, "--relevance", file["relevance"], *llm, *search, "protocol=compact", limits],
        "groups": [
            "--candidates", file["candidates"], "--relevance", file["relevance"], "--correctness", file["correctness"],
        ],
    }  # fmt: skip


def run_stages(folder: Path, url: str, *more: str) -> None:
    for name, arguments in commands(folder, url).items():
        extra = [item for item in more if name != "groups" or not item.startswith("batch_size")]
        if agentic_r([name, *arguments, "--out", str(folder / f"{name}.jsonl"), *extra, "--resume"]) != 0:
            raise SystemExit(f"{name} failed")


def reference(folder: Path, server: Server, url: str) -> None:
    """Every stage, one unit at a time, so that the server knows whose a request is."""
    plain = runner.LocalExecutor.run

    def noting(self: Any, batches: Any) -> Any:
        for batch in batches:
            server.current = (stage, batch.keys[0])
            yield from plain(self, iter([batch]))

    runner.LocalExecutor.run = noting  # type: ignore[method-assign]
    try:
        for stage in STAGES:
            extra = [] if stage == "groups" else ["batch_size=1"]
            arguments = [stage, *commands(folder, url)[stage], "--out", str(folder / f"{stage}.jsonl"), *extra]
            if agentic_r(arguments) != 0:
                raise SystemExit(f"{stage} failed")
    finally:
        runner.LocalExecutor.run = plain  # type: ignore[method-assign]
        server.current = None


def units(folder: Path, stage: str) -> list[str]:
    """Keys of a stage's units, in order."""
    if stage == "trajectories":
        return [line["id"] for _, line in read_lines(folder.parent / "questions.jsonl")]
    if stage in ("candidates", "sub-answers"):
        return [line["id"] for _, line in read_lines(folder / "trajectories.jsonl")]
    return [f"{line['id']}/{line['turn']}" for _, line in read_lines(folder / "candidates.jsonl")]


def finished(folder: Path) -> set[tuple[str, str]]:
    """Units with an outcome on disk: in the table of unfinished work or in a finished file."""
    found: set[tuple[str, str]] = set()
    for stage in STAGES:
        out, work = folder / f"{stage}.jsonl", folder / f"{stage}.jsonl.work"
        if (folder / f"{stage}.jsonl.report.json").exists() or out.exists():
            found |= {(stage, key) for key in units(folder, stage)}
        elif work.exists():
            with closing(sqlite3.connect(work)) as db:
                if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'unit'").fetchone():
                    found |= {(stage, key) for (key,) in db.execute("SELECT key FROM unit")}
    return found


def write_inputs(folder: Path, count: int) -> dict[str, str]:
    """Questions and a corpus; returns the answers by question."""
    facts = {f"What is known of item{number}": f"answer{number}" for number in range(count)}
    with (folder / "questions.jsonl").open("w") as stream:
        for number, (question, gold) in enumerate(facts.items()):
            stream.write(json.dumps({"id": f"q{number}", "question": question, "golden_answers": [gold]}) + "\n")
    with (folder / "corpus.jsonl").open("w") as stream:
        for number in range(count * 8):
            contents = (
                f'"Item {number}"\nThe part {number % 8} of item{number // 8} is described here, number {number}.'
            )
            stream.write(json.dumps({"id": f"p{number}", "contents": contents}) + "\n")
    return facts


def state(folder: Path, stage: str) -> list[tuple[str, int]]:
    """Names and sizes of a stage's files."""
    found: list[tuple[str, int]] = []
    for path in folder.rglob(f"*{stage}.jsonl*") if folder.exists() else ():
        inside = path.rglob("*") if path.is_dir() else (path,)
        with suppress(FileNotFoundError):  # renamed or removed meanwhile
            found += [(str(item), item.stat().st_size) for item in inside]
    return sorted(found)


def unfinished(folder: Path) -> list[str]:
    return [name for name in STAGES if not (folder / f"{name}.jsonl.report.json").exists()]


class Killer:
    """Ends processes at random moments, about as many in every stage; a stage that ends early leaves its share over.

    One in five is killed at any moment of its start, the others a random while after the stage in turn went on.
    """

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder, self.left, self.chance = folder, kills, random.Random(seed)
        self.moments: Counter[str] = Counter()

    def share(self, stage: str) -> int:
        """Kills that the stage still gets."""
        later = len(STAGES) - STAGES.index(stage)
        return -(-(self.left + self.moments[stage]) // later) - self.moments[stage]

    def kill(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait for the moment and kill; False: the process ended by itself."""
        started, limit = time.monotonic(), math.inf
        if self.left and self.chance.random() < 0.2:
            limit = self.chance.uniform(0, 8)
        before = {stage: state(self.folder, stage) for stage in STAGES}
        while process.poll() is None:
            stage = next(iter(unfinished(self.folder)), STAGES[-1])
            if self.left and self.share(stage) > 0:
                went_on = state(self.folder, stage) != before[stage]
                if went_on:
                    time.sleep(self.chance.uniform(0, QUICK_S if stage in QUICK else SLOW_S))
                if went_on or time.monotonic() - started > limit:
                    return self._end(process)
            time.sleep(0.002)
        return False

    def _end(self, process: subprocess.Popen[bytes]) -> bool:
        if process.poll() is not None:
            return False
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.left -= 1
        stage = next(iter(unfinished(self.folder)), "after the last")
        self.moments[stage] += 1
        print(f"kill {self.moments.total()}: {stage}", file=sys.stderr, flush=True)
        return True


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run_stages(Path(sys.argv[2]), *sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--kind", choices=("local", "ray"), default="local")
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        server = Server(write_inputs(folder, args.questions))
        with serve(server.answer) as loopback:
            whole, killed = folder / "whole", folder / "killed"
            reference(whole, server, loopback.url)
            calls = sum(server.calls.values())
            server.calls.clear()
            workers = (
                ["runner.kind=ray", "runner.workers=2", "runner.cpus_per_worker=0.5"] if args.kind == "ray" else []
            )
            more = ["batch_size=4", "runner.part_size=24", *workers]
            command = [sys.executable, "-m", "tests.benchmarks.kills", "--child", str(killed), loopback.url, *more]
            killer = Killer(killed, args.kills, args.seed)
            while True:
                server.finished = finished(killed)
                with (folder / "log").open("ab") as log:
                    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
                if killer.kill(process):
                    continue
                if process.returncode != 0:
                    raise SystemExit((folder / "log").read_text()[-3000:])
                break
            same = [
                name for name in STAGES
                if (whole / f"{name}.jsonl").read_bytes() == (killed / f"{name}.jsonl").read_bytes()
            ]  # fmt: skip
            errors = sum(read_json(killed / f"{name}.jsonl.report.json")["errors"] for name in STAGES)
            repeated = sum(server.calls.values()) - calls
            moments = killer.moments
            print(f"{args.kind}: {moments.total()} kills ({', '.join(f'{name} {n}' for name, n in moments.items())})")
            print(f"identical files: {', '.join(same)} ({len(same)} of {len(STAGES)}); judge errors {errors}")
            print(
                f"{calls} calls uninterrupted, {repeated} more with kills (batches under way); calls of finished units "
                f"made twice: {len(server.twice)}; calls that the uninterrupted run did not make: {server.unknown}"
            )
            if len(same) < len(STAGES) or server.twice or server.unknown:
                raise SystemExit("not exactly once")


if __name__ == "__main__":
    main()
