"""A small judge of relevance: a cross-encoder trained on generated worlds of other seeds.

    python recipes/judge/train.py --out runs/judge
    agentic-r relevance ... --scorer cross_encoder options.model=runs/judge/model options.text=question_query

A pair is an agent's query (after its question) and a passage. The passage that states the fact is labelled 1. The other
candidates are labelled 0: statements of namesakes, misleading passages, and BM25's best passages. `judge.json` says how
well the judge does on a world that it was not trained on. An interrupted training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentic_r_plugin.cli import reported
from agentic_r_plugin.config import check_least, load_config
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.data.scorers.base import Resources, ScoringTask
from agentic_r_plugin.data.scorers.cross_encoder import CrossEncoderScorer
from agentic_r_plugin.errors import ConfigError, ManifestMismatchError
from agentic_r_plugin.records import Candidates, Passage, Question, ScoredPassage
from agentic_r_plugin.search.backends import BM25Backend
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.encoder import resolve
from agentic_r_plugin.store import read_json, read_records, write_json
from agentic_r_plugin.world import generate
from agentic_r_plugin.world.questions import hop_query

POSSIBLE_POSITIVE = 60
"""Lowest score of a positive (method section 4)."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A query, its candidates, and the one that states the fact."""

    task: ScoringTask
    gold: str


def judged_queries(args: argparse.Namespace, seed: int) -> Iterator[Judged]:
    """Queries about the training entities of one world, with `--candidates` passages each, the gold one among them."""
    sizes = {"train_questions": args.questions, "dev_questions": 0, "test_questions": 0}
    place = {"out": str(args.out / "worlds"), "name": str(seed), "seed": seed}
    generate.run(load_config(generate.WorldConfig, None, args.world, values=sizes | place), resume=True)
    folder, draw = args.out / "worlds" / str(seed), random.Random(f"judge {seed}")
    search = BM25Backend(folder / "corpus.jsonl")
    for question in read_records(folder / "train.jsonl", Question):
        hop = draw.randrange(question.metadata["hops"])
        query = hop_query(question, hop, draw.choice((0, 0, 1)))
        gold = question.metadata["gold_doc_ids"][hop]
        (hits,) = search.search([SearchRequest(query=query)], args.candidates)
        confused = [
            *question.metadata["namesake_doc_ids"][hop],
            *question.metadata.get("misleading_doc_ids", [[]] * question.metadata["hops"])[hop],
        ]
        # The gold passage comes first, so that the cut never removes it.
        ids = list(dict.fromkeys([gold, *confused, *(hit.passage.id for hit in hits)]))[: args.candidates]
        draw.shuffle(ids)
        passages = tuple(search.corpus.by_id(id) for id in ids)
        yield Judged(task=task(question, hop, query, passages), gold=gold)


def task(question: Question, hop: int, query: str, passages: tuple[Passage, ...]) -> ScoringTask:
    """The scoring task of one hop."""
    candidates = Candidates(
        id=question.id,
        turn=hop + 1,
        question=question.question,
        golden_answers=question.golden_answers,
        query=query,
        history=(),
        prefix="",
        passages=tuple(ScoredPassage(id=passage.id, score=0.0) for passage in passages),
    )
    return ScoringTask(query=candidates, passages=passages)


def train(args: argparse.Namespace) -> None:
    """Train and write `OUT/model`."""
    import torch
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from transformers import set_seed

    from agentic_r_plugin.retriever.reranker import fit

    set_seed(args.seed)  # for the new head
    model = CrossEncoder(resolve(args.base), num_labels=1, max_length=args.max_length, device=args.device)
    rows: dict[str, list[Any]] = {"query": [], "passage": [], "label": []}
    for seed in range(args.first_seed, args.first_seed + args.worlds):
        for judged in judged_queries(args, seed):
            asked = judged.task.query
            for passage in judged.task.passages:
                rows["query"].append(asked.query if args.text == "query" else f"{asked.question} {asked.query}")
                rows["passage"].append(f"{passage.title}\n{passage.text}")
                rows["label"].append(float(passage.id == judged.gold))
    fit(
        model,
        rows,
        # Scores are compared with a fixed threshold (POSSIBLE_POSITIVE). Unweighted, a judge in doubt gives the share
        # of gold passages among the candidates, about 17, and none reaches it.
        BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(rows["label"].count(0.0) / rows["label"].count(1.0))),
        args.out / "training",
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
        save_steps=args.save_steps,
    )
    unfinished = args.out / "model.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(str(unfinished))
    # Renamed when complete, because `main` takes a folder `model` as done.
    unfinished.rename(args.out / "model")


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """How well the judge does on a world that it was not trained on."""
    scorer = CrossEncoderScorer.build(
        {"model": str(args.out / "model"), "text": args.text, "device": args.device or "auto"},
        Resources(open_judge=_no_judge, cost=Cost()),
    )
    held_out = list(judged_queries(args, args.first_seed + args.worlds))
    scored = scorer.score([judged.task for judged in held_out])
    pairs = [(judged.gold, scores) for judged, scores in zip(held_out, scored, strict=True) if isinstance(scores, dict)]
    golds = [scores[gold] for gold, scores in pairs]
    others = [score for gold, scores in pairs for id, score in scores.items() if id != gold]
    return {
        "queries": len(pairs),
        "candidates": args.candidates,
        "gold_scores_highest": sum(scores[gold] == max(scores.values()) for gold, scores in pairs) / len(pairs),
        "gold_possible_positive": sum(score >= POSSIBLE_POSITIVE for score in golds) / len(golds),
        "others_possible_positive": sum(score >= POSSIBLE_POSITIVE for score in others) / len(others),
    }


def _no_judge() -> Any:
    raise AssertionError("a cross-encoder asks no language model")


def main() -> None:
    """Train unless the model is there, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--base", default="builtin:minilm", help="encoder to start from: folder, hub name, builtin:NAME"
    )
    parser.add_argument("--text", choices=["query", "question_query"], default="question_query")
    parser.add_argument("--first-seed", type=int, default=5000, help="of the worlds; benchmarks use smaller seeds")
    parser.add_argument("--worlds", type=int, default=6, help="worlds to train on; the next one is held out")
    parser.add_argument("--questions", type=int, default=200, help="queries of each world, one per question")
    parser.add_argument("--candidates", type=int, default=6, help="passages of each query")
    parser.add_argument("--world", nargs="+", default=[], metavar="key=value", help="settings of the worlds")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    # `quality` compares the gold passage with others, so one candidate is too few.
    try:
        check_least(args, "--", worlds=1, questions=1, candidates=2)
    except ConfigError as error:
        parser.error(str(error))
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "device", "save_steps")}
    note = args.out / "settings.json"
    if note.is_file() and read_json(note) != settings:
        raise ManifestMismatchError(f"{args.out} was begun with other settings; choose another --out")
    write_json(note, settings)
    if not (args.out / "judge.json").is_file():
        if not (args.out / "model").is_dir():
            train(args)
        write_json(args.out / "judge.json", quality(args))
    found = read_json(args.out / "judge.json")
    print(found)
    if found["gold_possible_positive"] < 0.5:
        print(
            f"few gold passages ({found['gold_possible_positive']:.0%}) reach {POSSIBLE_POSITIVE}, the lowest score of "
            "a positive: this judge gives few groups; train longer, or from a reranker (--base)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    with reported("judge/train.py"):
        main()
