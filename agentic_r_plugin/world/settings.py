"""Settings of a generated world."""

from __future__ import annotations

from dataclasses import dataclass, field

from agentic_r_plugin.config import FREE, LATER
from agentic_r_plugin.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """A world's sizes; the same values always give the same bytes.

    `elliptic_queries`, `misleading` and `paraphrase` draw from separate random numbers, so that each leaves everything
    else unchanged.
    """

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
