"""The wordings of the generated benchmark, read from `grammar/*.yaml`: entity types and the relations between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path(__file__).parent / "grammar"


@dataclass(frozen=True, kw_only=True)
class Wordings:
    """Ways to say one thing. `reserved` ones occur only with entities of the test split."""

    common: tuple[str, ...]
    reserved: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EntityType:
    """A kind of thing that has passages."""

    name: str
    slots: tuple[str, ...]
    """Parts of its description; each is one passage that states the relations of that part."""
    mention: tuple[str, ...]
    """How a question calls it, the fullest form first."""
    intro: Wordings
    filler: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A functional relation: one subject has exactly one object."""

    name: str
    label: str
    """What the scripted agent calls it; may hold a slot such as `{maker}`."""
    subject: str
    object: str
    slot: str
    query: tuple[str, ...]
    """Search queries, the usual one first."""
    noun: Wordings
    """Noun phrases that stand for the object inside a longer question; none if no relation goes on from the object."""
    ask: Wordings
    state: Wordings
    mention: tuple[str, ...]
    """Sentences with the relation's words and a wrong object: they do not answer."""


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """All types and relations."""

    types: dict[str, EntityType]
    relations: dict[str, Relation]

    def of(self, entity_type: str) -> list[Relation]:
        """Relations that start at a type."""
        return [relation for relation in self.relations.values() if relation.subject == entity_type]


@cache
def grammar() -> Grammar:
    """The grammar of this package."""
    types: dict[str, EntityType] = {}
    relations: dict[str, Relation] = {}
    for file in sorted(_FOLDER.glob("*.yaml")):
        data: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        for name, item in data.pop("relations").items():
            relations[name] = _relation(name, item)
        for name, item in data.items():
            types[name] = EntityType(
                name=name,
                slots=tuple(item["slots"]),
                mention=tuple(item["mention"]),
                intro=_wordings(item, "intro"),
                filler=tuple(item["filler"]),
            )
    return Grammar(types=types, relations=relations)


def _relation(name: str, item: dict[str, Any]) -> Relation:
    return Relation(
        name=name,
        label=item.get("label", name),
        subject=item["subject"],
        object=item["object"],
        slot=item["slot"],
        query=tuple(item["query"]),
        noun=_wordings(item, "np"),
        ask=_wordings(item, "ask"),
        state=_wordings(item, "state"),
        mention=tuple(item["mention"]),
    )


def _wordings(item: dict[str, Any], key: str) -> Wordings:
    return Wordings(common=tuple(item[key]), reserved=tuple(item.get(f"{key}_reserved", ())))
