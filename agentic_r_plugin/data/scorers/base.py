"""What the relevance stage asks of a scorer. Scorers are components of kind `relevance_scorer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agentic_r_plugin.errors import ConfigError, JudgeError
from agentic_r_plugin.llm.base import ChatBackend
from agentic_r_plugin.records import Candidates, Passage, Question
from agentic_r_plugin.rollout import RolloutCost


@dataclass(frozen=True, kw_only=True)
class ScoringTask:
    """One query with all that a scorer may look at."""

    query: Candidates
    passages: tuple[Passage, ...]
    """The candidates in retrieval order, with their texts."""
    question: Question | None = None
    """The benchmark's line for the question, with its metadata; None where no questions file was given."""
    sub_answer: str | None = None
    """What the query was after, where a judge knew."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a scorer may be built with."""

    open_judge: Callable[[], ChatBackend]
    """Opens the judge model; only scorers that use one call it."""
    cost: RolloutCost


class RelevanceScorer(Protocol):
    """Scores the candidates of a query together (method section 4, step 4)."""

    needs_questions: bool
    """Whether every task must hold the benchmark's line."""

    @classmethod
    def build(cls, options: Mapping[str, Any], resources: Resources) -> RelevanceScorer:
        """From the command's options.

        Raises:
            ConfigError: unknown or impossible options.
        """

    def score(self, tasks: Sequence[ScoringTask]) -> list[dict[str, int] | JudgeError]:
        """Passage id -> 0..100 for every passage of each task, or what the judge did wrong.

        Raises:
            BackendError: the judge's backend failed.
            RecordError: a task lacks what the scorer needs.
        """

    def fingerprint(self) -> str:
        """Changes when the scores may change: model, prompt, options."""


def reference(task: ScoringTask) -> str:
    """The line of a judge's prompt that shows what the query was after, where that is known."""
    return f"Reference answer to the query: {task.sub_answer}\n" if task.sub_answer else ""


def check_options(scorer: str, options: Mapping[str, Any], *known: str) -> None:
    """Refuse an option that a scorer does not have.

    Raises:
        ConfigError: names it and those there are.
    """
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"{scorer} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}")
