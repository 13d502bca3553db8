"""Passages: the parts of each entity's description, passages that only mention its facts, and newspaper pages."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from agentic_r_plugin.records import Passage
from agentic_r_plugin.world import names
from agentic_r_plugin.world.facts import Entity, Fact, Facts
from agentic_r_plugin.world.grammar import Relation, Wordings, grammar
from agentic_r_plugin.world.settings import WorldConfig

_WORDS = (42, 58)
"""Fewest and most words at which a passage ends."""


@dataclass(kw_only=True)
class Draft:
    """A passage without an id."""

    title: str
    text: str
    states: list[tuple[int, str]] = field(default_factory=list)
    """(subject key, relation name) of each stated fact."""


def write_passages(
    rng: random.Random, facts: Facts, config: WorldConfig
) -> tuple[list[Passage], dict[tuple[int, str], str], dict[tuple[int, str], str]]:
    """Write all passages, in random order, misleading ones last.

    Also return, for each fact, the id of the passage that states it, and of the one that misleads about it, if any.
    """
    writer = _Writer(rng, facts, config)
    drafts = [draft for entity in facts.entities for draft in writer.entity(entity)]
    drafts += [writer.newspaper() for _ in range(config.newspapers)]
    rng.shuffle(drafts)
    # Added after the shuffle, so that the ids of all other passages do not depend on `misleading`.
    true, misled = len(drafts), dict[tuple[int, str], str]()
    for key, fact in facts.facts.items() if config.misleading else ():
        own = writer.own("misleading", fact)
        if own.rng.random() < config.misleading:
            misled[key] = str(len(drafts))
            drafts.append(own.misleading(fact))
    passages = [Passage(id=str(index), title=draft.title, text=draft.text) for index, draft in enumerate(drafts)]
    stated = {fact: str(index) for index, draft in enumerate(drafts[:true]) for fact in draft.states}
    return passages, stated, misled


def choose(rng: random.Random, wordings: Wordings, split: str, reserved_share: float) -> str:
    """Choose a wording that this split may use."""
    reserved = split == "test" and wordings.reserved and rng.random() < reserved_share
    return rng.choice(wordings.reserved if reserved else wordings.common)


def kind_words(entity_type: str, kind: str) -> dict[str, str]:
    """Template slots that depend on the kind of a work or on a profession."""
    return {"kind": kind, **names.WORK_KINDS[kind]} if entity_type == "work" else {"job": kind}


_OUTDATED = (
    "An earlier edition of this page, since corrected, had another account.",
    "What follows was believed for a century and has been disproved.",
    "The old almanacs, whose error is well known, give it as follows.",
)
"""Sentences before a value that is no longer held to be true."""

_IMPOSTORS = {
    "person": ("Captain {}", "Young {}", "Sister {}"),
    "work": ("{} Revisited", "{} Retold"),
    "company": ("{} and Sons", "{} Overseas"),
    "school": ("{} Annex", "{} for the Deaf"),
    "prize": ("Junior {}", "Lesser {}"),
    "town": ("New {}", "Upper {}"),
    "river": ("Little {}", "Lower {}"),
}
"""Names of other entities that contain a name."""


class _Writer:
    def __init__(self, rng: random.Random, facts: Facts, config: WorldConfig) -> None:
        self.rng, self.facts, self.config = rng, facts, config

    def own(self, use: str, fact: Fact) -> _Writer:
        """A writer with separate random numbers, so that a larger share changes only what it adds."""
        rng = random.Random(f"{use} {self.config.seed} {fact.subject.key} {fact.relation.name}")
        return _Writer(rng, self.facts, self.config)

    def entity(self, entity: Entity) -> list[Draft]:
        facts = list(self.facts.of(entity))
        drafts = []
        for slot in grammar().types[entity.type].slots:
            here = [fact for fact in facts if fact.relation.slot == slot]
            elsewhere = [fact for fact in facts if fact.relation.slot != slot]
            body = [self._state(fact, fact.relation.state) for fact in here]
            plain = dict(zip(body, here, strict=True)) if self.config.paraphrase else {}
            if elsewhere and self.rng.random() < self.config.mention_share:
                body.append(self._mention(self.rng.choice(elsewhere)))
            draft = self._draft(entity, body, [(entity.key, fact.relation.name) for fact in here])
            for sentence, fact in plain.items():
                own = self.own("paraphrase", fact)
                if own.rng.random() < self.config.paraphrase:
                    # Replaced afterwards, so that all other random draws are those of the world without paraphrases.
                    draft.text = draft.text.replace(sentence, own._state(fact, fact.relation.oblique))
            drafts.append(draft)
        for _ in range(self.config.talk_passages):
            picked = self.rng.sample(facts, min(len(facts), 3))
            drafts.append(self._draft(entity, [self._mention(fact) for fact in picked], []))
        return drafts

    def misleading(self, fact: Fact) -> Draft:
        """Write a passage that states a wrong value in the words of a query: of another entity, or an outdated one."""
        template, decoy = self.rng.choice(fact.relation.plain), fact.value
        # A random year may be the true one.
        while decoy == fact.value:
            decoy = self._other(fact.relation, fact)
        if self.rng.random() < 0.5:
            return self._draft(
                fact.subject, [f"{self.rng.choice(_OUTDATED)} {self._fill(template, fact.subject, o=decoy)}"], []
            )
        other = self._impostor(fact.subject)
        return self._draft(other, [self._fill(template, other, o=decoy)], [])

    def _impostor(self, entity: Entity) -> Entity:
        """Another entity whose name contains that of the given one; a person or work of another kind."""
        kinds: dict[str, list[str]] = {"person": [*names.JOBS], "work": [*names.WORK_KINDS]}
        others = [kind for kind in kinds.get(entity.type, []) if kind != entity.kind]
        kind = self.rng.choice(others) if others else ""
        name = self.rng.choice(_IMPOSTORS[entity.type]).format(entity.name)
        return replace(entity, name=name, kind=kind, alias="", county="")

    def newspaper(self) -> Draft:
        """Write a page that mentions several entities under its own title."""
        place, year = self.rng.choice(self.facts.names["town"]), self._year()
        form = self.rng.choice(("{} Gazette, {}", "{} Chronicle, {}", "Walks around {}, {}", "{} Almanac, {}"))
        subjects = self.rng.sample(self.facts.entities, 4)
        body = [self._mention(self.rng.choice(list(self.facts.of(entity)))) for entity in subjects]
        return Draft(title=form.format(place, year), text=" ".join(body))

    def _draft(self, entity: Entity, body: list[str], states: list[tuple[int, str]]) -> Draft:
        kind = grammar().types[entity.type]
        intro = self._fill(choose(self.rng, kind.intro, entity.split, self.config.reserved_share), entity, first=True)
        if entity.county:
            intro += f" It lies in the county of {entity.county}."
        fillers = self.rng.sample(kind.filler, len(kind.filler))
        wanted = self.rng.randint(*_WORDS)
        while fillers and len(" ".join([intro, *body]).split()) < wanted:
            body.append(self._fill(fillers.pop(), entity))
        self.rng.shuffle(body)
        return Draft(title=entity.name, text=" ".join([intro, *body]), states=states)

    def _state(self, fact: Fact, wordings: Wordings) -> str:
        template = choose(self.rng, wordings, fact.subject.split, self.config.reserved_share)
        shown = fact.object.shown if fact.object is not None else fact.value
        return self._fill(template, fact.subject, o=shown)

    def _mention(self, fact: Fact) -> str:
        decoy = self._other(fact.relation, fact)
        return self._fill(self.rng.choice(fact.relation.mention), fact.subject, x=decoy)

    def _other(self, relation: Relation, fact: Fact) -> str:
        if relation.object == "year":
            return self._year()
        pool = self.facts.names[relation.object]
        # A decoy must not contain the true value: the sentence would then state the fact.
        while True:
            name = self.rng.choice(pool)
            if fact.value not in name and fact.subject.name not in name:
                return name

    def _year(self) -> str:
        return str(self.rng.randrange(1730, 1930))

    def _fill(self, template: str, entity: Entity, *, first: bool = False, **slots: str) -> str:
        if entity.type == "person":
            possessive = "his" if entity.pronoun == "he" else "her"
            surname = entity.name.split()[-1]
            # A template with `{n}` already names the person, so `{s}` is the pronoun.
            form = "pronoun" if "{n}" in template else self.rng.choice(("pronoun", "surname", "surname", "name"))
            subject = {"pronoun": entity.pronoun, "surname": surname, "name": entity.name}[form]
            template = template.replace("{s}'s", possessive if form == "pronoun" else f"{subject}'s")
            slots["a_job"] = self.rng.choice(names.JOBS[entity.kind])
        else:
            subject = entity.shown
        shown = entity.alias if entity.alias and not first and self.rng.random() < 0.3 else entity.shown
        values = {
            **kind_words(entity.type, entity.kind),
            "s": subject,
            "n": shown,
            "town": self.rng.choice(self.facts.names["town"]),
            "person": self.rng.choice(self.facts.names["person"]),
            "year": self._year(),
            **slots,
        }
        text = template.format(**values)
        return text[0].upper() + text[1:]
