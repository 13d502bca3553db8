"""Who and what there is in a generated world, and what is true of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.world import names
from agentic_r_plugin.world.grammar import Relation, grammar

SPLITS = ("train", "dev", "test")

_LEAST = {"person": 8, "work": 4}
"""Smallest number in any split, so that every relation finds an object."""


@dataclass(frozen=True, kw_only=True)
class Population:
    """How many of each kind a world holds, over all splits."""

    people: int
    works: int
    companies: int
    schools: int
    prizes: int
    towns: int
    rivers: int
    namesake_share: float
    """Share of people and works that bear the very name of another one (of another profession or kind)."""


@dataclass(frozen=True, kw_only=True)
class Entity:
    """A thing with passages of its own."""

    key: int
    type: str
    name: str
    """Title of its passages, and the answer where it is asked for."""
    split: str
    kind: str = ""
    """Profession of a person, kind of a work."""
    alias: str = ""
    pronoun: str = "it"
    unique: bool = True
    """No other entity of the world bears this name."""

    @property
    def shown(self) -> str:
        """The name inside a sentence."""
        return f"the {self.name}" if self.type == "prize" else self.name


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One true statement."""

    subject: Entity
    relation: Relation
    value: str
    object: Entity | None = None
    """None where the object has no passages (years, goods, lakes, ...)."""


@dataclass(kw_only=True)
class Facts:
    """All entities and all that is true of them."""

    entities: list[Entity] = field(default_factory=list)
    facts: dict[tuple[int, str], Fact] = field(default_factory=dict)
    """(subject key, relation name) -> fact."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """Object type -> every name of it in the world, for decoys."""

    def of(self, entity: Entity) -> Iterator[Fact]:
        """Facts with this subject, in grammar order."""
        for relation in grammar().of(entity.type):
            yield self.facts[entity.key, relation.name]


def build_facts(rng: random.Random, population: Population, split_shares: dict[str, float]) -> Facts:
    """Entities of every split and the facts among them; no fact joins two splits.

    Raises:
        ConfigError: a split is so small that some relation has no possible object.
    """
    facts, maker = Facts(), names.NameMaker(rng)
    used = dict.fromkeys(_counts(population), 0)
    for position, split in enumerate(SPLITS):
        members: list[Entity] = []
        for kind, total in _counts(population).items():
            last = position == len(SPLITS) - 1
            count = total - used[kind] if last else round(total * split_shares[split])
            count = max(count, _LEAST.get(kind, 2))
            used[kind] += count
            members += _entities(rng, maker, kind, count, split, population.namesake_share, facts)
        facts.entities += members
        _relate(rng, maker, members, facts)
    for entity in facts.entities:
        facts.names.setdefault(entity.type, []).append(entity.shown)
    return facts


def _counts(population: Population) -> dict[str, int]:
    return {
        "town": population.towns,
        "river": population.rivers,
        "person": population.people,
        "work": population.works,
        "company": population.companies,
        "school": population.schools,
        "prize": population.prizes,
    }


def _entities(
    rng: random.Random, maker: names.NameMaker, kind: str, count: int, split: str, namesakes: float, facts: Facts
) -> list[Entity]:
    """`count` entities of one type; keys go on from those already there."""
    start = len(facts.entities) + 1_000_000 * (1 + SPLITS.index(split)) + 10_000 * list(grammar().types).index(kind)
    if kind == "person":
        drafts = _with_namesakes(rng, maker.person, maker.near_person, list(names.JOBS), count, namesakes)
    elif kind == "work":
        drafts = _with_namesakes(rng, maker.title, None, list(names.WORK_KINDS), count, namesakes)
    else:
        drafts = []
    if drafts:
        bearers = [name for name, _ in drafts]
        return [
            Entity(
                key=start + index,
                type=kind,
                name=name,
                kind=trade,
                split=split,
                pronoun=rng.choice(("he", "she")) if kind == "person" else "it",
                unique=bearers.count(name) == 1,
            )
            for index, (name, trade) in enumerate(drafts)
        ]
    made: list[Entity] = []
    for index in range(count):
        name, alias = _name_of(maker, kind)
        made.append(Entity(key=start + index, type=kind, name=name, alias=alias, split=split))
    return made


def _name_of(maker: names.NameMaker, kind: str) -> tuple[str, str]:
    if kind == "town":
        return maker.town(), ""
    if kind == "river":
        return maker.river(), ""
    nouns = {"company": names.COMPANY_NOUNS, "school": names.SCHOOL_NOUNS, "prize": names.PRIZE_NOUNS}[kind]
    return maker.house(nouns)


def _with_namesakes(
    rng: random.Random,
    fresh: Callable[[], str],
    near: Callable[[str], str] | None,
    kinds: list[str],
    count: int,
    namesakes: float,
) -> list[tuple[str, str]]:
    """(name, kind) pairs: some share a name with one of another kind, some names are nearly the same."""
    drafts: list[tuple[str, str]] = []
    while len(drafts) < count:
        kind = rng.choice(kinds)
        draw = rng.random()
        if len(drafts) > 4 and draw < namesakes / 2:
            name = rng.choice(drafts[4:])[0]  # The first four keep their names to themselves.
            if kind in {other for taken, other in drafts if taken == name}:
                continue
        elif drafts and near is not None and draw < namesakes:
            name = near(rng.choice(drafts)[0])
        else:
            name = fresh()
        drafts.append((name, kind))
    return drafts


def _relate(rng: random.Random, maker: names.NameMaker, members: list[Entity], facts: Facts) -> None:
    """One object for every relation of every member, taken from the same split."""
    for entity in members:
        for relation in grammar().of(entity.type):
            found = _object(rng, maker, entity, relation, members)
            value, target = (found, None) if isinstance(found, str) else (found.name, found)
            facts.facts[entity.key, relation.name] = Fact(subject=entity, relation=relation, value=value, object=target)
            if target is None:
                facts.names.setdefault(relation.object, []).append(value)


def _object(
    rng: random.Random, maker: names.NameMaker, entity: Entity, relation: Relation, members: list[Entity]
) -> Entity | str:
    kind = relation.object
    if kind in grammar().types:
        choices = [other for other in members if other.type == kind and other.name != entity.name]
        if relation.name == "creator":
            job = names.WORK_KINDS[entity.kind]["job"]
            choices = [other for other in choices if other.kind == job] or [o for o in choices if o.unique]
        elif kind == "person":  # Only a maker's profession follows from the question: only makers may have namesakes.
            choices = [other for other in choices if other.unique]
        if not choices:
            raise ConfigError(f"the world is too small: no {kind} can be the {relation.name} of {entity.name}")
        return rng.choice(choices)
    if kind == "year":
        return str(rng.randrange(1730, 1930))
    if kind in ("product", "pastime"):
        return rng.choice(names.PRODUCTS if kind == "product" else names.PASTIMES)
    form = {"lake": "Lake {}", "bay": "{} Bay", "hills": "{} Hills"}[kind]
    return form.format(maker.place())
