"""Hybrid search against its parts: recall@3 and @20 of the gold passages, with paired differences.

    python tests/benchmarks/hybrid.py --out DIR [--seeds 0 1 2] [--questions 500]

Searches with BM25, MiniLM and their fusion by reciprocal rank, on

- the quick start's generated world, one per seed: every hop of every test question, with the query of an agent that
  knows the hops before, and the question;
- HotpotQA in `$AGENTIC_R_DATA` (left out where that is not set): the test questions on the pooled corpus.

A request's recall is the share of its gold passages. Intervals are 95 % bootstrap intervals over requests. Indexes are
kept in DIR; stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from agentic_r_plugin.backends import SearchSpec, open_search
from agentic_r_plugin.config import load_config
from agentic_r_plugin.evaluation.statistics import bootstrap_interval, paired_difference
from agentic_r_plugin.forms import listed
from agentic_r_plugin.iterate import IterateConfig
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.records import Question
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.world.questions import hop_query
from tests.benchmarks.pruning import ROOT, command

DEPTHS = (3, 20)
Requests = list[tuple[SearchRequest, frozenset[str]]]
"""A search and the ids of its gold passages."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the worlds and indexes")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="worlds to generate")
    parser.add_argument("--questions", type=int, default=None, help="only the first N questions of each")
    args = parser.parse_args()
    worlds = [measured(*world(args.out / f"world-{seed}", seed, args.questions)) for seed in args.seeds]
    for seed, found in zip(args.seeds, worlds, strict=True):
        report(f"Generated world, seed {seed}", found)
    if len(worlds) > 1:
        pooled = {name: {k: [x for found in worlds for x in found[name][k]] for k in DEPTHS} for name in worlds[0]}
        report(f"Generated worlds, seeds {', '.join(map(str, args.seeds))} together", pooled)
    if data := os.environ.get("AGENTIC_R_DATA"):
        report("HotpotQA", measured(*hotpotqa(Path(data) / "hotpotqa", args.questions), args.out / "hotpotqa"))


def world(out: Path, seed: int, number: int | None) -> tuple[Path, Requests, Path]:
    """Corpus, requests and folder of the quick start's world with another seed."""
    asked = vars(load_config(IterateConfig, ROOT / "recipes" / "quickstart" / "loop.yaml").world)
    asked = {key: value for key, value in asked.items() if key != "out" and value is not None} | {"seed": seed}
    command("world", "--out", str(out), *(f"{key}={value}" for key, value in asked.items()))
    corpus = next(out.glob("*/corpus.jsonl"))
    hops = [
        (SearchRequest(query=hop_query(question, hop), question=question.question), frozenset([gold]))
        for question in list(read_questions(corpus.with_name("test.jsonl")))[:number]
        for hop, gold in enumerate(gold_ids(question))
    ]
    return corpus, hops, out


def hotpotqa(data: Path, number: int | None) -> tuple[Path, Requests]:
    """Corpus and requests of HotpotQA."""
    questions = list(read_questions(data / "test.jsonl"))[:number]
    return data / "corpus.jsonl", [(SearchRequest(query=q.question), frozenset(gold_ids(q))) for q in questions]


def gold_ids(question: Question) -> list[str]:
    """Ids of the gold passages; in the generated world one per hop."""
    return listed(question.metadata, "gold_doc_ids")


Recalls = Mapping[str, Mapping[int, Sequence[float]]]
"""Search -> depth -> recall of each request."""


def measured(corpus: Path, requests: Requests, out: Path) -> dict[str, dict[int, list[float]]]:
    """Recalls of each search."""
    command("index", "--corpus", str(corpus), "--retriever", "builtin:minilm", "--out", str(out / "index"))
    shared = {"corpus": str(corpus), "index": str(out / "index")}
    found: dict[str, dict[int, list[float]]] = {}
    for name, backend in (("BM25", "bm25"), ("MiniLM", "faiss"), ("hybrid", "hybrid")):
        with open_search(SearchSpec(backend=backend, **shared)) as search:
            hits = search.search([request for request, _ in requests], max(DEPTHS))
        ids = [[hit.passage.id for hit in row] for row in hits]
        found[name] = {
            depth: [len(gold & set(row[:depth])) / len(gold) for row, (_, gold) in zip(ids, requests, strict=True)]
            for depth in DEPTHS
        }
    return found


def report(title: str, found: Recalls) -> None:
    """Print recalls, and the hybrid's difference to each part."""
    print(f"\n{title}, {len(found['hybrid'][DEPTHS[0]])} searches\n")
    print("| search | recall@3 | recall@20 | hybrid minus it @3 | @20 |\n|---|---|---|---|---|")
    for name, recalls in found.items():
        cells = []
        for depth in DEPTHS:
            mean = bootstrap_interval(recalls[depth])
            cells.append(f"{100 * mean.mean:.1f} [{100 * mean.low:.1f}, {100 * mean.high:.1f}]")
        for depth in DEPTHS if name != "hybrid" else ():
            change = paired_difference(recalls[depth], found["hybrid"][depth])
            cells.append(f"{100 * change.difference:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}]")
        print(f"| {' | '.join([name, *cells] + [''] * (4 - len(cells)))} |")


if __name__ == "__main__":
    main()
