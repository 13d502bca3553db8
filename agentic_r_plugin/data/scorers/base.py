"""The interface of relevance scorers, which are components of kind `relevance_scorer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agentic_r_plugin import components
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.errors import ConfigError, JudgeError
from agentic_r_plugin.llm.base import ChatBackend
from agentic_r_plugin.records import Candidates, Passage, Question


@dataclass(frozen=True, kw_only=True)
class ScoringTask:
    """One query with everything a scorer may use."""

    query: Candidates
    passages: tuple[Passage, ...]
    """Candidates in retrieval order, with their texts."""
    question: Question | None = None
    """Benchmark record of the question, with its metadata; None if no questions file was given."""
    sub_answer: str | None = None
    """The information that the query looked for, if a judge could name it."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources that a scorer may use when it is built."""

    open_judge: Callable[[], ChatBackend]
    """Opens the judge model; only called by scorers that use one."""
    cost: Cost


class RelevanceScorer(Protocol):
    """Scores the candidates of a query together (method section 4, step 4).

    A scorer that asks a language model also has a static method `passages_per_prompt(options) -> int`: commands then
    check that a model is given, and forecast its cost.
    """

    needs_questions: bool
    """Whether every task must hold the benchmark record of its question."""

    @classmethod
    def build(cls, options: Mapping[str, Any], resources: Resources) -> RelevanceScorer:
        """Build the scorer from the command's options.

        Raises:
            ConfigError: unknown or invalid options.
        """

    def score(self, tasks: Sequence[ScoringTask]) -> list[dict[str, int] | JudgeError]:
        """Passage id -> 0..100 for every passage of each task, or the judge's error.

        Raises:
            BackendError: the judge's backend failed.
            RecordError: a task lacks what the scorer needs.
        """

    def fingerprint(self) -> str:
        """Changes whenever scores may change: model, prompt, options."""


def innermost(name: str, options: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and options of the scorer that reads the inputs: of one around another (with `around`), the inner one.

    Raises:
        UnknownComponentError: no such scorer.
        ConfigError: wrong options of a scorer around another.
    """
    scorer = components.load("relevance_scorer", name)
    return innermost(*scorer.around(options)) if hasattr(scorer, "around") else (name, options)


def reference(task: ScoringTask) -> str:
    """The line of a judge's prompt that gives the sub-answer, if it is known."""
    return f"Reference answer to the query: {task.sub_answer}\n" if task.sub_answer else ""


def check_options(scorer: str, options: Mapping[str, Any], *known: str) -> None:
    """Refuse unknown options of a scorer.

    Raises:
        ConfigError: an unknown option; the message lists the known ones.
    """
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"{scorer} has no option {unknown[0]!r}; it has {', '.join(sorted(known))}")
