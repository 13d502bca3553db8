"""Relevance from the benchmark's own metadata, without a language model: the scorer of the embedded default."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agentic_r_plugin.answers import contains_answer, normalize, tokens
from agentic_r_plugin.config import fingerprint
from agentic_r_plugin.data.scorers.base import Resources, ScoringTask
from agentic_r_plugin.errors import ConfigError, JudgeError, RecordError
from agentic_r_plugin.field_values import listed
from agentic_r_plugin.records import Passage

_QUALIFIER = re.compile(r"\s*\([^()]*\)\s*$")  # as in "Emma (novel)", which queries leave out
_FUNCTION_WORDS = """
    about after also and are as at be been before but by can did do does during for from had has have he her his how in
    into is it its me name of on or over she than that their them they this to under was were what when where which
    while who whom whose why will with would
"""
_STOPWORDS = frozenset(_FUNCTION_WORDS.split())
_TITLE_NAMED = 0.5
"""Minimum share of a title's words in a query that counts as naming the title."""
_SHARES_WORDS = 0.25
"""Minimum share of the query's information (IDF) in a passage that counts as sharing words."""


class GoldDocuments:
    """Relevance from the benchmark's gold passages and word overlap; needs no model.

    Signals: `metadata.gold_doc_ids` of the question (the passages its answer was made from), or without them
    `metadata.supporting_titles`; `metadata.hop_answers` if present; and the words that the query shares with title and
    text, weighted by their rarity among the query's candidates. Neither agent nor correctness stage sees any of these.

    | score | passage |
    |---|---|
    | 81-100 | gold, and the query names its title |
    | 61-80 | gold, matched by other words, or the gold passage of another hop |
    | 41-59 | not gold, but the query names its title; 60 would make it a possible positive |
    | 21-40 | not gold, shares words with the query |
    | 0-20 | the rest |

    Within a band the score grows with the overlap; a gold passage that contains a hop's answer is in the upper half.
    """

    needs_questions = True

    @classmethod
    def build(cls, options: Mapping[str, Any], resources: Resources) -> GoldDocuments:
        """Build the scorer, which has no options.

        Raises:
            ConfigError: options were given.
        """
        if options:
            raise ConfigError(f"relevance scorer gold_documents has no options; found {', '.join(options)}")
        return cls()

    def score(self, tasks: Sequence[ScoringTask]) -> list[dict[str, int] | JudgeError]:
        """Scores of every task; never a JudgeError.

        Raises:
            RecordError: a question without `gold_doc_ids` and `supporting_titles`.
        """
        return [score_passages(task) for task in tasks]

    def fingerprint(self) -> str:
        """Identifies this version of the rule."""
        return fingerprint("gold_documents/1")


def score_passages(task: ScoringTask) -> dict[str, int]:
    """Passage id -> 0..100 for one query.

    Raises:
        RecordError: the question's metadata does not name a gold passage.
    """
    gold_ids, gold_titles, hop_answers = _metadata(task)
    words = [content_words(f"{passage.title} {passage.text}") for passage in task.passages]
    weight = _inverse_frequency(words)
    query = content_words(task.query.query)
    scores: dict[str, int] = {}
    for passage, passage_words in zip(task.passages, words, strict=True):
        # A word in no candidate weighs as if half a candidate held it, which is more than any other word.
        overlap = _share(query, passage_words, weight, unseen=math.log(1 + 2 * len(words)))
        named = _names_title(query, passage)
        if passage.id in gold_ids or (not gold_ids and normalize(passage.title) in gold_titles):
            holds_answer = contains_answer(passage.text, hop_answers)
            scores[passage.id] = _in_band(81 if named else 61, (overlap + holds_answer) / 2 if hop_answers else overlap)
        elif named:
            scores[passage.id] = min(_in_band(41, overlap), 59)
        else:
            scores[passage.id] = _in_band(21, overlap) if overlap >= _SHARES_WORDS else round(20 * overlap)
    return scores


def _metadata(task: ScoringTask) -> tuple[frozenset[str], frozenset[str], list[str]]:
    """(gold passage ids, normalised gold titles, hop answers)."""
    metadata = task.question.metadata if task.question is not None else {}
    ids = frozenset(listed(metadata, "gold_doc_ids"))
    titles = frozenset(map(normalize, listed(metadata, "supporting_titles")))
    if not ids and not titles:
        raise RecordError(
            f"question {task.query.id!r} has neither 'gold_doc_ids' nor 'supporting_titles' in its metadata, which "
            "the scorer gold_documents needs: take a benchmark that has them, or another scorer (listwise_judge)"
        )
    return ids, titles, listed(metadata, "hop_answers")


def content_words(text: str) -> frozenset[str]:
    """Normalised words that carry meaning.

    >>> sorted(content_words("Where was the author of Emma born?"))
    ['author', 'born', 'emma']
    """
    return frozenset(word for word in tokens(text.replace("-", " ")) if word not in _STOPWORDS)


def _names_title(query: frozenset[str], passage: Passage) -> bool:
    title = content_words(_QUALIFIER.sub("", passage.title))
    return bool(title) and len(title & query) >= _TITLE_NAMED * len(title)


def _inverse_frequency(documents: Sequence[Iterable[str]]) -> dict[str, float]:
    """Word -> its IDF over these documents, above 0."""
    count = Counter(word for words in documents for word in words)
    return {word: math.log(1 + len(documents) / number) for word, number in count.items()}


def _share(query: frozenset[str], passage: frozenset[str], weight: Mapping[str, float], unseen: float) -> float:
    """Share 0..1 of the query's information that the passage contains; words in no candidate weigh `unseen`."""
    total = sum(weight.get(word, unseen) for word in query)
    return sum(weight[word] for word in query & passage) / total if total else 0.0


def _in_band(lowest: int, share: float) -> int:
    """A score in `lowest .. lowest + 19`."""
    return lowest + round(19 * share)
