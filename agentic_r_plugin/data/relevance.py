"""Relevance: how well does each candidate answer its query? (method section 4, step 4)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from agentic_r_plugin import components
from agentic_r_plugin.backends import LLMSpec, open_llm
from agentic_r_plugin.config import BY_CONTENTS, FREE, options_of, setting
from agentic_r_plugin.data.inputs import PassageStore, QueryFiles, query_units
from agentic_r_plugin.data.judge import unit_result
from agentic_r_plugin.data.scorers.base import RelevanceScorer, Resources, ScoringTask, innermost
from agentic_r_plugin.data.stages.runner import RunnerSpec, StageWorker
from agentic_r_plugin.data.stages.stage import Stage, for_workers, run_stage
from agentic_r_plugin.errors import ConfigError, JudgeError, RecordError
from agentic_r_plugin.questions import FORMAT
from agentic_r_plugin.records import Candidates, Question, Relevance
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.storage.table import UnitResult


@dataclass(frozen=True, kw_only=True)
class RelevanceConfig:
    """Score the candidates of every query."""

    candidates: str = setting("candidates file", BY_CONTENTS)
    out: str = setting("relevance file to write", FREE)
    corpus: str = setting("corpus of the candidates", BY_CONTENTS)
    scorer: str = setting("registered relevance_scorer", default="gold_documents")
    questions: str = setting("questions file, for scorers that use metadata", BY_CONTENTS, default="")
    format: str = field(default="", metadata=FORMAT)
    sub_answers: str = setting("sub-answers file, shown to a judge", BY_CONTENTS, default="")
    options: dict[str, Any] = setting(
        "the scorer's options", options_of("relevance_scorer", "scorer"), default_factory=dict
    )
    llm: LLMSpec = setting("the judge, where one is used", default_factory=LLMSpec)
    max_error_share: float = setting("largest share of queries the judge may fail on", FREE, default=0.1)
    batch_size: int = setting("queries scored at once", FREE, default=64)
    runner: RunnerSpec = setting("where it runs", FREE, default_factory=RunnerSpec)

    @property
    def needs_questions(self) -> bool:
        """Whether the scorer, or the one inside it, uses the benchmark record of each question."""
        name, _ = innermost(self.scorer, self.options)
        return bool(components.load("relevance_scorer", name).needs_questions)

    def passages_per_prompt(self) -> int:
        """Number of passages in one prompt of the scorer's judge; 0 if the scorer asks no language model."""
        name, options = innermost(self.scorer, self.options)
        asked = getattr(components.load("relevance_scorer", name), "passages_per_prompt", None)
        return int(asked(options)) if asked else 0

    def check(self) -> None:
        """Raise ConfigError if the scorer is unknown or a file that it needs is missing."""
        if self.needs_questions and not self.questions:
            raise ConfigError(
                f"relevance: the scorer {self.scorer} uses the benchmark's metadata; give --questions FILE"
            )


def task_of(
    query: Candidates, passages: PassageStore, *, question: Question | None = None, sub_answer: str | None = None
) -> ScoringTask:
    """The scoring task of a query: the query with the texts of its candidates.

    Raises:
        RecordError: the corpus does not hold a candidate.
    """
    found = tuple(passages.by_id(passage.id) for passage in query.passages)
    return ScoringTask(query=query, passages=found, question=question, sub_answer=sub_answer)


def score_candidates(tasks: Sequence[ScoringTask], scorer: RelevanceScorer) -> list[Relevance | JudgeError]:
    """Relevance of each query's candidates, or the judge's error; all queries are scored in one call.

    Raises:
        BackendError: the judge's backend failed.
    """
    return [
        scores
        if isinstance(scores, JudgeError)
        else Relevance(id=task.query.id, turn=task.query.turn, scores=dict(scores))
        for task, scores in zip(tasks, scorer.score(tasks), strict=True)
    ]


class RelevanceWorker(StageWorker):
    """Scores batches of queries; holds the scorer and its judge."""

    def __init__(self, config: RelevanceConfig) -> None:
        super().__init__()
        resources = Resources(
            open_judge=lambda: self.models.enter_context(open_llm(config.llm)),  # type: ignore[arg-type,return-value]
            cost=self.cost,
        )
        self._scorer: RelevanceScorer = components.load("relevance_scorer", config.scorer).build(
            config.options, resources
        )

    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of the scorer."""
        return {"scorer": self._scorer.fingerprint()}

    def work(self, batch: Sequence[ScoringTask]) -> list[UnitResult]:
        """Relevance of each query's candidates, or the judge's error."""
        return [
            unit_result(scored) if isinstance(scored, JudgeError) else UnitResult(records=(scored,))
            for scored in score_candidates(batch, self._scorer)
        ]


def run(config: RelevanceConfig, *, resume: bool = False) -> None:
    """Run the command `relevance`."""
    config.check()
    files = QueryFiles(
        Path(config.out).parent, questions=config.questions, format=config.format, sub_answers=config.sub_answers
    )
    with Corpus(config.corpus) as corpus:
        needs_question = config.needs_questions

        def prepare(query: Candidates) -> ScoringTask:
            question = files.question(query)
            if needs_question and question is None:
                raise RecordError(f"query {query.key}: question {query.id!r} is not in the questions file")
            return task_of(query, corpus, question=question, sub_answer=files.sub_answer(query))

        stage = Stage(
            name="relevance",
            config=config,
            inputs={"candidates": Path(config.candidates), **files.paths},
            models={"corpus": corpus.fingerprint()},
            record=Relevance,
            units=lambda: query_units(config.candidates),
            prepare=prepare,
            sides=files.opened,
            worker=partial(RelevanceWorker, for_workers(config)),
            batch_size=config.batch_size,
        )
        run_stage(stage, resume=resume)
