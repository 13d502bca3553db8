"""Scripted trajectories that teach the small agent to search, read, continue and answer.

The demonstrators can read and copy, but they are *hasty* on purpose, so that reinforcement learning has something to
improve. When a question needs another hop, they often give the fact just found as the answer. When the passages do not
contain the fact, they often take another name of the right type instead of searching again. Occasionally they search
again for what they already know. A hasty and a careful demonstration diverge at a single token (`Done`, `Next`, `not`),
so a policy trained on them is mostly hasty in greedy decoding and often careful when sampling.

Where a search shows only snippets, the demonstrators open passages and read the facts there: first the passage whose
snippet gives the fact, then those with the entity's title, by rank. So they sometimes open a wrong one first.

Every trajectory is played through `session.Session`, so its ids are those that the runtime would produce.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agentic_r_plugin.protocol import AgentProtocol, Codec, Limits, Open
from agentic_r_plugin.records import Passage, Question
from agentic_r_plugin.session import Session
from agentic_r_plugin.tags import compact
from agentic_r_plugin.tools import ToolProtocol
from agentic_r_plugin.world.generate import World, WorldConfig, build_world
from agentic_r_plugin.world.grammar import grammar
from agentic_r_plugin.world.prose import kind_words
from agentic_r_plugin.world.questions import hop_query

_MOST_OPENED = 2
"""Passages opened after one search."""


@dataclass(frozen=True, kw_only=True)
class Haste:
    """Probabilities of a wrong decision by the demonstrators."""

    stop_at_person: float = 0.62
    """Give a person found at an earlier hop as the answer (a person looks like an answer)."""
    stop_at_other: float = 0.36
    """Give another entity found at an earlier hop as the answer."""
    guess: float = 0.6
    """Take another name if the passages do not contain the fact."""
    repeat: float = 0.12
    """Search again for a fact already read."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Results of the searches in demonstrations."""

    gold: float = 0.7
    """Probability that the passages shown include the one that states the fact."""
    most_passages: int = 3
    fewer: float = 0.2
    """Probability of drawing a number of passages from 1 to `most_passages` (the correctness stage shows one)."""
    snippet: int = 0
    """Characters of a passage that a search shows, so that the demonstrators open it (`tools.ToolProtocol`); 0: all."""


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """One trajectory with its training mask."""

    question: Question
    session: Session

    @property
    def ids(self) -> list[int]:
        """Ids of prompt and response."""
        return self.session.ids

    @property
    def mask(self) -> list[int]:
        """1 for tokens of the model; same length as `ids`."""
        return [0] * len(self.session.prompt_ids) + self.session.response_mask


class Demonstrator:
    """Writes demonstrations for the questions of one world."""

    def __init__(
        self,
        world: World,
        codec: Codec,
        haste: Haste,
        shown: Shown,
        limits: Limits,
        seed: str,
        protocol: AgentProtocol = compact,
    ) -> None:
        self.world, self.codec, self.haste, self.shown, self.limits = world, codec, haste, shown, limits
        self.protocol = protocol
        self._rng = random.Random(seed)
        self._by_id = {passage.id: passage for passage in world.passages}
        self._by_title: dict[str, list[Passage]] = {}
        for passage in world.passages:
            self._by_title.setdefault(passage.title, []).append(passage)
        self._names = _names(world)

    def demonstrate(self, question: Question) -> Demonstration:
        """Write one trajectory, which always ends with an answer."""
        session = Session(protocol=self.protocol, codec=self.codec, limits=self.limits, question=question.question)
        labels = [_label(question, hop) for hop in range(question.metadata["hops"])]
        thought = f"Find {', then '.join(labels)}."
        for hop, label in enumerate(labels):
            value, certain = self._look_up(session, question, hop, thought)
            thought = f"{label}: {value}."
            spent = session.searches >= self.limits.max_searches
            if not certain or spent or hop == len(labels) - 1 or self._stops(question, hop):
                break
            thought += f" Next {labels[hop + 1]}."
        self._write(session, self.protocol.write_answer(f"{thought} Done.", value, self.codec, gap=""))
        return Demonstration(question=question, session=session)

    def _look_up(self, session: Session, question: Question, hop: int, thought: str) -> tuple[str, bool]:
        """Search until the fact is found or guessed; return the value and whether the gold passage stated it."""
        label, forms = _label(question, hop), _forms(question, hop)
        for attempt, query in enumerate(forms):
            seen = self._search(session, question, hop, thought, query)
            out_of_searches = session.searches >= self.limits.max_searches
            if seen is None:
                value = question.metadata["hop_answers"][hop]
                if attempt + 1 < len(forms) and not out_of_searches and self._rng.random() < self.haste.repeat:
                    thought = f"{label}: {value}. Check."
                    self._search(session, question, hop, thought, forms[attempt + 1])
                return value, True
            if attempt + 1 == len(forms) or out_of_searches or self._rng.random() < self.haste.guess:
                return self._guess(question, hop, seen), False
            thought = f"{label}: not found. Again."
        raise AssertionError("a relation has at least one query")

    def _search(self, session: Session, question: Question, hop: int, thought: str, query: str) -> list[Passage] | None:
        """Write the search and show passages; return None if the gold passage was read, else the passages read."""
        self._write(session, self.protocol.write_search(thought, query, self.codec, gap=""))
        gold = self._by_id[question.metadata["gold_doc_ids"][hop]]
        count = self.shown.most_passages
        if self._rng.random() < self.shown.fewer:
            count = self._rng.randint(1, count)
        with_gold = self._rng.random() < self.shown.gold
        passages = self._distractors(question, hop, gold, count - with_gold) + [gold] * with_gold
        self._rng.shuffle(passages)
        session.found(passages)
        if self.shown.snippet:
            return self._open(session, question, hop, passages)
        return None if with_gold else passages

    def _open(
        self, session: Session, question: Question, hop: int, passages: Sequence[Passage]
    ) -> list[Passage] | None:
        """Open passages until one states the fact; return None if one does, else the passages opened."""
        assert isinstance(self.protocol, ToolProtocol)
        gold, value = (question.metadata[name][hop] for name in ("gold_doc_ids", "hop_answers"))

        def promise(rank: int) -> int:
            passage = passages[rank - 1]
            if passage.id == gold and value in passage.text[: self.shown.snippet]:
                return 0
            return 1 if passage.title == question.metadata["hop_subjects"][hop] else 2

        opened: list[Passage] = []
        for rank in sorted(range(1, len(passages) + 1), key=promise)[:_MOST_OPENED]:
            if session.opens < self.limits.max_opens:
                thought = f"{_label(question, hop)}: not found. Open {rank}." if opened else f"Open {rank}."
                self._write(session, self.protocol.write_open(thought, str(rank), self.codec, gap=""))
                assert isinstance(session.pending, Open)
                opened.append(self._by_id[session.pending.document])
                session.found(opened[-1:])
                if opened[-1].id == gold:
                    return None
        return opened

    def _distractors(self, question: Question, hop: int, gold: Passage, count: int) -> list[Passage]:
        """Passages that a retriever would confuse with the gold one: namesakes', the same entity's, and random ones."""
        name = question.metadata["hop_subjects"][hop]
        same = [passage for passage in self._by_title[name] if passage.id != gold.id]
        namesakes = [self._by_id[id] for id in question.metadata["namesake_doc_ids"][hop]]
        chosen: dict[str, Passage] = {}
        # Bounded, because a small pool gives the same passages again and again.
        for _ in range(20):
            if len(chosen) >= count:
                break
            draw = self._rng.random()
            pool: Sequence[Passage] = namesakes if namesakes and draw < 0.35 else same if draw < 0.85 else ()
            passage = self._rng.choice(pool or self.world.passages)
            if passage.id != gold.id:
                chosen[passage.id] = passage
        return list(chosen.values())[:count]

    def _stops(self, question: Question, hop: int) -> bool:
        relation = grammar().relations[question.metadata["relations"][hop]]
        share = self.haste.stop_at_person if relation.object == "person" else self.haste.stop_at_other
        return self._rng.random() < share

    def _guess(self, question: Question, hop: int, seen: Sequence[Passage]) -> str:
        """A value of the right type from the passages, else the title of the first passage."""
        relation = grammar().relations[question.metadata["relations"][hop]]
        text = " ".join(passage.text for passage in seen)
        subject = question.metadata["hop_subjects"][hop]
        if relation.object == "year":
            found = re.findall(r"\b1[789]\d\d\b", text)
        else:
            found = [name for name in self._names.get(relation.object, ()) if name != subject and name in text]
        return self._rng.choice(found or [seen[0].title if seen else subject])

    def _write(self, session: Session, text: str) -> None:
        session.model_wrote(self.codec.encode(text))


def _label(question: Question, hop: int) -> str:
    relation = grammar().relations[question.metadata["relations"][hop]]
    return relation.label.format(**kind_words(relation.subject, question.metadata["hop_kinds"][hop]))


def _forms(question: Question, hop: int) -> list[str]:
    """Queries in the order in which they are tried; with the entity's kind if the question's first mention has it."""
    kind = question.metadata["hop_kinds"][hop]
    forms = [hop_query(question, hop, 0), hop_query(question, hop, 1)]
    if hop == 0 and kind and f"{kind} {question.metadata['hop_mentions'][0]}" in question.question:
        return [forms[0], f"{kind} {forms[1]}", forms[1]]
    return [*forms, hop_query(question, hop, 2)]


def _names(world: World) -> dict[str, list[str]]:
    """Object type -> values that occur as an answer or an intermediate answer in a question of the world."""
    found: dict[str, set[str]] = {}
    for questions in world.questions.values():
        for question in questions:
            for name, value in zip(question.metadata["relations"], question.metadata["hop_answers"], strict=True):
                found.setdefault(grammar().relations[name].object, set()).add(value)
    return {kind: sorted(names) for kind, names in found.items()}


def small_world(seed: int, questions: int, elliptic_queries: float = 0.0) -> WorldConfig:
    """A world just large enough for some demonstrations; train and test questions, so that every wording occurs."""
    return WorldConfig(
        seed=seed,
        train_questions=questions // 3,
        dev_questions=0,
        test_questions=questions - questions // 3,
        people=24,
        works=16,
        companies=6,
        schools=6,
        prizes=6,
        towns=8,
        rivers=6,
        newspapers=6,
        elliptic_queries=elliptic_queries,
    )


def demonstrations(
    codec: Codec,
    *,
    first_seed: int,
    worlds: int,
    per_world: int,
    haste: Haste,
    shown: Shown,
    limits: Limits,
    elliptic_queries: float = 0.0,
    protocol: AgentProtocol = compact,
) -> Iterator[Demonstration]:
    """Yield `per_world` demonstrations from each of `worlds` worlds, with seeds from `first_seed` on."""
    for seed in range(first_seed, first_seed + worlds):
        world = build_world(small_world(seed, per_world, elliptic_queries))
        writer = Demonstrator(world, codec, haste, shown, limits, seed=f"demonstrations {seed}", protocol=protocol)
        for split in ("train", "test"):
            for question in world.questions[split]:
                yield writer.demonstrate(question)
