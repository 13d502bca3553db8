"""What each cause in the generated world does to search: `python tests/benchmarks/world_causes.py`.

Every world has one cause at its own share (`--share`), and the last world has all of them. The questions are
development questions, and the queries are those of an agent that knows the answers of earlier hops (the first wording).

| column | meaning |
|---|---|
| query suffices | share of hops whose query alone says which fact is meant: not elliptic, and no namesake |
| r@3, r@20 | the gold passage of a hop is among the best 3, 20 |
| perfect | questions answered by a reader that needs the gold passage of every hop among the best 3 |
| misled | hops of which the first statement of the relation under that name, among the best 3, is a wrong one |

Vectors are kept in `--cache`, so that an interrupted run goes on and another share encodes only what is new.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import bm25s
import numpy as np

from agentic_r_plugin.query import query_only, question_query
from agentic_r_plugin.records import Passage, Question
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.store import atomic_path
from agentic_r_plugin.world.generate import CAUSES, World, WorldConfig, build_world
from agentic_r_plugin.world.questions import hop_query

DEPTHS = (3, 20)
Found = list[list[list[str]]]
"""Of each question and hop, the ids of the passages that were found, best first."""


def queries(questions: Sequence[Question], form: Callable[..., str]) -> list[str]:
    return [
        form(SearchRequest(question=q.question, query=hop_query(q, hop)))
        for q in questions
        for hop in range(q.metadata["hops"])
    ]


def by_question(questions: Sequence[Question], rows: Sequence[Sequence[int]], world: World) -> Found:
    ids = iter([[world.passages[row].id for row in line] for line in rows])
    return [[next(ids) for _ in range(question.metadata["hops"])] for question in questions]


def bm25(world: World, texts: Sequence[str]) -> list[list[int]]:
    tokens = bm25s.tokenize([p.contents for p in world.passages], stopwords="en", show_progress=False)
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(tokens, show_progress=False)
    asked = bm25s.tokenize(list(texts), stopwords="en", show_progress=False)
    rows: list[list[int]] = index.retrieve(asked, k=max(DEPTHS), show_progress=False)[0].tolist()
    return rows


class Vectors:
    """A retriever's vectors of passages (`contents`) and formulated queries, kept in a file."""

    def __init__(self, retriever: str, cache: Path) -> None:
        self.retriever, self.cache = Retriever.load(retriever, device="cpu"), cache
        self.known: dict[str, np.ndarray] = {}
        if cache.is_file():
            with np.load(cache) as data:
                self.known = dict(zip(data["keys"].tolist(), data["vectors"], strict=True))

    def of(self, items: Sequence[Passage | SearchRequest]) -> np.ndarray:
        keys = [hashlib.blake2b(repr(text_of(item)).encode(), digest_size=12).hexdigest() for item in items]
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in self.known}
        encode = self.retriever.encode_passages if isinstance(items[0], Passage) else self.retriever.encode_queries
        for start in range(0, len(new), 512):
            part = list(new.items())[start : start + 512]
            encoded = encode([item for _, item in part])
            self.known.update(zip((key for key, _ in part), encoded, strict=True))
            with atomic_path(self.cache) as temporary, temporary.open("wb") as stream:
                np.savez(stream, keys=np.array(list(self.known)), vectors=np.stack(list(self.known.values())))
        return np.stack([self.known[key] for key in keys])

    def search(self, world: World, texts: Sequence[str]) -> list[list[int]]:
        scores_QP = self.of([SearchRequest(query=text) for text in texts]) @ self.of(world.passages).T
        rows: list[list[int]] = np.argsort(-scores_QP, axis=1, kind="stable")[:, : max(DEPTHS)].tolist()
        return rows


def text_of(item: Passage | SearchRequest) -> tuple[str, str]:
    return ("passage", item.contents) if isinstance(item, Passage) else ("query", item.query)


def suffices(question: Question, hop: int) -> bool:
    meta = question.metadata
    return not meta.get("elliptic", [False] * meta["hops"])[hop] and not meta["namesake_doc_ids"][hop]


def misled(question: Question, hop: int, ids: Sequence[str]) -> bool:
    """Whether the first of three passages that states this relation under this name is not the gold one."""
    meta, gold = question.metadata, question.metadata["gold_doc_ids"][hop]
    wrong = {*meta["namesake_doc_ids"][hop], *meta.get("misleading_doc_ids", [()] * meta["hops"])[hop]}
    return next((id for id in ids[:3] if id == gold or id in wrong), gold) != gold


def row(questions: Sequence[Question], found: Found) -> list[float]:
    hops = [
        (question, hop, ids)
        for question, of_hops in zip(questions, found, strict=True)
        for hop, ids in enumerate(of_hops)
    ]
    recall = [np.mean([q.metadata["gold_doc_ids"][hop] in ids[:depth] for q, hop, ids in hops]) for depth in DEPTHS]
    perfect = np.mean(
        [
            all(gold in ids[:3] for gold, ids in zip(question.metadata["gold_doc_ids"], of_hops, strict=True))
            for question, of_hops in zip(questions, found, strict=True)
        ]
    )
    return [100 * float(value) for value in (*recall, perfect, np.mean([misled(*hop) for hop in hops]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--questions", type=int, default=300, help="development questions of each world")
    parser.add_argument("--retriever", default="builtin:minilm", help="empty: BM25 alone")
    parser.add_argument("--cache", type=Path, default=Path("runs/world_causes.npz"))
    args = parser.parse_args()
    args.cache.parent.mkdir(parents=True, exist_ok=True)
    vectors = Vectors(args.retriever, args.cache) if args.retriever else None
    print("| world | passages | query suffices | search, input | r@3 | r@20 | perfect | misled |\n|" + "---|" * 8)
    worlds = {"today's": (), **{name: (name,) for name in CAUSES}, "all four": CAUSES}
    for name, causes in worlds.items():
        sizes = {"train_questions": 0, "dev_questions": args.questions, "test_questions": 0}
        world = build_world(WorldConfig(seed=args.seed, **sizes, **dict.fromkeys(causes, args.share)))
        questions = world.questions["dev"]
        clear = 100 * np.mean([suffices(q, hop) for q in questions for hop in range(q.metadata["hops"])])
        for search in [bm25, *([vectors.search] if vectors else [])]:
            for form in (query_only, question_query):
                found = by_question(questions, search(world, queries(questions, form)), world)
                label = f"{'BM25' if search is bm25 else args.retriever}, {form.__name__}"
                cells = " | ".join(f"{value:.1f}" for value in row(questions, found))
                print(f"| {name} | {len(world.passages)} | {clear:.0f} | {label} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
