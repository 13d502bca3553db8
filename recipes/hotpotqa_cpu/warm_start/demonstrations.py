"""Scripted search trajectories for a supervised warm start, from questions whose supporting passages are known.

A script (`scripted_agent.py`) plays the agent in a real `Session` over the real corpus, so ids and mask have the
same form as in the agent's own trajectories. Supporting passages that the retriever misses are inserted into the
results, except in some trajectories that demonstrate a second attempt.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agentic_r_plugin.errors import ConfigError, RecordError, SearchRefusedError
from agentic_r_plugin.field_values import listed
from agentic_r_plugin.protocol import AgentProtocol, Codec, Finished, Limits, Search
from agentic_r_plugin.records import Passage, Question, StopReason
from agentic_r_plugin.search.base import SearchBackend, SearchRequest, search_each
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.session import Session
from recipes.hotpotqa_cpu.warm_start.scripted_agent import THOUGHTS, Script, write_turn


@dataclass(frozen=True, kw_only=True)
class DemonstrationSettings:
    """How the script searches."""

    topk: int = field(default=3, metadata={"help": "passages shown for a search"})
    fewer_passages_share: float = field(
        default=0.4, metadata={"help": "share of trajectories that are shown fewer than topk passages"}
    )
    retry_share: float = field(
        default=0.3, metadata={"help": "share of missed supporting passages that are really missed the first time"}
    )
    thoughts: str = field(
        default="question",
        metadata={"help": "last thought: question (said again), title (and question), excerpt (words copied), short"},
    )

    def __post_init__(self) -> None:
        if self.topk < 1:
            raise ConfigError(f"topk: expected at least 1, found {self.topk}")
        if self.thoughts not in THOUGHTS:
            raise ConfigError(f"thoughts={self.thoughts!r}: expected one of {', '.join(THOUGHTS)}")


def demonstrate(
    questions: Sequence[Question],
    search: SearchBackend,
    corpus: Corpus,
    protocol: AgentProtocol,
    codec: Codec,
    limits: Limits,
    settings: DemonstrationSettings,
    *,
    seed: int,
    supporting_field: str = "gold_doc_ids",
) -> list[Session]:
    """Make one finished session per question, ending with the gold answer; the mask marks the scripted agent's tokens.

    A session that reaches its limits before all supporting passages were shown is dropped, because its answer would be
    a guess. So is one with a search that the retriever refuses; stderr says how many. The same seed gives the same
    sessions.

    Args:
        questions: questions with the ids of their supporting passages in `metadata[supporting_field]`.
        search: retriever over `corpus`.

    Raises:
        RecordError: a question without supporting ids, or with an id that the corpus does not hold.
        SearchError: the retriever failed, or refused the searches of all questions.
    """
    scripts = [
        _script(question, supporting_passages(question, corpus, supporting_field), protocol, codec, limits, settings,
                random.Random(f"{seed}:{question.id}"))
        for question in questions
    ]  # fmt: skip
    active = scripts
    # All scripts advance turn by turn together, so that each round of searches is one batched call.
    while active:
        waiting = [script for script in active if isinstance(write_turn(script), Search)]
        requests = [SearchRequest(query=s.queries[-1], question=s.question.question) for s in waiting]
        for script, hits in zip(waiting, search_each(search, requests, settings.topk), strict=True):
            if isinstance(hits, SearchRefusedError):
                script.session.search_failed(str(hits))
            else:
                _show(script, [hit.passage for hit in hits], settings)
        active = [script for script in waiting if script.session.finished is None and not script.out_of_searches]
    _say_refused(scripts)
    return [s.session for s in scripts if s.session.finished is not None and s.session.finished.answer is not None]


def _say_refused(scripts: Sequence[Script]) -> None:
    """Print how many questions were left out because the retriever refused a search.

    Raises:
        SearchRefusedError: it refused a search of every question, so a setting must be wrong.
    """
    refused = [s for s in scripts if s.session.finished == Finished(StopReason.SEARCH_FAILED)]
    if not refused:
        return
    count = f"{len(refused)} of {len(scripts)} questions"
    said = f"the retriever refused a search of {count}; first, {refused[0].question.id}: {refused[0].session.refusal}"
    if len(refused) == len(scripts):
        raise SearchRefusedError(said)
    print(f"demonstrations: {said}", file=sys.stderr)


def supporting_passages(question: Question, corpus: Corpus, supporting_field: str) -> tuple[Passage, ...]:
    """Look up the passages listed in a question's metadata.

    Raises:
        RecordError: no ids, or an id that the corpus does not hold.
    """
    ids = listed(question.metadata, supporting_field)
    if not ids:
        raise RecordError(f"question {question.id!r}: expected passage ids in metadata.{supporting_field}, found none")
    return tuple(map(corpus.by_id, ids))


def _script(
    question: Question,
    supporting: tuple[Passage, ...],
    protocol: AgentProtocol,
    codec: Codec,
    limits: Limits,
    settings: DemonstrationSettings,
    rng: random.Random,
) -> Script:
    fewer = settings.topk > 1 and rng.random() < settings.fewer_passages_share
    return Script(
        question=question,
        supporting=supporting,
        session=Session(protocol, codec, limits, question.question),
        num_passages=rng.randrange(1, settings.topk) if fewer else settings.topk,
        thoughts=settings.thoughts,
        rng=rng,
    )


# --- Observations -----------------------------------------------------------------------------------------------------


def _show(script: Script, found: Sequence[Passage], settings: DemonstrationSettings) -> None:
    """Show the passages found; insert a missed supporting passage at random, unless this trajectory shows a retry."""
    session, shown = script.session, list(found[: script.num_passages])
    wanted = script.wanted
    may_miss = len(script.queries) == 1 and script.rng.random() < settings.retry_share
    if wanted is not None and not may_miss and wanted not in _visible(session, shown):
        # It may have been found and only not fit into the block, so it is removed before it is inserted.
        shown = [passage for passage in shown if passage != wanted][: script.num_passages - 1]
        shown.insert(script.rng.randrange(len(shown) + 1), wanted)
        while wanted not in _visible(session, shown):  # the block is full: drop other passages from the end
            shown.remove(next(passage for passage in reversed(shown) if passage != wanted))
    visible = _visible(session, shown)
    script.missed = wanted is not None and wanted not in visible
    session.found(shown)
    script.seen.extend(visible)


def _visible(session: Session, passages: Sequence[Passage]) -> list[Passage]:
    """The longest prefix of the passages that fits into one information block (always at least one passage)."""
    return list(passages[: session.fitting(passages)])


def describe(sessions: Sequence[Session]) -> Mapping[str, float]:
    """Number and mean lengths of the demonstrations, for the report."""
    count = max(1, len(sessions))
    return {
        "demonstrations": len(sessions),
        "mean_searches": sum(session.searches for session in sessions) / count,
        "mean_tokens": sum(len(session.ids) for session in sessions) / count,
        "mean_model_tokens": sum(session.generated_tokens for session in sessions) / count,
    }
