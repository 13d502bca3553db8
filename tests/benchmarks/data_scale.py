"""Queries through candidates, relevance, correctness and groups with a simulated agent, judge and retriever.

    python tests/benchmarks/data_scale.py --queries 10000 100000 1000000 [--out DIR] [--runner ...]

Each size and stage is a command of the package in a separate process, on files; only the models are simulated, in
the process: they answer at once, by a hash of what they are asked. So the table shows what the package itself costs
(wall time of the whole command; the share inside the simulated models and their sessions is next to it):
records a second, and the peak of resident memory, which must not grow with the number of queries. Two queries a
trajectory; a million queries need some 6 GB of disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np

from agentic_r_plugin import components
from agentic_r_plugin.backends import LLMSpec, SearchSpec
from agentic_r_plugin.llm.base import Completion, Request, Sampling, Usage
from agentic_r_plugin.records import Passage, ScoredPassage, StopReason, Trajectory, Turn
from agentic_r_plugin.search.base import Hit, SearchRequest
from agentic_r_plugin.store import dump_line
from agentic_r_plugin.tags import compact

NUM_PASSAGES = 20_000
STAGES = ("candidates", "relevance", "correctness", "groups")


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def passage(number: int) -> Passage:
    text = " ".join(f"w{digest(f'{number} {word}') % 5000}" for word in range(60))
    return Passage(id=str(number), title=f"Title {number}", text=f"text of {number}. {text}")


class FourBytes:
    """A codec of one id for four bytes, without a table."""

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        return np.frombuffer(data + b"\0" * (-len(data) % 4), "<u4").tolist()

    def decode(self, ids: Sequence[int]) -> str:
        return np.array(ids, "<u4").tobytes().replace(b"\0", b"").decode()


class SimulatedLLM:
    """Agent and judge: answers by a hash of the prompt; one rollout in three is right."""

    def __init__(self) -> None:
        self.codec, self.usage = FourBytes(), Usage()

    @classmethod
    def from_spec(cls, spec: LLMSpec) -> SimulatedLLM:
        return cls()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Completion:
        prompt = self.codec.decode(request.prompt_ids)
        right = digest(prompt) % 3 == 0
        said = f"<think>It says so.</think><answer> {'yes' if right else 'no'} </answer>"
        return Completion(token_ids=tuple(self.codec.encode(said)), prompt_tokens=len(request.prompt_ids))

    def chat(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> list[str]:
        return [self._scores(prompt) for prompt in prompts]

    def _scores(self, prompt: str) -> str:
        """81 to 100 for one passage in ten, so that four queries in five have a candidate that may be a positive."""
        query = prompt.partition("\nQuery: ")[2].partition("\n")[0]
        scores = [digest(f"{query} {number}") % 1000 for number in re.findall(r"text of (\d+)\.", prompt)]
        return json.dumps([score % 20 + 81 if score < 80 else score % 60 for score in scores])

    def fingerprint(self) -> str:
        return "simulated"

    def close(self) -> None:
        pass


class SimulatedSearch:
    """Finds passages by a hash of the query; holds them all."""

    def __init__(self) -> None:
        self._passages = [passage(number) for number in range(NUM_PASSAGES)]

    @classmethod
    def from_spec(cls, spec: SearchSpec) -> SimulatedSearch:
        return cls()

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        found = []
        for request in requests:
            start, step = digest(request.query) % NUM_PASSAGES, 7
            rows = [(start + step * rank) % NUM_PASSAGES for rank in range(topk)]
            found.append([Hit(passage=self._passages[row], score=1 - rank / 100) for rank, row in enumerate(rows)])
        return found

    def fingerprint(self) -> str:
        return "simulated"

    def close(self) -> None:
        pass


def register() -> None:
    """Make the two known by the name `simulated` in this process."""
    for kind, cls in (("llm_backend", SimulatedLLM), ("search_backend", SimulatedSearch)):
        point = EntryPoint(
            f"{kind}.simulated", f"{__spec__.name if __spec__ else __name__}:{cls.__name__}", components.GROUP
        )
        components._registry()[kind, "simulated"] = point


def trajectories(count: int) -> Iterator[Trajectory]:
    block = compact.render([Passage(id="0", title="T", text="nothing of use here")])
    for number in range(count):
        queries = [f"what is fact {number} of {turn}" for turn in (1, 2)]
        text = "".join(f"<think>I look.</think><search> {query} </search>{block}" for query in queries)
        turns = tuple(
            Turn(turn=turn, reasoning="I look.", query=query, passages=(ScoredPassage(id="0", score=1.0),))
            for turn, query in enumerate(queries, start=1)
        )
        yield Trajectory(
            id=f"q{number}", question=f"What follows from fact {number}?", golden_answers=("yes",), turns=turns,
            answer="yes", stop_reason=StopReason.ANSWERED, em=1, f1=1.0, text=text + "<answer> yes </answer>",
        )  # fmt: skip


def commands(folder: Path, runner: Sequence[str]) -> dict[str, list[str]]:
    file = {name: str(folder / f"{name}.jsonl") for name in ("trajectories", *STAGES)}
    corpus = str(folder / "corpus.jsonl")
    search, llm = ["search.backend=simulated"], ["llm.backend=simulated"]
    scored = ["--candidates", file["candidates"], "--corpus", corpus]
    return {
        "candidates": ["--in", file["trajectories"], "protocol=compact", *search],
        "relevance": [*scored, "--scorer", "listwise_judge", *llm],
        "correctness": [*scored, "--relevance", file["relevance"], "protocol=compact", *llm, *search],
        "groups": [
            "--candidates", file["candidates"], "--relevance", file["relevance"], "--correctness", file["correctness"],
        ],
    } | {"runner": list(runner)}  # fmt: skip


def child(folder: Path, stage: str, runner: Sequence[str]) -> None:
    """Run one stage and say its seconds and its peak of memory."""
    from agentic_r_plugin.cli import main as agentic_r

    register()
    started = time.monotonic()
    arguments = [stage, *commands(folder, runner)[stage], "--out", str(folder / f"{stage}.jsonl"), *runner]
    if agentic_r(arguments) != 0:
        raise SystemExit(1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT", json.dumps({"seconds": time.monotonic() - started, "peak_mib": peak}))


def measure(folder: Path, queries: int, runner: Sequence[str]) -> list[dict[str, float]]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "corpus.jsonl").open("wb") as stream:
        for number in range(NUM_PASSAGES):
            found = passage(number)
            stream.write(dump_line({"id": found.id, "contents": found.contents}))
    with (folder / "trajectories.jsonl").open("wb") as stream:
        for record in trajectories(queries // 2):
            stream.write(dump_line(record.to_dict()))
    results = []
    for stage in STAGES:
        command = [sys.executable, "-m", "tests.benchmarks.data_scale", "--child", str(folder), stage, *runner]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
        if line is None:
            raise SystemExit(done.stderr[-3000:])
        report = json.loads((folder / f"{stage}.jsonl.report.json").read_text())
        counts = {name: report[name] for name in ("rollouts", "records", "pruned_share") if name in report}
        results.append(counts | json.loads(line.partition(" ")[2]) | {"stage": stage, "model_s": report["seconds"]})
        print(f"{queries:,} {stage}: {results[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    return results


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--out", type=Path, default=None, help="folder in which the files are, until the end")
    parser.add_argument("--runner", nargs="*", default=[], help="such as runner.workers=2")
    args = parser.parse_args()
    rows = []
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out) as scratch:
        for queries in args.queries:
            folder = Path(scratch) / str(queries)
            for result in measure(folder, queries, args.runner):
                rows.append((queries, result))
            shutil.rmtree(folder)
    print("| queries | stage | seconds | of it in the models | queries a second | ms a query | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for queries, row in rows:
        seconds = row["seconds"]
        rate, each = queries / seconds, 1000 * seconds / queries
        of_models = f"{row['model_s']:.1f}"
        timing = f"{seconds:.1f} | {of_models} | {rate:,.0f} | {each:.2f}"
        print(f"| {queries:,} | {row['stage']} | {timing} | {row['peak_mib']:.0f} |")
    for queries in args.queries:
        of_size = [row for size, row in rows if size == queries]
        seconds = sum(row["seconds"] for row in of_size)
        rollouts, groups = (next(row for row in of_size if row["stage"] == name) for name in ("correctness", "groups"))
        print(
            f"{queries:,} queries: {seconds:,.1f} s in all, {1000 * seconds / queries:.2f} ms a query, "
            f"{rollouts['rollouts']:,} rollouts ({rollouts['pruned_share']:.1%} pruned), {groups['records']:,} groups"
        )


if __name__ == "__main__":
    main()
