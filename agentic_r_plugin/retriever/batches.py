"""Read training groups, check them against the corpus and form batches."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agentic_r_plugin.errors import ConfigError, RecordError, located
from agentic_r_plugin.query import needs_reasoning
from agentic_r_plugin.records import Correctness, Group, Relevance
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.store import placed_records, read_records

Key = tuple[str, int]
"""(question id, turn)."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A training group with its passages as corpus rows. Passages with the same text share the row of the first one."""

    key: Key
    request: SearchRequest
    positive: int
    negatives: tuple[int, ...]
    known_positives: frozenset[int]
    """Positives of all groups of this query, including this one."""
    scores: tuple[float, ...] | None = None
    """Scores of the positive and each negative, for trainers that learn from scores."""
    weight: float = 1.0
    """Factor of this example's loss."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The examples of one process in one step, and the passages that enter the loss."""

    examples: tuple[Example, ...]
    rows: tuple[int, ...]
    """Distinct corpus rows of the batch over all processes, in order of first use."""
    counts: tuple[int, ...]
    """Number of slots of the batch's groups that hold each row."""


def read_examples(
    groups: str | Path, corpus: Corpus, scores: Mapping[Key, Mapping[str, float]] | None = None
) -> list[Example]:
    """Read all groups of a file, or of a folder of shards.

    Args:
        scores: scores of each query's passages, for trainers that learn from scores (`read_scores`).

    Raises:
        RecordError: a broken line, a group without negatives, a positive among its own negatives, or a passage that is
            missing from the corpus or has no score, with file and line; or there is no group at all.
    """
    read: list[Example] = []
    positives: dict[Key, set[int]] = defaultdict(set)
    rows = _Rows(corpus)
    for shard, number, group in placed_records(groups, Group):
        with located(shard, number):
            if not group.negatives:
                raise RecordError("expected negatives, found none")
            if not 0 < group.weight < math.inf:
                raise RecordError(f"expected a weight above 0, found {group.weight}")
            key, passages = (group.id, group.turn), (group.positive, *group.negatives)
            positive, *negatives = [rows[passage] for passage in passages]
            found = None if scores is None else tuple(_score(scores, key, passage) for passage in passages)
        positives[key].add(positive)
        read.append(
            Example(
                key=key,
                request=SearchRequest.of(group),
                positive=positive,
                negatives=tuple(negatives),
                known_positives=frozenset(),  # known once all groups are read
                scores=found,
                weight=group.weight,
            )
        )
    if not read:
        raise RecordError("no training groups; did any query get a positive?", path=groups)
    return [replace(item, known_positives=frozenset(positives[item.key])) for item in read]


class _Rows:
    """Passage id -> row. All passages with the same text get the row of the one that was looked up first."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._by_id: dict[str, int] = {}
        self._by_text: dict[str, int] = {}

    def __getitem__(self, passage: str) -> int:
        if passage not in self._by_id:
            row = self._corpus.row_of(passage)
            if row is None:
                raise RecordError(f"passage {passage!r} is not in the corpus {self._corpus.path}")
            self._by_id[passage] = self._by_text.setdefault(self._corpus[row].contents, row)
        return self._by_id[passage]


def read_scores(relevance: str | None, correctness: str | None) -> dict[Key, dict[str, float]]:
    """Read the teacher scores: relevance / 100, plus correctness (0 or 1), from whichever files are given.

    Raises:
        ConfigError: neither file is given.
        RecordError: no such file or a broken record.
    """
    if not relevance and not correctness:
        raise ConfigError("this trainer learns from scores: give relevance=FILE, correctness=FILE, or both")
    judged: dict[Key, dict[str, float]] = {}
    for scored in read_records(relevance, Relevance) if relevance else ():
        judged[scored.id, scored.turn] = {passage: score / 100 for passage, score in scored.scores.items()}
    rolled_out: dict[Key, dict[str, float]] = defaultdict(dict)
    for outcome in read_records(correctness, Correctness) if correctness else ():
        rolled_out[outcome.id, outcome.turn][outcome.passage_id] = float(outcome.em)
    if not relevance or not correctness:
        return judged if relevance else dict(rolled_out)
    # The sum needs both scores, so a passage that only one of the files covers gets no score at all.
    return {
        key: {passage: score + correct[passage] for passage, score in judged[key].items() if passage in correct}
        for key, correct in rolled_out.items()
        if key in judged
    }


def require_reasoning(formulation: str, requests: Iterable[SearchRequest], what: str, path: str) -> None:
    """Check that some records hold the agent's reasoning, if the formulation reads it.

    Args:
        what: name of one record, for the message.

    Raises:
        RecordError: the formulation reads the reasoning, and no request holds any.
    """
    if needs_reasoning(formulation) and not any(request.reasoning for request in requests):
        raise RecordError(
            f"no {what} holds the agent's reasoning, which the formulation {formulation!r} reads; construct the data "
            "again from candidates with reasoning=true",
            path=path,
        )


def _score(scores: Mapping[Key, Mapping[str, float]], key: Key, passage: str) -> float:
    if passage not in scores.get(key, {}):
        raise RecordError(
            f"no score for passage {passage!r} of query {key}; relevance and correctness must hold every passage of "
            "the groups (agentic-r correctness --exhaustive)"
        )
    return scores[key][passage]


def epoch_batches(
    examples: Sequence[Example],
    *,
    epoch: int,
    seed: int,
    batch_size: int,
    group_size: int,
    cross_device: bool = True,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Yield the batches of one epoch for process `rank`. The same seed gives the same batches.

    Args:
        batch_size: examples per process and batch.
        group_size: passages per group: the positive and group_size - 1 negatives. From a group with more negatives,
            each epoch draws a new sample.
        cross_device: whether rows and counts cover all processes or only this one.
    """
    # `Random` hashes a text itself, so every process draws the same order.
    places = random.Random(f"order {seed} {epoch}").sample(range(len(examples)), len(examples))
    # Every process must run the same number of steps, or the collective operations would wait forever: a remainder is
    # left out (another one in each epoch), and fewer examples than processes are repeated.
    places = places[: len(places) - len(places) % world] if len(places) >= world else places * world
    for start in range(0, len(places), batch_size * world):
        chosen = places[start : start + batch_size * world]
        # All processes draw the whole batch from the same seed, so no passage lists need to be exchanged.
        picked = [_with_drawn_negatives(examples[i], i, epoch, seed, group_size - 1) for i in chosen]
        mine = picked[rank::world]
        slots = (row for item in (picked if cross_device else mine) for row in (item.positive, *item.negatives))
        # Keys are in order of first use, so columns are numbered alike in every process.
        counts = Counter(slots)
        yield Batch(examples=tuple(mine), rows=tuple(counts), counts=tuple(counts.values()))


def _with_drawn_negatives(example: Example, index: int, epoch: int, seed: int, count: int) -> Example:
    if len(example.negatives) <= count:
        return example
    # The seed names epoch and example, not the order of calls: a resumed run draws the same negatives.
    drawn = random.Random(f"negatives {seed} {epoch} {index}").sample(range(len(example.negatives)), count)
    return replace(
        example,
        negatives=tuple(example.negatives[i] for i in drawn),
        scores=None if example.scores is None else (example.scores[0], *(example.scores[1 + i] for i in drawn)),
    )


def num_batches(num_examples: int, batch_size: int, world: int = 1) -> int:
    """Number of batches per epoch and process."""
    usable = num_examples - num_examples % world if num_examples >= world else num_examples * world
    return -(-usable // (batch_size * world))
