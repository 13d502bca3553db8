"""A two-hop toy benchmark, an agent that follows a rule, and a word-overlap retriever: exact, and fast."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashrag.config import Config

from agentic_r_plugin.answers import normalize
from agentic_r_plugin.evaluation import metrics
from agentic_r_plugin.llm.base import Completion, Request, Sampling
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.base import Hit, SearchRequest

PEOPLE = ("Ada Lom", "Bo Rusk", "Cy Venn", "Di Marsh", "Ed Pohl", "Fay Quin")
TOWNS = ("Orlo", "Pell", "Quay", "Rond", "Sarn", "Tule")
RIVERS = ("Awe", "Bure", "Cam", "Dee", "Exe", "Fal")
_NEED_MORE = ("agentic_base", "agentic_judge")
METRICS = {
    cls.metric_name: cls
    for cls in vars(metrics).values()
    if isinstance(cls, type) and issubclass(cls, metrics.QuestionMetric) and cls.metric_name not in _NEED_MORE
}
"""Name -> class of the metrics that need only answers and searches."""
METRIC_NAMES = tuple(METRICS)


def write_benchmark(folder: Path, *, num_questions: int = 6) -> Path:
    """A FlashRAG data set `toy` below `folder`: who lives where, and which river runs through it."""
    home = folder / "toy"
    home.mkdir(parents=True)
    corpus = [
        {"id": f"p{i}", "contents": f'"{person}"\n{person} lives in {town}.'}
        for i, (person, town) in enumerate(zip(PEOPLE, TOWNS, strict=True))
    ] + [
        {"id": f"t{i}", "contents": f'"{town}"\nThe river {river} runs through the town {town}.'}
        for i, (town, river) in enumerate(zip(TOWNS, RIVERS, strict=True))
    ]
    questions = [
        {
            "id": f"q{i}",
            "question": f"Which river runs through the town where {PEOPLE[i]} lives?",
            "golden_answers": [RIVERS[i]],
            "metadata": {"gold_doc_ids": [f"p{i}", f"t{i}"], "hops": 2},
        }
        for i in range(num_questions)
    ]
    write_lines(home / "corpus.jsonl", corpus)
    write_lines(home / "test.jsonl", questions)
    return home


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def flashrag_config(folder: Path, **extra: Any) -> Config:
    """FlashRAG's own `Config` for the toy set, without a GPU, a hub or files."""
    settings = {
        "data_dir": str(folder),
        "dataset_name": "toy",
        "split": ["test"],
        "gpu_id": None,
        "disable_save": True,
        "save_metric_score": False,
        "save_intermediate_data": False,
        "metrics": ["agentic_em"],
    }
    return Config(config_dict=settings | extra)


class ByteCodec:
    """Every byte is a token."""

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class RuleAgent:
    """Looks the person up, then the town, then answers; `replies` overrules it, by question and turn."""

    codec = ByteCodec()

    def __init__(self, replies: dict[tuple[str, int], str] | None = None) -> None:
        self.replies = replies or {}
        self.calls = 0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls += 1
        completions = []
        for request in requests:
            text = self.reply(self.codec.decode(request.prompt_ids))
            ends = [text.find(stop) + len(stop) for stop in sampling.stop if stop in text]
            ids = self.codec.encode(text[: min(ends, default=len(text))])[: request.max_tokens]
            completions.append(Completion(token_ids=tuple(ids), prompt_tokens=len(request.prompt_ids)))
        return completions

    def reply(self, prompt: str) -> str:
        person = next(name for name in PEOPLE if f"where {name} lives?" in prompt)
        turn = prompt.count("<information>") - prompt.partition("Question:")[0].count("<information>")
        if (person, turn) in self.replies:
            return self.replies[person, turn]
        town = re.search(rf"{person} lives in (\w+)\.", prompt)
        river = re.search(rf"The river (\w+) runs through the town {town[1]}\.", prompt) if town else None
        if river:
            return f"<think>Found.</think><answer> {river[1]} </answer>"
        if town:
            return f"<think>Now the river.</think><search> river {town[1]} </search>"
        return f"<think>First the town.</think><search> where {person} lives </search>"

    def fingerprint(self) -> str:
        return "rule"

    def close(self) -> None:
        pass


class OverlapSearch:
    """Ranks passages by the number of query words they hold; ties by id."""

    def __init__(self, corpus: Path) -> None:
        rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
        self.passages = [Passage.from_contents(row["id"], row["contents"]) for row in rows]
        self.requests: list[SearchRequest] = []

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        self.requests += requests
        return [self._one(set(normalize(request.query).split()), topk) for request in requests]

    def _one(self, words: set[str], topk: int) -> list[Hit]:
        hits = [
            Hit(passage=passage, score=float(len(words & set(normalize(passage.contents).split()))))
            for passage in self.passages
        ]
        return sorted(hits, key=lambda hit: (-hit.score, hit.passage.id))[:topk]

    def fingerprint(self) -> str:
        return "overlap"

    def close(self) -> None:
        pass
