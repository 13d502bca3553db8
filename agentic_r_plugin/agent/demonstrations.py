"""Scripted search trajectories for a supervised warm start, made from questions whose supporting passages are known.

A script plays the agent in a real `Session` over the real corpus: it asks for a supporting passage by its title where
the title stands in the question or in a passage already shown, by words of the question otherwise; it looks again
when the passage was not found; and when it has seen all supporting passages it copies the words around the answer
into its last thought and answers. Everything an agent could not know (titles not yet seen) stays out of its queries.
Supporting passages that the retriever misses are put among the passages found, except in some trajectories that are to
show a second attempt.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from agentic_r_plugin.answers import contains_answer, normalize
from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.protocol import AgentProtocol, Codec, Limits, Search, Session
from agentic_r_plugin.records import Passage, Question
from agentic_r_plugin.search.base import SearchBackend, SearchRequest
from agentic_r_plugin.search.corpus import Corpus

_STOP_WORDS = frozenset(
    "a about after also an and are as at be been before both but by did do does during for from had has have he her "  # noqa: SIM905
    "him his how if in into is it its many more most much name named not of on one or other out over she since so some "
    "such than that the their them then there these they this those through to under until up was were what when where "
    "which while who whom whose why will with would you your".split()
)
_THOUGHTS = ("question", "title", "excerpt", "short")
_TITLE_WORDS = 12
_QUERY_WORDS = 10
_WORDS_BEFORE, _WORDS_AFTER = 9, 4
"""Words of a passage that are copied around the answer."""


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
        if self.thoughts not in _THOUGHTS:
            raise ConfigError(f"thoughts={self.thoughts!r}: expected one of {', '.join(_THOUGHTS)}")


@dataclass
class _Script:
    """What the scripted agent of one trajectory knows."""

    question: Question
    supporting: tuple[Passage, ...]
    session: Session
    num_passages: int
    thoughts: str
    rng: random.Random
    seen: list[Passage] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    missed: bool = False

    @property
    def unseen(self) -> list[Passage]:
        """Supporting passages not shown yet; those whose title can be known come first, in order of the question."""
        shown = {passage.id for passage in self.seen}
        left = [passage for passage in self.supporting if passage.id not in shown]
        return sorted(left, key=lambda passage: (not self.knows(passage), self._place(passage)))

    def knows(self, passage: Passage) -> bool:
        """Whether the passage's title can be read in the question or in a passage shown."""
        texts = [self.question.question, *(shown.contents for shown in self.seen)]
        return any(contains_answer(text, [plain_title(passage)]) for text in texts)

    def _place(self, passage: Passage) -> int:
        place = normalize(self.question.question).find(normalize(plain_title(passage)))
        return place if place >= 0 else len(self.question.question)

    @property
    def wanted(self) -> Passage | None:
        """The supporting passage to look for now: None when all were shown."""
        return next(iter(self.unseen), None)

    @property
    def out_of_searches(self) -> bool:
        """Whether a passage is missing that no search is left for."""
        return self.wanted is not None and self.session.searches >= self.session.limits.max_searches


def plain_title(passage: Passage) -> str:
    """Title without a disambiguation in brackets.

    >>> plain_title(Passage(id="1", title="Mercury (planet)", text=""))
    'Mercury'
    """
    return passage.title.partition(" (")[0].strip() or passage.title


def keywords(text: str, *, limit: int, without: str = "") -> list[str]:
    """Words of `text` that carry meaning, in order, leaving out those of `without`.

    >>> keywords("Which band was formed first, Suede or Pulp?", limit=4, without="Pulp")
    ['band', 'formed', 'first', 'Suede']
    """
    left_out = _STOP_WORDS | set(normalize(without).split())
    words = [word.strip(".,;:!?()[]\"'`“”‘’") for word in text.split()]
    words = [word.removesuffix("'s").removesuffix("’s") for word in words]
    return [word for word in dict.fromkeys(words) if normalize(word) and normalize(word) not in left_out][:limit]


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
    """One finished session for each question, ended by the gold answer; the mask tells the scripted agent's tokens.

    A session that reaches its limits before it has seen all supporting passages is left out: its answer would be a
    guess. The same seed gives the same sessions.

    Args:
        questions: with the ids of their supporting passages in `metadata[supporting_field]`.
        search: real retriever over `corpus`.

    Raises:
        RecordError: a question without supporting ids, or with one that the corpus does not hold.
        SearchError: the retriever failed.
    """
    scripts = [
        _script(question, supporting_passages(question, corpus, supporting_field), protocol, codec, limits, settings,
                random.Random(f"{seed}:{question.id}"))
        for question in questions
    ]  # fmt: skip
    active = scripts
    while active:
        waiting = [script for script in active if isinstance(_next_turn(script), Search)]
        requests = [SearchRequest(query=s.queries[-1], question=s.question.question) for s in waiting]
        found = search.search(requests, settings.topk) if requests else []
        for script, hits in zip(waiting, found, strict=True):
            _show(script, [hit.passage for hit in hits], settings)
        active = [script for script in waiting if script.session.finished is None and not script.out_of_searches]
    return [s.session for s in scripts if s.session.finished is not None and s.session.finished.answer is not None]


def supporting_passages(question: Question, corpus: Corpus, supporting_field: str) -> tuple[Passage, ...]:
    """The passages that a question's metadata names.

    Raises:
        RecordError: no ids, or an id that the corpus does not hold.
    """
    ids = question.metadata.get(supporting_field)
    if not isinstance(ids, list) or not ids:
        raise RecordError(
            f"question {question.id!r}: expected a list of passage ids in metadata[{supporting_field!r}], found {ids!r}"
        )
    return tuple(corpus.by_id(str(identifier)) for identifier in ids)


def _script(
    question: Question,
    supporting: tuple[Passage, ...],
    protocol: AgentProtocol,
    codec: Codec,
    limits: Limits,
    settings: DemonstrationSettings,
    rng: random.Random,
) -> _Script:
    fewer = settings.topk > 1 and rng.random() < settings.fewer_passages_share
    return _Script(
        question=question,
        supporting=supporting,
        session=Session(protocol, codec, limits, question.question),
        num_passages=rng.randrange(1, settings.topk) if fewer else settings.topk,
        thoughts=settings.thoughts,
        rng=rng,
    )


# --- What the script writes -------------------------------------------------------------------------------------------


def _next_turn(script: _Script) -> object:
    """Write one turn; returns what the session makes of it."""
    wanted, session, protocol = script.wanted, script.session, script.session.protocol
    if wanted is None:
        thought, tag, body = _last_thought(script), protocol.answer_tag, script.question.golden_answers[0]
    else:
        thought, body = _thought_and_query(script, wanted)
        tag = protocol.search_tag
        script.queries.append(body)
    text = f"<{protocol.think_tag}> {thought} </{protocol.think_tag}>\n<{tag}> {body} </{tag}>"
    return session.model_wrote(_within(session, text))


def _within(session: Session, text: str) -> list[int]:
    """The turn's ids; a turn that is too long is cut, which the session sees as malformed, and so is left out."""
    return session.codec.encode(text)[: session.budget]


def _thought_and_query(script: _Script, wanted: Passage) -> tuple[str, str]:
    question, again = script.question.question, "I do not see it yet."
    if not script.knows(wanted):
        reached = [passage for passage in script.seen if passage in script.supporting]
        title = plain_title(reached[-1]) if reached else ""
        queries = [_query(title, keywords(question, limit=limit, without=title)) for limit in (_QUERY_WORDS, 5, 3)]
        return again if script.queries else "I search with the words of the question.", _first_new(script, queries)
    title = plain_title(wanted)
    others = " ".join(plain_title(passage) for passage in script.supporting)
    words = keywords(question, limit=5, without=others)
    query = _first_new(script, [_query(title, words), _query(title, []), _query(title, words[:2])])
    if script.missed:
        return again, query
    source = next((passage for passage in reversed(script.seen) if contains_answer(passage.text, [title])), None)
    if source is None or contains_answer(question, [title]) or script.thoughts != "excerpt":
        return f"I look up {title}.", query
    return f"{_excerpt(source, title)}. I look up {title}.", query


def _query(title: str, words: Sequence[str]) -> str:
    return " ".join([*title.split()[:_TITLE_WORDS], *words])


def _first_new(script: _Script, queries: Sequence[str]) -> str:
    return next((query for query in queries if query and query not in script.queries), script.question.question)


def _last_thought(script: _Script) -> str:
    """What is thought before the answer.

    Small models answer better when the question stands right before the answer, and lose their way in long excerpts.
    """
    answer, question = script.question.golden_answers[0], script.question.question.strip()
    holding = [passage for passage in reversed(script.supporting) if contains_answer(passage.contents, [answer])]
    holding.sort(key=lambda passage: normalize(answer) != normalize(plain_title(passage)))
    compares = not holding or normalize(answer) in ("yes", "no") or contains_answer(question, [answer])
    sources = script.supporting if compares else holding[:1]
    titles = " and ".join(plain_title(passage) for passage in sources)
    if script.thoughts == "excerpt":
        return ". ".join(_excerpt(passage, "" if compares else answer) for passage in sources) + "."
    return {"question": question, "title": f"{titles}: {question}", "short": "I can answer now."}[script.thoughts]


def _excerpt(passage: Passage, phrase: str) -> str:
    """Some words of the passage around the phrase, or its first words where only the title holds it."""
    words = passage.text.split()
    wanted = normalize(phrase).split()
    plain = [normalize(word) for word in words]
    for start in range(len(words) if wanted else 0):
        if [word for word in plain[start : start + len(wanted) + 3] if word][: len(wanted)] == wanted:
            first, last = max(0, start - _WORDS_BEFORE), start + len(wanted) + _WORDS_AFTER
            return f"{plain_title(passage)}: {' '.join(words[first:last]).rstrip('.,;')}"
    return f"{plain_title(passage)}: {' '.join(words[: _WORDS_BEFORE + 3]).rstrip('.,;')}"


# --- What the script is shown -----------------------------------------------------------------------------------------


def _show(script: _Script, found: Sequence[Passage], settings: DemonstrationSettings) -> None:
    """Append the passages found; a supporting one that was missed is put among them, unless this is to be a retry."""
    session, shown = script.session, list(found[: script.num_passages])
    wanted = script.wanted
    may_miss = len(script.queries) == 1 and script.rng.random() < settings.retry_share
    if wanted is not None and not may_miss and wanted not in _visible(session, shown):
        shown = [passage for passage in shown if passage != wanted][: script.num_passages - 1]
        shown.insert(script.rng.randrange(len(shown) + 1), wanted)
        while wanted not in _visible(session, shown):
            shown.remove(next(passage for passage in reversed(shown) if passage != wanted))
    visible = _visible(session, shown)
    script.missed = wanted is not None and wanted not in visible
    session.found(shown)
    script.seen.extend(visible)


def _visible(session: Session, passages: Sequence[Passage]) -> list[Passage]:
    """The leading passages that fit into one information block."""
    fitting = list(passages)
    while len(fitting) > 1 and len(session.codec.encode(session.protocol.render(fitting))) > (
        session.limits.max_observation_tokens
    ):
        fitting.pop()
    return fitting


def describe(sessions: Sequence[Session]) -> Mapping[str, float]:
    """Counts and mean lengths of a set of demonstrations, for the report."""
    count = max(1, len(sessions))
    return {
        "demonstrations": len(sessions),
        "mean_searches": sum(session.searches for session in sessions) / count,
        "mean_tokens": sum(len(session.ids) for session in sessions) / count,
        "mean_model_tokens": sum(session.generated_tokens for session in sessions) / count,
    }
