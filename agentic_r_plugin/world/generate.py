"""The generated benchmark: a fictional world, so that no model can know the answers in advance (command `world`).

It is written in FlashRAG's layout. The entities of the train, dev and test questions are disjoint, and no fact connects
two splits. Retrieval is hard for four reasons: every entity has several passages under one title; other passages
mention it with the exact words of a relation but a wrong object; people and works have namesakes that only the question
distinguishes; and some passages and questions about test entities use wordings that never occur in training. Four more
causes (`CAUSES`) are off by default; `tests/benchmarks/world_causes.py` measures each one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from agentic_r_plugin.config import FREE, LATER, deciding
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.records import CorpusLine, Passage, Question
from agentic_r_plugin.storage.claim import Output
from agentic_r_plugin.store import write_records
from agentic_r_plugin.world.facts import SPLITS, Population, build_facts
from agentic_r_plugin.world.prose import ProseConfig, write_passages
from agentic_r_plugin.world.questions import Places, QuestionConfig, write_questions

CAUSES = ("homonyms", "elliptic_queries", "misleading", "paraphrase")
"""Settings that make single parts of the method matter. At 0 the world is the one without them, byte for byte."""

MANIFEST = "world.json"
"""Name of the file with a world's settings, in the world's folder; written last."""


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """A world's sizes; the same values always give the same bytes."""

    out: str = field(default="", metadata={"help": "folder in which the benchmark's folder is made", **FREE})
    name: str = field(default="fictional_world", metadata={"help": "name of the benchmark, and of its folder", **FREE})
    seed: int = field(default=0, metadata={"help": "another seed gives another world"})
    train_questions: int = field(default=600, metadata={"help": "questions in train.jsonl"})
    dev_questions: int = field(default=100, metadata={"help": "questions in dev.jsonl"})
    test_questions: int = field(default=300, metadata={"help": "questions in test.jsonl"})
    share_one_hop: float = field(default=0.30, metadata={"help": "share of one-hop questions"})
    share_two_hops: float = field(default=0.45, metadata={"help": "share of two-hop questions; the rest has three"})
    people: int = field(default=170, metadata={"help": "people, over all splits"})
    works: int = field(default=120, metadata={"help": "novels, operas, paintings and films"})
    companies: int = field(default=36, metadata={"help": "companies"})
    schools: int = field(default=30, metadata={"help": "schools"})
    prizes: int = field(default=24, metadata={"help": "prizes"})
    towns: int = field(default=50, metadata={"help": "towns"})
    rivers: int = field(default=24, metadata={"help": "rivers"})
    newspapers: int = field(default=80, metadata={"help": "pages that only mention things"})
    namesake_share: float = field(
        default=0.4, metadata={"help": "share of people and works whose name is (nearly) another's"}
    )
    mention_share: float = field(
        default=0.6, metadata={"help": "share of passages that mention what they do not state"}
    )
    talk_passages: int = field(default=3, metadata={"help": "passages per entity that mention much and state nothing"})
    reserved_share: float = field(default=0.5, metadata={"help": "share of wordings kept for the test split, there"})
    homonyms: float = field(
        default=0.0,
        metadata={
            "help": "share of people, works and towns with another one's name; the question distinguishes them",
            **LATER,
        },
    )
    elliptic_queries: float = field(
        default=0.0, metadata={"help": "share of hops whose first query leaves out what the question says", **LATER}
    )
    misleading: float = field(
        default=0.0,
        metadata={"help": "share of facts with a passage that states a wrong value in the words of a query", **LATER},
    )
    paraphrase: float = field(
        default=0.0, metadata={"help": "share of facts stated without any word of the queries for them", **LATER}
    )

    def __post_init__(self) -> None:
        if self.share_one_hop < 0 or self.share_two_hops < 0 or self.share_one_hop + self.share_two_hops > 1:
            raise ConfigError("share_one_hop and share_two_hops: expected two shares that add up to at most 1")
        for name in ("train_questions", "dev_questions", "test_questions", "newspapers", "talk_passages"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        for name in ("namesake_share", "mention_share", "reserved_share", "homonyms"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected 0 or more and less than 1, found {getattr(self, name)}")
        for name in ("elliptic_queries", "misleading", "paraphrase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected a share from 0 to 1, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class World:
    """Passages and questions."""

    passages: tuple[Passage, ...]
    questions: dict[str, tuple[Question, ...]]
    """Split -> questions; `metadata` holds gold_doc_ids, hop_answers, relations and more, in hop order."""


def build_world(config: WorldConfig) -> World:
    """Build the world in memory.

    Raises:
        ConfigError: the world is too small for the number of questions.
    """
    rng = random.Random(f"world {config.seed}")
    counts = {"train": config.train_questions, "dev": config.dev_questions, "test": config.test_questions}
    facts = build_facts(
        rng,
        Population(
            people=config.people,
            works=config.works,
            companies=config.companies,
            schools=config.schools,
            prizes=config.prizes,
            towns=config.towns,
            rivers=config.rivers,
            namesake_share=config.namesake_share,
            homonyms=config.homonyms,
        ),
        {"train": 0.5, "dev": 0.12, "test": 0.38},
    )
    prose = ProseConfig(
        reserved_share=config.reserved_share,
        mention_share=config.mention_share,
        talk_passages=config.talk_passages,
        newspapers=config.newspapers,
        paraphrase=config.paraphrase,
        misleading=config.misleading,
        seed=config.seed,
    )
    passages, stated, misleading = write_passages(rng, facts, prose)
    wording = QuestionConfig(
        share_one_hop=config.share_one_hop,
        share_two_hops=config.share_two_hops,
        reserved_share=config.reserved_share,
        elliptic_queries=config.elliptic_queries,
        seed=config.seed,
    )
    places = Places(stated=stated, misleading=misleading)
    questions = {split: tuple(write_questions(rng, facts, places, split, counts[split], wording)) for split in SPLITS}
    return World(passages=tuple(passages), questions=questions)


def run(config: WorldConfig, *, resume: bool = False) -> None:
    """Write `OUT/NAME/` with corpus, train, dev and test `.jsonl`.

    Raises:
        ConfigError: no `out`, or the world is too small for the number of questions.
        OutputExistsError: the folder exists and `resume` is off; with it, a finished world is left as it is.
        ManifestMismatchError: with `resume`, the folder holds another world, or no world of this command.
    """
    if not config.out:
        raise ConfigError("world: expected --out DIR")
    folder = Path(config.out) / config.name
    sizes = deciding(config)
    with Output(out=folder, made_from=sizes, done=MANIFEST, folder=True).claim(resume=resume) as held:
        if held.finished is None:
            world = build_world(config)
            held.begin()
            lines = (CorpusLine(id=passage.id, contents=passage.contents) for passage in world.passages)
            write_records(folder / "corpus.jsonl", lines)
            for split in SPLITS:
                write_records(folder / f"{split}.jsonl", world.questions[split])
            held.finish(sizes)
