"""Hybrid search against its parts: recall@3 and @20 of the gold passages, with paired differences.

    python tests/benchmarks/hybrid.py --out DIR [--seeds 0 1 2] [--questions 500] [--reranker MODEL [--depth 50]]

Searches with BM25, MiniLM and their fusion by reciprocal rank, each also with the reranker where one is given, on

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

from agentic_r_plugin.backends import RerankSpec, SearchSpec, open_search
from agentic_r_plugin.config import load_config
from agentic_r_plugin.evaluation.statistics import bootstrap_interval, paired_difference
from agentic_r_plugin.field_values import listed
from agentic_r_plugin.iterate import IterateConfig
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.records import Question
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.world.questions import hop_query
from tests.benchmarks.pruning import ROOT, command

DEPTHS = (3, 20)
SEARCHES = {"BM25": "bm25", "MiniLM": "faiss", "hybrid": "hybrid"}
"""Name -> search backend."""
Requests = list[tuple[SearchRequest, frozenset[str]]]
"""A search and the ids of its gold passages."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the worlds and indexes")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="worlds to generate")
    parser.add_argument("--questions", type=int, default=None, help="only the first N questions of each")
    parser.add_argument("--reranker", default="", help="cross-encoder that reranks the best passages")
    parser.add_argument("--depth", type=int, default=50, help="passages that it reranks; at least 20")
    args = parser.parse_args()
    rerank = RerankSpec(model=args.reranker, depth=args.depth)
    worlds = []
    for seed in args.seeds:
        worlds.append(measured(*world(args.out / f"world-{seed}", seed, args.questions), rerank))
        report(f"Generated world, seed {seed}", worlds[-1])
    if len(worlds) > 1:
        pooled = {name: {k: [x for found in worlds for x in found[name][k]] for k in DEPTHS} for name in worlds[0]}
        report(f"Generated worlds, seeds {', '.join(map(str, args.seeds))} together", pooled)
    if data := os.environ.get("AGENTIC_R_DATA"):
        asked = hotpotqa(Path(data) / "hotpotqa", args.questions)
        report("HotpotQA", measured(*asked, args.out / "hotpotqa", rerank))


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


def measured(corpus: Path, requests: Requests, out: Path, rerank: RerankSpec) -> dict[str, dict[int, list[float]]]:
    """Recalls of each search."""
    command("index", "--corpus", str(corpus), "--retriever", "builtin:minilm", "--out", str(out / "index"))
    found: dict[str, dict[int, list[float]]] = {}
    for used in [RerankSpec(), rerank] if rerank.on else [rerank]:
        for name, backend in SEARCHES.items():
            spec = SearchSpec(backend=backend, corpus=str(corpus), index=str(out / "index"), rerank=used)
            with open_search(spec) as search:
                hits = search.search([request for request, _ in requests], max(DEPTHS))
            ids = [[hit.passage.id for hit in row] for row in hits]
            found[f"{name}, reranked" if used.on else name] = {
                depth: [len(gold & set(row[:depth])) / len(gold) for row, (_, gold) in zip(ids, requests, strict=True)]
                for depth in DEPTHS
            }
    return found


def report(title: str, found: Recalls) -> None:
    """Print recalls and differences: the hybrid's to its parts, and what reranking adds to each search."""
    print(f"\n{title}, {len(found['hybrid'][DEPTHS[0]])} searches\n")
    print("| search | recall@3 | recall@20 |\n|---|---|---|")
    for name, recalls in found.items():
        means = (bootstrap_interval(recalls[depth]) for depth in DEPTHS)
        print(f"| {name} | {' | '.join(f'{shown(m.mean)} [{shown(m.low)}, {shown(m.high)}]' for m in means)} |")
    pairs = [(part + end, "hybrid" + end) for end in ("", ", reranked") for part in ("BM25", "MiniLM")]
    pairs += [(name, f"{name}, reranked") for name in SEARCHES]
    print("\n| difference | recall@3 | recall@20 |\n|---|---|---|")
    for before, after in (pair for pair in pairs if pair[1] in found):
        changes = (paired_difference(found[before][depth], found[after][depth]) for depth in DEPTHS)
        cells = (f"{shown(c.difference, '+')} [{shown(c.low, '+')}, {shown(c.high, '+')}]" for c in changes)
        print(f"| {before} → {after} | {' | '.join(cells)} |", flush=True)


def shown(share: float, sign: str = "") -> str:
    """A share or a difference in per cent."""
    return f"{100 * share:{sign}.1f}"


if __name__ == "__main__":
    main()
