"""The grammar of the generated benchmark, from `grammar/*.yaml`: entity types, their relations, and all wordings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from agentic_r_plugin.data.scorers.gold_documents import content_words

_FOLDER = Path(__file__).parent / "grammar"


@dataclass(frozen=True, kw_only=True)
class Wordings:
    """Alternative wordings of one thing; `reserved` ones occur only with entities of the test split."""

    common: tuple[str, ...]
    reserved: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EntityType:
    """A type of entity with passages."""

    name: str
    slots: tuple[str, ...]
    """Parts of its description; each part is one passage that states the part's relations."""
    mention: tuple[str, ...]
    """How questions refer to it, fullest form first."""
    intro: Wordings
    filler: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A functional relation: one subject has exactly one object."""

    name: str
    label: str
    """Name used by the scripted agent; may contain a slot such as `{maker}`."""
    subject: str
    object: str
    slot: str
    query: tuple[str, ...]
    """Search queries, most usual first."""
    noun: Wordings
    """Noun phrases for the object inside a longer question; empty if no relation starts from the object."""
    ask: Wordings
    state: Wordings
    oblique: Wordings
    """Statements that share no word stem with the relation's queries and questions."""
    plain: tuple[str, ...]
    """Statements that share a word stem with them."""
    mention: tuple[str, ...]
    """Sentences with the relation's words but a wrong object, which do not answer the question."""


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """All types and relations."""

    types: dict[str, EntityType]
    relations: dict[str, Relation]

    def of(self, entity_type: str) -> list[Relation]:
        """Relations with this subject type."""
        return [relation for relation in self.relations.values() if relation.subject == entity_type]


@cache
def grammar() -> Grammar:
    """Load the grammar of this package."""
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
    asked = _stems(*item["query"], *item["np"], *item["ask"])
    state, other = _wordings(item, "state"), tuple(item.get("state_oblique", ()))
    common = tuple(text for text in state.common if not _stems(text) & asked)
    return Relation(
        name=name,
        label=item.get("label", name),
        subject=item["subject"],
        object=item["object"],
        slot=item["slot"],
        query=tuple(item["query"]),
        noun=_wordings(item, "np"),
        ask=_wordings(item, "ask"),
        state=state,
        oblique=Wordings(
            common=common + other, reserved=tuple(text for text in state.reserved if not _stems(text) & asked)
        ),
        # Misleading passages use these; a relation whose wordings are all oblique needs some as well.
        plain=tuple(text for text in state.common if text not in common) or state.common,
        mention=tuple(item["mention"]),
    )


def _stems(*texts: str) -> set[str]:
    """The first five letters of the content words, without template slots."""
    # Five letters make forms of a word equal, such as `studied` and `studies`.
    return {word[:5] for text in texts for word in content_words(re.sub(r"\{\w+\}", " ", text))}


def _wordings(item: dict[str, Any], key: str) -> Wordings:
    return Wordings(common=tuple(item[key]), reserved=tuple(item.get(f"{key}_reserved", ())))
