"""Relevance: how well does each candidate answer its query? (method section 4, step 4)"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentic_r_plugin import components
from agentic_r_plugin.backends import LLMSpec, open_llm
from agentic_r_plugin.data.correctness import PassageStore
from agentic_r_plugin.data.groups import Key, query_units
from agentic_r_plugin.data.journal import Outcome
from agentic_r_plugin.data.scorers.base import RelevanceScorer, Resources, ScoringTask
from agentic_r_plugin.data.stage import UNRECORDED, Stage, run_stage
from agentic_r_plugin.errors import ConfigError, JudgeError, RecordError
from agentic_r_plugin.records import Candidates, Question, Relevance, SubAnswer
from agentic_r_plugin.rollout import RolloutCost
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.store import read_records


@dataclass(frozen=True, kw_only=True)
class RelevanceConfig:
    """Score the candidates of every query."""

    candidates: str = field(metadata={"help": "candidates file", **UNRECORDED})
    out: str = field(metadata={"help": "relevance file to write", **UNRECORDED})
    corpus: str = field(metadata={"help": "corpus of the candidates", **UNRECORDED})
    scorer: str = field(default="gold_documents", metadata={"help": "registered relevance_scorer"})
    questions: str = field(default="", metadata={"help": "questions file, for scorers that use metadata", **UNRECORDED})
    sub_answers: str = field(default="", metadata={"help": "sub-answers file, shown to a judge", **UNRECORDED})
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "the scorer's options"})
    llm: LLMSpec = field(default_factory=LLMSpec, metadata={"help": "the judge, where one is used", **UNRECORDED})
    max_error_share: float = field(
        default=0.1, metadata={"help": "largest share of queries the judge may fail on", **UNRECORDED}
    )
    batch_size: int = field(default=64, metadata={"help": "queries scored at once", **UNRECORDED})


def score_candidates(
    queries: Iterable[Candidates],
    scorer: RelevanceScorer,
    passages: PassageStore,
    *,
    questions: Mapping[str, Question] | None = None,
    sub_answers: Mapping[Key, str | None] | None = None,
) -> Iterator[Relevance | JudgeError]:
    """Relevance of each query's candidates, or what the judge did wrong; all queries given are scored at once.

    Args:
        queries: one batch.
        scorer: who scores.
        passages: the corpus.
        questions: the benchmark's lines by id, for scorers that use their metadata.
        sub_answers: what the queries were after, where known.

    Raises:
        RecordError: the corpus does not hold a candidate, or a question that the scorer needs is missing.
        BackendError: the judge's backend failed.
    """
    tasks = []
    for query in queries:
        question = (questions or {}).get(query.id)
        if scorer.needs_questions and question is None:
            raise RecordError(f"query {query.key}: question {query.id!r} is not in the questions file")
        tasks.append(
            ScoringTask(
                query=query,
                passages=tuple(passages.by_id(passage.id) for passage in query.passages),
                question=question,
                sub_answer=(sub_answers or {}).get(query.key),
            )
        )
    for task, scores in zip(tasks, scorer.score(tasks), strict=True):
        if isinstance(scores, JudgeError):
            yield scores
        else:
            yield Relevance(id=task.query.id, turn=task.query.turn, scores=scores)


def run(config: RelevanceConfig, *, resume: bool = False) -> None:
    """The command `relevance`."""
    with ExitStack() as stack:
        corpus, cost = stack.enter_context(Corpus(config.corpus)), RolloutCost()
        scorer: RelevanceScorer = components.load("relevance_scorer", config.scorer).build(
            config.options,
            Resources(open_judge=lambda: stack.enter_context(open_llm(config.llm)), cost=cost),  # type: ignore[arg-type,return-value]
        )
        inputs = {"candidates": Path(config.candidates)}
        if scorer.needs_questions and not config.questions:
            raise ConfigError(
                f"relevance: the scorer {config.scorer} uses the benchmark's metadata; give --questions FILE"
            )
        questions: dict[str, Question] = {}
        if config.questions:
            inputs["questions"] = Path(config.questions)
            questions = {question.id: question for question in read_records(config.questions, Question)}
        sub_answers: dict[Key, str | None] = {}
        if config.sub_answers:
            inputs["sub-answers"] = Path(config.sub_answers)
            sub_answers = {
                (item.id, item.turn): item.sub_answer for item in read_records(config.sub_answers, SubAnswer)
            }

        def work(batch: Iterable[Candidates]) -> Iterator[Outcome]:
            for scored in score_candidates(batch, scorer, corpus, questions=questions, sub_answers=sub_answers):
                yield Outcome(error=str(scored)) if isinstance(scored, JudgeError) else Outcome(records=(scored,))

        stage = Stage(
            name="relevance",
            config=config,
            out=Path(config.out),
            inputs=inputs,
            models={"scorer": scorer.fingerprint(), "corpus": corpus.fingerprint()},
            record=Relevance,
            units=lambda: query_units(config.candidates),
            work=work,
            batch_size=config.batch_size,
            cost=cost,
            max_error_share=config.max_error_share,
        )
        run_stage(stage, resume=resume)
