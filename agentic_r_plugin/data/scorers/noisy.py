"""Relevance with errors at a stated rate, around another scorer: how good must a judge be?"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentic_r_plugin import components
from agentic_r_plugin.config import fingerprint, load_config
from agentic_r_plugin.data.scorers.base import RelevanceScorer, Resources, ScoringTask
from agentic_r_plugin.data.scorers.gold_documents import content_words
from agentic_r_plugin.errors import ConfigError, JudgeError

Scores = dict[str, int]


def _swap(scores: Scores, id: str, task: ScoringTask, draw: random.Random) -> Scores:
    """Exchange the passage's score with that of another candidate."""
    other = draw.choice([passage.id for passage in task.passages if passage.id != id])
    return scores | {id: scores[other], other: scores[id]}


def _overlap(scores: Scores, id: str, task: ScoringTask, draw: random.Random) -> Scores:
    """Raise the score to the share (percent) of the query's words that the passage contains."""
    asked, passage = content_words(task.query.query), next(item for item in task.passages if item.id == id)
    shared = len(asked & content_words(f"{passage.title} {passage.text}"))
    return scores | {id: max(scores[id], round(100 * shared / max(len(asked), 1)))}


def _tie(scores: Scores, id: str, task: ScoringTask, draw: random.Random) -> Scores:
    """Give the passage the score of the next better candidate; the best one stays."""
    return scores | {id: min((score for score in scores.values() if score > scores[id]), default=scores[id])}


WAYS: dict[str, Callable[[Scores, str, ScoringTask, random.Random], Scores]] = {
    "swap": _swap,
    "overlap": _overlap,
    "tie": _tie,
}
"""Kinds of errors."""


class Noisy:
    """Errors at a stated rate in the scores of another scorer (swaps, optimism for word overlap, ties).

    Each candidate is hit with probability `rate`, by one of the `ways` with equal probability. The draws depend on the
    seed, the question's id and the turn alone, so a query is always judged the same; a higher rate adds errors.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of this scorer."""

        scorer: str = "gold_documents"
        options: dict[str, Any] = field(default_factory=dict)
        rate: float = 0.2
        ways: list[str] = field(default_factory=lambda: list(WAYS))
        seed: int = 0

        def __post_init__(self) -> None:
            if not 0 <= self.rate <= 1:
                raise ConfigError(f"rate: expected a share from 0 to 1, found {self.rate}")
            if not self.ways or set(self.ways) - WAYS.keys():
                raise ConfigError(f"ways: expected some of {', '.join(WAYS)}, found {', '.join(self.ways) or 'none'}")

    needs_questions = False
    """The inner scorer decides: see `base.innermost`."""

    def __init__(self, inner: RelevanceScorer, options: Options) -> None:
        self.inner, self.options = inner, options

    @classmethod
    def around(cls, options: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
        """Name and options of the inner scorer.

        Raises:
            ConfigError: an unknown or wrong option.
        """
        found = cls._options(options)
        return found.scorer, found.options

    @classmethod
    def build(cls, options: Mapping[str, Any], resources: Resources) -> Noisy:
        """Build from `scorer`, its `options`, `rate`, `ways` and `seed`.

        Raises:
            ConfigError: an unknown or wrong option, here or of the inner scorer.
        """
        found = cls._options(options)
        inner = components.load("relevance_scorer", found.scorer).build(found.options, resources)
        return cls(inner, found)

    @classmethod
    def _options(cls, options: Mapping[str, Any]) -> Options:
        try:
            return load_config(cls.Options, values=options)
        except ConfigError as error:
            raise ConfigError(f"relevance scorer noisy: {error}") from error

    def score(self, tasks: Sequence[ScoringTask]) -> list[Scores | JudgeError]:
        """The inner scorer's scores with errors; its judge errors are passed on.

        Raises:
            BackendError, RecordError: raised by the inner scorer.
        """
        return [
            scores if isinstance(scores, JudgeError) else self._with_errors(dict(scores), task)
            for task, scores in zip(tasks, self.inner.score(tasks), strict=True)
        ]

    def _with_errors(self, scores: Scores, task: ScoringTask) -> Scores:
        draw = random.Random(f"noisy {self.options.seed} {task.query.id} {task.query.turn}")
        for passage in task.passages:
            # Every candidate takes three draws, hit or not: a higher rate adds hits and changes no other draw.
            hit, way, own = draw.random() < self.options.rate, draw.random(), random.Random(draw.random())
            if hit and len(task.passages) > 1:
                name = self.options.ways[int(way * len(self.options.ways))]
                scores = WAYS[name](scores, passage.id, task, own)
        return scores

    def fingerprint(self) -> str:
        """Identifies this version of the errors, the inner scorer and the options."""
        own = self.options
        return fingerprint("noisy/1", self.inner.fingerprint(), own.rate, own.ways, own.seed)
