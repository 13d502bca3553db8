"""The outputs of every stage from a small fixed world: what they hold may not move from one version to the next.

Text and whole numbers are compared by hash. Other numbers (scores, vectors) differ in their last digits from processor
to processor, so they are compared as weighted sums. A change that is meant to move one of these outputs changes its
entry in `same_bytes.json` (`python -m tests.test_same_bytes` writes it) and says so in the changelog.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest

from agentic_r_plugin.cli import main
from agentic_r_plugin.store import read_json, read_lines
from tests.llm.loopback import Answer, chat, serve

ROOT = Path(__file__).parents[1]
AGENT = ROOT / "recipes" / "quickstart" / "agent"
EXPECTED = Path(__file__).with_name("same_bytes.json")
WORLD = ["seed=5", "train_questions=10", "dev_questions=1", "test_questions=4", "people=40", "works=20", "companies=8",
         "schools=8", "prizes=6", "towns=12", "rivers=6", "newspapers=6", "talk_passages=0"]  # fmt: skip
LLM = [f"llm.model={AGENT}", "llm.device=cpu", "llm.dtype=float32", "protocol=compact"]
LIMITS = (
    "limits={max_searches: 3, max_malformed: 2, max_tokens: 1200, max_response_tokens: 64, max_observation_tokens: 300}"
)


def digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def judge(path: str, body: dict[str, Any]) -> Answer:
    """A server that judges by a hash of the query or question alone; its scores for one query are all different."""
    prompt = body["messages"][0]["content"]
    asked = re.search(r"exactly (\d+)", prompt)
    about = re.search(r"^(?:Query|Question): .*$", prompt, re.MULTILINE)
    assert asked is not None and about is not None
    numbers = [(digest(about.group()) + 37 * number) % 101 for number in range(int(asked.group(1)))]
    return chat(json.dumps([f"fact {number}" for number in numbers] if "whole numbers" not in prompt else numbers))


class Kept:
    """Collects hash, weighted sum and count of each output."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, name: str, data: Iterable[Any]) -> None:
        numbers: list[float] = []
        text = "\n".join(json.dumps(_without_floats(item, numbers), ensure_ascii=False) for item in data)
        total = sum(number * (1 + index % 7) for index, number in enumerate(numbers))
        self.found[name] = {
            "hash": hashlib.sha256(text.encode()).hexdigest()[:16],
            "lines": text.count("\n") + bool(text),
            "numbers": len(numbers),
            "sum": round(total, 4),
        }

    def file(self, name: str, path: Path) -> None:
        self.add(name, (line for _, line in read_lines(path)))


def _without_floats(item: Any, numbers: list[float]) -> Any:
    if isinstance(item, float):
        numbers.append(item)
        return "number"
    if isinstance(item, dict):
        return {key: _without_floats(value, numbers) for key, value in item.items()}
    return [_without_floats(value, numbers) for value in item] if isinstance(item, list) else item


def command(*line: object) -> None:
    assert main([str(part) for part in line]) == 0, line


def make(folder: Path) -> dict[str, dict[str, Any]]:
    """Run every stage; returns what its outputs hold."""
    kept = Kept()
    command("world", "--out", folder, *WORLD)
    home, index = folder / "fictional_world", folder / "index"
    corpus, out = home / "corpus.jsonl", folder / "data"
    for split in ("corpus", "train", "test"):
        kept.file(split, home / f"{split}.jsonl")
    _index(kept, corpus, index)
    _data(kept, home, index, out)
    _service(kept, index, out)
    _retriever(kept, corpus, folder)
    command(
        "evaluate", "--out", folder / "evaluation", "--data-dir", folder, "benchmarks=[fictional_world]",
        f"agents={{tiny: {AGENT}}}", f"searches={{minilm: {index}}}", "resamples=100", "settings.protocol=compact",
        "settings.agent.device=cpu", "settings.agent.dtype=float32", f"settings.{LIMITS}", "settings.search.device=cpu",
        "settings.search.options.precision=float32",
    )  # fmt: skip
    cell = folder / "evaluation" / "tiny-minilm-fictional_world"
    kept.file("evaluation trajectories", cell / "per_question.jsonl")
    kept.add("evaluation scores", [read_json(cell / "scores.json")])
    kept.add("evaluation metrics", [read_json(cell / "result.json")["metrics"]])
    return kept.found


def _index(kept: Kept, corpus: Path, index: Path) -> None:
    import faiss

    line = ["--corpus", corpus, "--retriever", "builtin:minilm", "precision=float32", "device=cpu", "shard_size=64"]
    command("index", *line, "--out", index)
    manifest = read_json(index / "manifest.json")
    kept.add("index", [{name: manifest[name] for name in ("rows", "dim", "metric", "kind", "corpus_fingerprint")}])
    vectors = faiss.read_index(str(index / "agentic_r_Flat.index")).reconstruct_n(0, manifest["rows"])
    kept.add("index vectors", vectors[::10, ::8].tolist())


def _data(kept: Kept, home: Path, index: Path, out: Path) -> None:
    search = ["search.backend=faiss", f"search.index={index}", "search.device=cpu", "search.options.precision=float32"]
    file = {
        name: out / f"{name}.jsonl"
        for name in ("trajectories", "candidates", "sub-answers", "relevance", "judged", "correctness", "exhaustive")
    }
    corpus = ["--corpus", home / "corpus.jsonl"]
    scored = ["--candidates", file["candidates"], *corpus]
    command(
        "trajectories", "--in", home / "train.jsonl", *LLM, *search, LIMITS, "batch_size=5", "--out",
        file["trajectories"],
    )  # fmt: skip
    command(
        "candidates", "--in", file["trajectories"], *search, "protocol=compact", "topk=8", "--out", file["candidates"]
    )
    command("relevance", *scored, "--questions", home / "train.jsonl", "--out", file["relevance"])
    with serve(judge) as server:
        asked = ["llm.backend=openai", f"llm.url={server.url}", "llm.model=m", f"llm.tokenizer={AGENT}"]
        command("sub-answers", "--in", file["trajectories"], *asked, "--out", file["sub-answers"])
        line = [*scored, "--sub-answers", file["sub-answers"], "--scorer", "listwise_judge"]
        command("relevance", *line, *asked, "--out", file["judged"])
    rolled_out = [*LLM, *search, LIMITS]
    command("correctness", *scored, "--relevance", file["relevance"], *rolled_out, "--out", file["correctness"])
    command("correctness", *scored, "--exhaustive", *rolled_out, "--out", file["exhaustive"])
    for name, path in file.items():
        if name != "correctness":  # pruning may become sharper; the groups stay
            kept.file(name, path)
    for name, relevance, correctness, more in (
        ("groups", "relevance", "correctness", []),
        ("groups exhaustive", "relevance", "exhaustive", []),
        ("groups judged", "judged", "exhaustive", []),
        ("groups released_code", "judged", "exhaustive", ["--preset", "released_code"]),
    ):
        files = ["--relevance", file[relevance], "--correctness", file[correctness]]
        made = out / f"{name.replace(' ', '-')}.jsonl"
        command("groups", "--candidates", file["candidates"], *files, "num_negatives=3", *more, "--out", made)
        kept.file(name, made)
    assert kept.found["groups"] == kept.found["groups exhaustive"], "pruning loses no group"


def _service(kept: Kept, index: Path, out: Path) -> None:
    from agentic_r_plugin.search.service.server import ServeConfig, running_service

    queries = [line for _, line in read_lines(out / "candidates.jsonl")][:6]
    body = {
        "queries": [line["query"] for line in queries],
        "questions": [line["question"] for line in queries],
        "topk": 4,
    }
    with running_service(ServeConfig(index=str(index), device="cpu", options={"precision": "float32"})) as url:
        for name, scores in (("service", True), ("service without scores", False)):
            answer = httpx.post(f"{url}/retrieve", json=body | {"return_scores": scores}, timeout=60)
            assert answer.status_code == 200, answer.text
            kept.add(name, answer.json()["result"])


def _retriever(kept: Kept, corpus: Path, folder: Path) -> None:
    from agentic_r_plugin.search.base import SearchRequest
    from agentic_r_plugin.search.encoder import Retriever

    out, groups = folder / "retriever", folder / "data" / "groups-judged.jsonl"
    command(
        "train-retriever", "--groups", groups, "--corpus", corpus, "--out", out, "--retriever", "builtin:minilm",
        "batch_size=4", "group_size=3", "learning_rate=1e-4", "max_steps=3", "query_max_length=48",
        "passage_max_length=64", "precision=float32", "device=cpu", "seed=1",
    )  # fmt: skip
    lines = [line for _, line in read_lines(out / "metrics.jsonl") if "loss" in line]
    kept.add("retriever losses", [{"step": line["step"], "loss": line["loss"]} for line in lines])
    retriever = Retriever.load(out, device="cpu", precision="float32")
    asked = [SearchRequest(query=f"birthplace {n}", question="Where was she born?") for n in range(3)]
    kept.add("retriever vectors", retriever.encode_queries(asked)[:, ::8].tolist())
    record = retriever.record.to_dict()
    kept.add("retriever record", [{name: record[name] for name in ("formulation", "query_max_length")}])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return make(tmp_path_factory.mktemp("same"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", list(read_json(EXPECTED)) if EXPECTED.exists() else [])
def test_an_output_holds_what_it_held_before(made: dict[str, dict[str, Any]], name: str):
    expected = read_json(EXPECTED)[name]
    total = pytest.approx(expected["sum"], rel=2e-4, abs=2e-3)
    assert made[name] == expected | {"sum": total}


def test_every_stage_is_compared(made: dict[str, dict[str, Any]]):
    assert set(made) == set(read_json(EXPECTED))
    assert all(entry["lines"] for entry in made.values()), "nothing is empty"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        entries = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in make(Path(scratch)).items()]
    EXPECTED.write_text("{\n" + ",\n".join(entries) + "\n}\n")
