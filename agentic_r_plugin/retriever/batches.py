"""Training groups, checked against the corpus and put into batches."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.records import Correctness, Group, Relevance
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.store import read_lines, read_records, shards

Key = tuple[str, int]
"""(question id, turn)."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A training group with its passages as rows of the corpus; of passages with the same text, the first one's row."""

    key: Key
    request: SearchRequest
    positive: int
    negatives: tuple[int, ...]
    known_positives: frozenset[int]
    """Positives of all groups of this query, this one's among them."""
    scores: tuple[float, ...] | None = None
    """Of the positive and each negative, where the trainer learns from scores."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One process' examples of a step, and the passages that the losses see."""

    examples: tuple[Example, ...]
    rows: tuple[int, ...]
    """Distinct corpus rows of the batch, all processes taken together, in order of first use."""
    counts: tuple[int, ...]
    """How many slots of the batch's groups hold each row."""


def read_examples(
    groups: str | Path, corpus: Corpus, scores: Mapping[Key, Mapping[str, float]] | None = None
) -> list[Example]:
    """All groups of a file, or of a folder of shards.

    Args:
        scores: of each query's passages, for trainers that learn from scores (`read_scores`).

    Raises:
        RecordError: a broken line, a group without negatives, a passage the corpus does not hold or that has no score,
            or a positive among its own negatives; names file and line. Also when there is no group at all.
    """
    read: list[Example] = []
    positives: dict[Key, set[int]] = defaultdict(set)
    rows = _Rows(corpus)
    lines = ((shard, number, data) for shard in shards(groups) for number, data in read_lines(shard))
    for shard, number, data in lines:
        try:
            group = Group.from_dict(data)
            if not group.negatives or group.positive in group.negatives:
                raise RecordError("expected negatives, and the positive not among them")
            key, passages = (group.id, group.turn), (group.positive, *group.negatives)
            positive, *negatives = [rows[passage] for passage in passages]
            found = None if scores is None else tuple(_score(scores, key, passage) for passage in passages)
        except RecordError as error:
            raise RecordError(str(error), path=shard, line=number) from error
        positives[key].add(positive)
        read.append(
            Example(
                key=key,
                request=SearchRequest(query=group.query, question=group.question, history=group.history),
                positive=positive,
                negatives=tuple(negatives),
                known_positives=frozenset(),
                scores=found,
            )
        )
    if not read:
        raise RecordError("no training groups; did any query get a positive?", path=groups)
    return [replace(item, known_positives=frozenset(positives[item.key])) for item in read]


class _Rows:
    """Passage id -> the first row among those of the same text that were asked for."""

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
    """What the score-based trainers learn from: relevance / 100, plus correctness (0 or 1), of those files given.

    Raises:
        ConfigError: neither file is given.
        RecordError: no such file or a broken record.
    """
    if not relevance and not correctness:
        raise ConfigError("this trainer learns from scores: give relevance=FILE, correctness=FILE, or both")
    parts: list[dict[Key, dict[str, float]]] = []
    if relevance:
        judged = read_records(relevance, Relevance)
        parts.append({(r.id, r.turn): {p: score / 100 for p, score in r.scores.items()} for r in judged})
    if correctness:
        rolled_out: dict[Key, dict[str, float]] = defaultdict(dict)
        for record in read_records(correctness, Correctness):
            rolled_out[record.id, record.turn][record.passage_id] = float(record.em)
        parts.append(dict(rolled_out))
    if len(parts) == 1:
        return parts[0]
    first, second = parts
    return {
        key: {passage: score + second[key][passage] for passage, score in found.items() if passage in second[key]}
        for key, found in first.items()
        if key in second
    }


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
    order: str = "shuffled",
    cross_device: bool = True,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Batches of one epoch, the same for the same seed; with several processes, those of process `rank`.

    Args:
        batch_size: examples of one process' batch.
        group_size: the positive and group_size - 1 negatives; where a group has more, each epoch draws others.
        order: `shuffled`, or `questions`: groups of one question stay together, so that more passages are shared.
        cross_device: whether rows and counts are those of all processes or of this one alone.
    """
    places = _order(examples, epoch, seed, order)
    places = places[: len(places) - len(places) % world] if len(places) >= world else places * world
    for start in range(0, len(places), batch_size * world):
        chosen = places[start : start + batch_size * world]
        picked = [_with_drawn_negatives(examples[i], i, epoch, seed, group_size - 1) for i in chosen]
        mine = picked[rank::world]
        slots = (row for item in (picked if cross_device else mine) for row in (item.positive, *item.negatives))
        counts = Counter(slots)
        yield Batch(examples=tuple(mine), rows=tuple(counts), counts=tuple(counts.values()))


def _order(examples: Sequence[Example], epoch: int, seed: int, order: str) -> list[int]:
    generator = random.Random(f"order {seed} {epoch}")
    if order == "shuffled":
        return generator.sample(range(len(examples)), len(examples))
    of_question: dict[str, list[int]] = defaultdict(list)
    for place, item in enumerate(examples):
        of_question[item.key[0]].append(place)
    questions = generator.sample(list(of_question), len(of_question))
    return [place for question in questions for place in of_question[question]]


def _with_drawn_negatives(example: Example, index: int, epoch: int, seed: int, count: int) -> Example:
    if len(example.negatives) <= count:
        return example
    drawn = random.Random(f"negatives {seed} {epoch} {index}").sample(range(len(example.negatives)), count)
    return replace(
        example,
        negatives=tuple(example.negatives[i] for i in drawn),
        scores=None if example.scores is None else (example.scores[0], *(example.scores[1 + i] for i in drawn)),
    )


def num_batches(num_examples: int, batch_size: int, world: int = 1) -> int:
    """Batches of one epoch of one process."""
    usable = num_examples - num_examples % world if num_examples >= world else num_examples * world
    return -(-usable // (batch_size * world))
