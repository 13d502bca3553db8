"""The scripted agent of a demonstration: its state and its next turn.

It searches for a supporting passage by title if the title occurs in the question or in a passage already shown, and by
keywords of the question otherwise. If the passage was not found, it tries again with a different query. It answers once
all supporting passages were shown. Its queries never contain titles that it cannot have read.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from agentic_r_plugin.answers import contains_answer, normalize
from agentic_r_plugin.records import Passage, Question
from agentic_r_plugin.session import Session
from recipes.retriever.keywords import keywords

THOUGHTS = ("question", "title", "excerpt", "short")
"""Content of the last thought: the question again, titles and the question, copied words, or a short sentence."""
_TITLE_WORDS = 12
_QUERY_WORDS = 10
_WORDS_BEFORE, _WORDS_AFTER = 9, 4
"""Number of words copied from a passage before and after the answer."""


@dataclass
class Script:
    """State of the scripted agent in one trajectory."""

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
        """Supporting passages not shown yet: those with known titles first, in the order of the question."""
        shown = {passage.id for passage in self.seen}
        left = [passage for passage in self.supporting if passage.id not in shown]
        return sorted(left, key=lambda passage: (not self.knows(passage), self._place(passage)))

    def knows(self, passage: Passage) -> bool:
        """Whether the passage's title occurs in the question or in a passage shown."""
        texts = [self.question.question, *(shown.contents for shown in self.seen)]
        return any(contains_answer(text, [plain_title(passage)]) for text in texts)

    def _place(self, passage: Passage) -> int:
        place = normalize(self.question.question).find(normalize(plain_title(passage)))
        return place if place >= 0 else len(self.question.question)

    @property
    def wanted(self) -> Passage | None:
        """The next supporting passage to search for; None when all were shown."""
        return next(iter(self.unseen), None)

    @property
    def out_of_searches(self) -> bool:
        """Whether a passage is missing and no search is left."""
        return self.wanted is not None and self.session.searches >= self.session.limits.max_searches


def plain_title(passage: Passage) -> str:
    """Title without its disambiguation in parentheses.

    >>> plain_title(Passage(id="1", title="Mercury (planet)", text=""))
    'Mercury'
    """
    return passage.title.partition(" (")[0].strip() or passage.title


def write_turn(script: Script) -> object:
    """Write one turn; return the session's action."""
    wanted, session, protocol = script.wanted, script.session, script.session.protocol
    if wanted is None:
        text = protocol.write_answer(_last_thought(script), script.question.golden_answers[0], session.codec)
    else:
        thought, query = _thought_and_query(script, wanted)
        script.queries.append(query)
        text = protocol.write_search(thought, query, session.codec)
    return session.model_wrote(_within(session, text))


def _within(session: Session, text: str) -> list[int]:
    """Ids of the turn, cut to the session's budget; a cut turn is malformed, so its session is left out."""
    return session.codec.encode(text)[: session.budget]


def _thought_and_query(script: Script, wanted: Passage) -> tuple[str, str]:
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


def _first_new(script: Script, queries: Sequence[str]) -> str:
    return next((query for query in queries if query and query not in script.queries), script.question.question)


def _last_thought(script: Script) -> str:
    """The thought before the answer.

    Small models answer better when the question directly precedes the answer, and worse after long excerpts.
    """
    answer, question = script.question.golden_answers[0], script.question.question.strip()
    holding = [passage for passage in reversed(script.supporting) if contains_answer(passage.contents, [answer])]
    holding.sort(key=lambda passage: normalize(answer) != normalize(plain_title(passage)))
    # Yes, no, or something that the question names answers a comparison, for which all passages count.
    compares = not holding or normalize(answer) in ("yes", "no") or contains_answer(question, [answer])
    sources = script.supporting if compares else holding[:1]
    titles = " and ".join(plain_title(passage) for passage in sources)
    if script.thoughts == "excerpt":
        return ". ".join(_excerpt(passage, "" if compares else answer) for passage in sources) + "."
    return {"question": question, "title": f"{titles}: {question}", "short": "I can answer now."}[script.thoughts]


def _excerpt(passage: Passage, phrase: str) -> str:
    """Words of the passage around the phrase, or its first words if the text does not contain the phrase."""
    words = passage.text.split()
    wanted = normalize(phrase).split()
    plain = [normalize(word) for word in words]
    for start in range(len(words) if wanted else 0):
        # Articles and punctuation normalise to nothing; up to three of them may be within the phrase.
        if [word for word in plain[start : start + len(wanted) + 3] if word][: len(wanted)] == wanted:
            first, last = max(0, start - _WORDS_BEFORE), start + len(wanted) + _WORDS_AFTER
            return f"{plain_title(passage)}: {' '.join(words[first:last]).rstrip('.,;')}"
    return f"{plain_title(passage)}: {' '.join(words[: _WORDS_BEFORE + 3]).rstrip('.,;')}"
