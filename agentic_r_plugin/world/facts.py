"""The entities of a generated world and the facts about them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.world import names
from agentic_r_plugin.world.grammar import Relation, grammar
from agentic_r_plugin.world.settings import MOST_ENTITIES, WorldConfig

SPLITS = ("train", "dev", "test")

_HOMONYMS = ("person", "work", "town")
_NEVER_SHARED = 4
"""The names of the first four of each type stay unique, so that every relation has a possible object."""

_LEAST = {"person": 8, "work": 4}
"""Minimum number per split (2 for other types), so that every relation has a possible object."""


@dataclass(frozen=True, kw_only=True)
class Entity:
    """A person, work, place or organisation with its own passages."""

    key: int
    type: str
    name: str
    """Title of its passages, and the answer to questions about it."""
    split: str
    kind: str = ""
    """Profession of a person, kind of a work."""
    alias: str = ""
    pronoun: str = "it"
    unique: bool = True
    """Whether no other entity of the world has this name."""
    homonym: bool = False
    """Whether it shares its name because of the setting `homonyms`: every question that needs it says which one."""
    county: str = ""
    """County of a town that is a homonym."""

    @property
    def shown(self) -> str:
        """The name as used inside a sentence."""
        return f"the {self.name}" if self.type == "prize" else self.name


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One true statement."""

    subject: Entity
    relation: Relation
    value: str
    object: Entity | None = None
    """None if the object has no passages (years, goods, lakes, ...)."""


@dataclass(kw_only=True)
class Facts:
    """All entities and all facts about them."""

    entities: list[Entity] = field(default_factory=list)
    facts: dict[tuple[int, str], Fact] = field(default_factory=dict)
    """(subject key, relation name) -> fact."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """Object type -> all its names in the world, used as decoys."""

    def of(self, entity: Entity) -> Iterator[Fact]:
        """Yield the facts with this subject, in grammar order."""
        for relation in grammar().of(entity.type):
            yield self.facts[entity.key, relation.name]


def build_facts(rng: random.Random, config: WorldConfig, split_shares: dict[str, float]) -> Facts:
    """Make the entities of every split and their facts; no fact connects two splits.

    Raises:
        ConfigError: a split is too small, so that a relation has no possible object.
    """
    facts, maker = Facts(), names.NameMaker(rng)
    used = dict.fromkeys(_counts(config), 0)
    for position, split in enumerate(SPLITS):
        members: list[Entity] = []
        for kind, total in _counts(config).items():
            last = position == len(SPLITS) - 1
            # The last split gets what rounding has left.
            count = total - used[kind] if last else round(total * split_shares[split])
            count = max(count, _LEAST.get(kind, 2))
            used[kind] += count
            made = _entities(rng, maker, kind, count, split, config.namesake_share, facts)
            if config.homonyms and kind in _HOMONYMS:
                made = _with_homonyms(rng, maker, made, config.homonyms)
            members += made
        facts.entities += members
        _relate(rng, maker, members, facts)
    for entity in facts.entities:
        facts.names.setdefault(entity.type, []).append(entity.shown)
    return facts


def _counts(config: WorldConfig) -> dict[str, int]:
    return {
        "town": config.towns,
        "river": config.rivers,
        "person": config.people,
        "work": config.works,
        "company": config.companies,
        "school": config.schools,
        "prize": config.prizes,
    }


def _entities(
    rng: random.Random, maker: names.NameMaker, kind: str, count: int, split: str, namesakes: float, facts: Facts
) -> list[Entity]:
    """Make `count` entities of one type, with keys that are unique in the world."""
    # Ranges of keys per split and type, which do not overlap.
    place = 100 * (1 + SPLITS.index(split)) + list(grammar().types).index(kind)
    start = len(facts.entities) + MOST_ENTITIES * place
    if kind == "person":
        drafts = _with_namesakes(rng, maker.person, maker.near_person, list(names.JOBS), count, namesakes)
    elif kind == "work":
        drafts = _with_namesakes(rng, maker.title, None, list(names.WORK_KINDS), count, namesakes)
    else:
        named = (_name_of(maker, kind) for _ in range(count))
        return [
            Entity(key=start + index, type=kind, name=name, alias=alias, split=split)
            for index, (name, alias) in enumerate(named)
        ]
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
    """Draw (name, kind) pairs; some names are shared with another kind, and some differ only slightly."""
    drafts: list[tuple[str, str]] = []
    while len(drafts) < count:
        kind = rng.choice(kinds)
        draw = rng.random()
        # Half of the share has the same name as another entity; the other half, of people only, a similar one.
        if len(drafts) > _NEVER_SHARED and draw < namesakes / 2:
            name = rng.choice(drafts[_NEVER_SHARED:])[0]
            # No question could distinguish two entities of the same name and kind.
            if kind in {other for taken, other in drafts if taken == name}:
                continue
        elif drafts and near is not None and draw < namesakes:
            name = near(rng.choice(drafts)[0])
        else:
            name = fresh()
        drafts.append((name, kind))
    return drafts


def _with_homonyms(rng: random.Random, maker: names.NameMaker, made: list[Entity], share: float) -> list[Entity]:
    """Give a share of the entities the name of another one of the same type.

    People and works that share a name differ in profession or kind. Towns that share one get a county each.
    """
    kept, renamed = made[:_NEVER_SHARED], list[Entity]()
    for entity in made[_NEVER_SHARED:]:
        if rng.random() < share:
            taken = {(other.name, other.kind) for other in (*made, *renamed)}
            names_ = {other.name for other in made[_NEVER_SHARED:] if other.name != entity.name}
            # Sorted, because the order of a set of strings differs between processes.
            free = sorted(name for name in names_ if not entity.kind or (name, entity.kind) not in taken)
            if free:
                entity = replace(entity, name=rng.choice(free))
        renamed.append(entity)
    bearers = Counter(entity.name for entity in (*kept, *renamed))
    return [
        replace(
            entity,
            unique=bearers[entity.name] == 1,
            homonym=bearers[entity.name] > 1,
            county=maker.place() if entity.type == "town" and bearers[entity.name] > 1 else "",
        )
        for entity in (*kept, *renamed)
    ]


def _relate(rng: random.Random, maker: names.NameMaker, members: list[Entity], facts: Facts) -> None:
    """Choose one object from the same split for every relation of every member."""
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
            # The kind of a work implies its maker's profession, so namesakes with another one cause no ambiguity.
            job = names.WORK_KINDS[entity.kind]["job"]
            choices = [other for other in choices if other.kind == job] or [o for o in choices if o.unique]
        elif kind == "person":  # The question implies the profession of makers and gives that of homonyms only.
            choices = [other for other in choices if other.unique or other.homonym]
        if not choices:
            raise ConfigError(f"the world is too small: no {kind} can be the {relation.name} of {entity.name}")
        return rng.choice(choices)
    if kind == "year":
        return str(rng.randrange(1730, 1930))
    if kind in ("product", "pastime"):
        return rng.choice(names.PRODUCTS if kind == "product" else names.PASTIMES)
    form = {"lake": "Lake {}", "bay": "{} Bay", "hills": "{} Hills"}[kind]
    return form.format(maker.place())
