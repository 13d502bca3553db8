"""Training groups, checked against the corpus and put into batches."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.records import Group
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.store import read_lines


@dataclass(frozen=True, kw_only=True)
class Example:
    """A training group with its passages as rows of the corpus."""

    request: SearchRequest
    positive: int
    negatives: tuple[int, ...]
    same_query: frozenset[int]
    """Positives of all groups of this query, this one's among them."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some examples and the distinct passages they need."""

    examples: tuple[Example, ...]
    rows: tuple[int, ...]
    """Corpus rows, each once, in order of first use."""


def read_examples(groups: str | Path, corpus: Corpus) -> list[Example]:
    """All groups of a file.

    Raises:
        RecordError: a broken line, a group without negatives, a passage the corpus does not hold, or a positive among
            its own negatives; names file and line. Also when there is no group at all.
    """
    read: list[tuple[Group, int, tuple[int, ...]]] = []
    positives: dict[tuple[str, int], set[int]] = defaultdict(set)
    for number, data in read_lines(groups):
        try:
            group = Group.from_dict(data)
            positive, *negatives = [_row(corpus, passage) for passage in (group.positive, *group.negatives)]
            if not negatives or positive in negatives:
                raise RecordError("expected negatives, and the positive not among them")
        except RecordError as error:
            raise RecordError(str(error), path=groups, line=number) from error
        read.append((group, positive, tuple(negatives)))
        positives[group.id, group.turn].add(positive)
    if not read:
        raise RecordError("no training groups; did any query get a positive?", path=groups)
    return [
        Example(
            request=SearchRequest(query=group.query, question=group.question, history=group.history),
            positive=positive,
            negatives=negatives,
            same_query=frozenset(positives[group.id, group.turn]),
        )
        for group, positive, negatives in read
    ]


def _row(corpus: Corpus, passage: str) -> int:
    row = corpus.row_of(passage)
    if row is None:
        raise RecordError(f"passage {passage!r} is not in the corpus {corpus.path}")
    return row


def epoch_batches(
    examples: Sequence[Example],
    *,
    epoch: int,
    seed: int,
    batch_size: int,
    group_size: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Batches of one epoch, the same for the same seed; with several processes, those of process `rank`.

    Args:
        batch_size: examples of one process' batch.
        group_size: the positive and group_size - 1 negatives; where a group has more, each epoch draws others.
    """
    order = random.Random(f"order {seed} {epoch}").sample(range(len(examples)), len(examples))
    order = order[: len(order) - len(order) % world] if len(order) >= world else order * world
    for start in range(0, len(order), batch_size * world):
        chosen = order[start : start + batch_size * world][rank::world]
        picked = tuple(_with_drawn_negatives(examples[i], i, epoch, seed, group_size - 1) for i in chosen)
        rows = dict.fromkeys(row for example in picked for row in (example.positive, *example.negatives))
        yield Batch(examples=picked, rows=tuple(rows))


def _with_drawn_negatives(example: Example, index: int, epoch: int, seed: int, count: int) -> Example:
    if len(example.negatives) <= count:
        return example
    drawn = random.Random(f"negatives {seed} {epoch} {index}").sample(example.negatives, count)
    return Example(
        request=example.request, positive=example.positive, negatives=tuple(drawn), same_query=example.same_query
    )


def num_batches(num_examples: int, batch_size: int, world: int = 1) -> int:
    """Batches of one epoch of one process."""
    usable = num_examples - num_examples % world if num_examples >= world else num_examples * world
    return -(-usable // (batch_size * world))
