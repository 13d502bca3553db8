"""One-, two- and three-hop questions: chains of facts, each phrased as one sentence."""

from __future__ import annotations

import random
from dataclasses import dataclass

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.records import Question
from agentic_r_plugin.world.facts import Entity, Fact, Facts
from agentic_r_plugin.world.grammar import grammar
from agentic_r_plugin.world.prose import choose, kind_words
from agentic_r_plugin.world.settings import WorldConfig

_MOST_FAILURES = 3000
"""Consecutive draws without a new question after which a world counts as too small."""

_STARTS = {
    1: {"person": 0.46, "work": 0.22, "company": 0.1, "school": 0.08, "town": 0.08, "prize": 0.03, "river": 0.03},
    2: {"person": 0.36, "work": 0.36, "company": 0.12, "school": 0.07, "town": 0.05, "prize": 0.04},
    3: {"person": 0.3, "work": 0.44, "company": 0.12, "school": 0.06, "town": 0.03, "prize": 0.05},
}
"""Number of hops -> probability that a question starts at each type."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """(subject key, relation name) -> id of the passage that states the fact, and of one that misleads about it."""

    stated: dict[tuple[int, str], str]
    misleading: dict[tuple[int, str], str]


def write_questions(
    rng: random.Random, facts: Facts, places: Places, split: str, count: int, config: WorldConfig
) -> list[Question]:
    """Write `count` different questions about the entities of one split, with numbers of hops in random order.

    Raises:
        ConfigError: the split has too few entities for this number of questions.
    """
    ones, twos = round(count * config.share_one_hop), round(count * config.share_two_hops)
    lengths = [1] * ones + [2] * twos + [3] * (count - ones - twos)
    rng.shuffle(lengths)
    members: dict[str, list[Entity]] = {}
    for entity in facts.entities:
        if entity.split == split:
            members.setdefault(entity.type, []).append(entity)
    made: list[Question] = []
    seen: set[tuple[int, ...] | str] = set()
    failures = 0
    while len(made) < count:
        failures += 1
        if failures > _MOST_FAILURES:
            raise ConfigError(f"{split}: expected {count} questions, the world gives about {len(made)}; make it larger")
        chain = _chain(rng, facts, members, lengths[len(made)])
        if chain is None:
            continue
        text, name = _word(rng, chain, split, config.reserved_share)
        key = "/".join([str(chain[0].subject.key), *(fact.relation.name for fact in chain)])
        # One chain has several wordings, and chains of namesakes may have the same one.
        if key in seen or text in seen:
            continue
        seen |= {key, text}
        failures = 0
        made.append(_record(f"{split}_{len(made)}", text, name, chain, facts, places, config))
    return made


def _chain(rng: random.Random, facts: Facts, members: dict[str, list[Entity]], hops: int) -> list[Fact] | None:
    """Draw a random walk over facts that visits no name twice; None if it reaches a dead end."""
    kinds = [kind for kind in _STARTS[hops] if members.get(kind)]
    entity = rng.choice(members[rng.choices(kinds, [_STARTS[hops][kind] for kind in kinds])[0]])
    chain: list[Fact] = []
    visited = {entity.name}
    for hop in range(1, hops + 1):
        options = [fact for fact in facts.of(entity) if fact.value not in visited]
        if hop < hops:
            # A hop in between must lead to an entity with passages, for which the question has a noun phrase.
            options = [fact for fact in options if fact.object is not None and fact.relation.noun.common]
        if not options:
            return None
        fact = rng.choice(options)
        chain.append(fact)
        visited.add(fact.value)
        if fact.object is not None:
            entity = fact.object
    return chain


def _word(rng: random.Random, chain: list[Fact], split: str, reserved_share: float) -> tuple[str, str]:
    """Phrase the question; also return the name that it uses for the first entity."""
    subject = chain[0].subject
    phrase, name = _mention(rng, subject)
    for fact in chain[:-1]:
        form = choose(rng, fact.relation.noun, split, reserved_share)
        phrase = form.format(s=phrase, **kind_words(fact.subject.type, fact.subject.kind))
        # A homonym is identified by county or kind; the kind of a work already implies its maker's profession.
        if fact.object is not None and fact.object.county:
            phrase += f" in the county of {fact.object.county}"
        elif fact.object is not None and fact.object.homonym and fact.relation.name != "creator":
            phrase = f"the {fact.object.kind}, {phrase},"
    last = chain[-1]
    ask = choose(rng, last.relation.ask, split, reserved_share)
    return ask.format(s=phrase, **kind_words(last.subject.type, last.subject.kind)), name


def _mention(rng: random.Random, entity: Entity) -> tuple[str, str]:
    """The first entity's mention in the question, and its name or alias without an article.

    An entity with a namesake is always identified by its profession or kind.
    """
    forms = grammar().types[entity.type].mention
    name = entity.alias if entity.alias and rng.random() < 0.3 else entity.shown
    if entity.type == "person":
        form = forms[0] if not entity.unique or rng.random() < 0.4 else "{n}"
    elif entity.type == "river":
        form = rng.choice(forms)
    else:
        form = forms[0] if not name.startswith("the ") or entity.type == "prize" else "{n}"
    county = f" in the county of {entity.county}" if entity.county else ""
    return form.format(n=name, **kind_words(entity.type, entity.kind)) + county, name.removeprefix("the ")


def _record(
    id: str, text: str, name: str, chain: list[Fact], facts: Facts, places: Places, config: WorldConfig
) -> Question:
    last, keys = chain[-1], [(fact.subject.key, fact.relation.name) for fact in chain]
    golden = [last.value] + ([last.object.alias] if last.object is not None and last.object.alias else [])
    metadata = {
        "hops": len(chain),
        "gold_doc_ids": [places.stated[key] for key in keys],
        "hop_answers": [fact.value for fact in chain],
        "relations": [fact.relation.name for fact in chain],
        "hop_subjects": [fact.subject.name for fact in chain],
        "hop_mentions": [name, *(fact.subject.name for fact in chain[1:])],
        "hop_kinds": [fact.subject.kind for fact in chain],
        "namesake_doc_ids": [_namesakes(fact, facts, places.stated) for fact in chain],
    }
    if places.misleading:
        metadata["misleading_doc_ids"] = [[places.misleading[key]] if key in places.misleading else [] for key in keys]
    if config.elliptic_queries:
        draw = random.Random(f"elliptic {config.seed} {id}")
        metadata["elliptic"] = [draw.random() < config.elliptic_queries for _ in chain]
    return Question(id=id, question=text, golden_answers=tuple(golden), metadata=metadata)


def _namesakes(fact: Fact, facts: Facts, stated: dict[tuple[int, str], str]) -> list[str]:
    """Passages that state the same relation of a namesake: they match the query but do not answer the question."""
    if fact.subject.unique:
        return []
    return [
        stated[other.key, fact.relation.name]
        for other in facts.entities
        if other.name == fact.subject.name and other.key != fact.subject.key
    ]


def hop_query(question: Question, hop: int, form: int = 0) -> str:
    """The search query for one hop (counted from 0), given the answers of earlier hops; `form` selects the wording.

    An elliptic first query leaves out what the question says: the entity at the first hop, the relation at later ones.
    """
    relation = grammar().relations[question.metadata["relations"][hop]]
    subject = question.metadata["hop_mentions"][hop]
    words = kind_words(relation.subject, question.metadata["hop_kinds"][hop])
    if form == 0 and question.metadata.get("elliptic", ())[hop : hop + 1] == [True]:
        return str(subject) if hop else relation.label.format(**words)
    return relation.query[form % len(relation.query)].format(s=subject, **words)
