"""Training groups from questions whose supporting passages are known, without an agent.

    python recipes/retriever/make_groups.py --data DIR/hotpotqa --split train --out runs/groups.jsonl

The query is what an agent searches first: the content words of the question. Every supporting passage gives a group,
all under turn 1 of the question, so a query has as many known positives; its negatives are drawn from the best BM25
hits that are not supporting. With `--pool FILE` the passages of the split's own questions (supporting and distractors)
are written as a separate corpus. With `--scored FOLDER` the hits of each whole question, and their relevance (100:
supporting, else 0), are written as `candidates.jsonl` and `relevance.jsonl` for `train-reranker`.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from keywords import keywords

from agentic_r_plugin.cli import reported
from agentic_r_plugin.evaluation.benchmarks import split_file
from agentic_r_plugin.field_values import listed
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.records import Candidates, CorpusLine, Group, Question, Relevance, ScoredPassage
from agentic_r_plugin.search.backends import BM25Backend
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.storage.claim import require_new
from agentic_r_plugin.store import write_records

QUERY_WORDS = 10


def make_groups(
    questions: Sequence[Question], search: BM25Backend, *, candidates: int, negatives: int, seed: int
) -> Iterator[Group]:
    """Groups of each question, one for each supporting passage, sharing their negatives.

    Args:
        search: over the corpus that holds the supporting passages.
        candidates: best hits that negatives are drawn from.
        seed: of drawing; the same questions give the same groups.
    """
    queries = [" ".join(keywords(item.question, limit=QUERY_WORDS)) or item.question for item in questions]
    found = search.search([SearchRequest(query=query) for query in queries], candidates)
    for question, query, hits in zip(questions, queries, found, strict=True):
        supporting = listed(question.metadata, "gold_doc_ids")
        others = [hit.passage.id for hit in hits if hit.passage.id not in supporting]
        # Seeded per question, so that more questions do not change the groups of the first ones.
        drawn = random.Random(f"{seed}/{question.id}").sample(others, min(negatives, len(others)))
        for positive in supporting:
            yield Group(
                id=question.id,
                turn=1,
                question=question.question,
                query=query,
                history=(),
                positive=positive,
                negatives=tuple(drawn),
            )


def write_scored(questions: Sequence[Question], search: BM25Backend, folder: Path, *, candidates: int) -> int:
    """Write the candidates of each question, the question being the query, and their relevance; returns how many."""
    found = search.search([SearchRequest(query=question.question) for question in questions], candidates)
    records, scores = [], []
    for item, hits in zip(questions, found, strict=True):
        supporting = listed(item.metadata, "gold_doc_ids")
        records.append(
            Candidates(
                id=item.id, turn=1, question=item.question, golden_answers=item.golden_answers, query=item.question,
                history=(), prefix="",
                passages=tuple(ScoredPassage(id=hit.passage.id, score=hit.score) for hit in hits),
            )
        )  # fmt: skip
        relevant = {hit.passage.id: 100 * (hit.passage.id in supporting) for hit in hits}
        scores.append(Relevance(id=item.id, turn=1, scores=relevant))
    write_records(folder / "relevance.jsonl", scores)
    return write_records(folder / "candidates.jsonl", records)


def write_pool(questions: Sequence[Question], search: BM25Backend, path: Path) -> int:
    """Write the passages of the questions' own contexts as a corpus; returns how many."""
    wanted = dict.fromkeys(id for item in questions for id in listed(item.metadata, "context_doc_ids"))
    passages = (search.corpus.by_id(identifier) for identifier in wanted)
    return write_records(path, (CorpusLine(id=item.id, contents=item.contents) for item in passages))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write groups and, if requested, the pool and the scored candidates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with corpus.jsonl and SPLIT.jsonl")
    parser.add_argument("--split", default="train")
    parser.add_argument("--questions", type=int, help="the first N; default: all")
    parser.add_argument("--candidates", type=int, default=20, help="BM25 hits that negatives are drawn from")
    parser.add_argument("--negatives", type=int, default=15, help="of a group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path, help="groups file to write")
    parser.add_argument("--pool", type=Path, help="corpus file to write")
    parser.add_argument("--scored", type=Path, help="folder for candidates and relevance to write")
    args = parser.parse_args(arguments)
    for path in filter(None, (args.out, args.pool, args.scored)):
        require_new(path, or_else="move it away")
    questions = list(islice(read_questions(split_file(args.data, args.split)), args.questions))
    search = BM25Backend(args.data / "corpus.jsonl")
    groups = make_groups(
        questions, search, candidates=args.candidates, negatives=args.negatives, seed=args.seed
    )  # fmt: skip
    print(f"{write_records(args.out, groups)} groups of {len(questions)} questions", file=sys.stderr)
    if args.pool:
        print(f"{write_pool(questions, search, args.pool)} passages in the pool", file=sys.stderr)
    if args.scored:
        written = write_scored(questions, search, args.scored, candidates=args.candidates)
        print(f"{written} questions with scored candidates", file=sys.stderr)


if __name__ == "__main__":
    with reported("make_groups.py"):
        main()
