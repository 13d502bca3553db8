"""Settings of a generated world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agentic_r_plugin.config import FREE, LATER, setting
from agentic_r_plugin.errors import ConfigError

MOST_ENTITIES = 10_000
"""Of one type; their keys in `facts` are this far apart."""


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """A world's sizes; the same values always give the same bytes.

    `elliptic_queries`, `misleading` and `paraphrase` draw from separate random numbers, so that each leaves everything
    else unchanged.
    """

    out: str = setting("folder in which the benchmark's folder is made", FREE, default="")
    name: str = setting("name of the benchmark, and of its folder", FREE, default="fictional_world")
    seed: int = setting("another seed gives another world", default=0)
    train_questions: int = setting("questions in train.jsonl", default=600)
    dev_questions: int = setting("questions in dev.jsonl", default=100)
    test_questions: int = setting("questions in test.jsonl", default=300)
    share_one_hop: float = setting("share of one-hop questions", default=0.30)
    share_two_hops: float = setting("share of two-hop questions; the rest has three", default=0.45)
    people: int = setting("people, over all splits", default=170)
    works: int = setting("novels, operas, paintings and films", default=120)
    companies: int = setting("companies", default=36)
    schools: int = setting("schools", default=30)
    prizes: int = setting("prizes", default=24)
    towns: int = setting("towns", default=50)
    rivers: int = setting("rivers", default=24)
    newspapers: int = setting("newspaper pages, which mention facts but state none", default=80)
    namesake_share: float = setting(
        "share of people and works with the same or nearly the same name as another", default=0.4
    )
    mention_share: float = setting("share of passages that also mention a fact that they do not state", default=0.6)
    talk_passages: int = setting("passages per entity that mention facts but state none", default=3)
    reserved_share: float = setting("in the test split, share of wordings that no other split uses", default=0.5)
    homonyms: float = setting(
        "share of people, works and towns that share a name; the question tells them apart", LATER, default=0.0
    )
    elliptic_queries: float = setting(
        "share of hops whose first query leaves out what the question says", LATER, default=0.0
    )
    misleading: float = setting(
        "share of facts with a passage that states a wrong value in the words of a query", LATER, default=0.0
    )
    paraphrase: float = setting("share of facts stated without any word of the queries for them", LATER, default=0.0)

    def __post_init__(self) -> None:
        if self.name in ("", "..") or Path(self.name).name != self.name:
            raise ConfigError(f"name: expected the name of a folder in `out`, found {self.name!r}")
        if self.share_one_hop < 0 or self.share_two_hops < 0 or self.share_one_hop + self.share_two_hops > 1:
            raise ConfigError("share_one_hop and share_two_hops: expected two shares that add up to at most 1")
        for name in ("train_questions", "dev_questions", "test_questions", "newspapers", "talk_passages"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected 0 or more, found {getattr(self, name)}")
        for name in ("people", "works", "companies", "schools", "prizes", "towns", "rivers"):
            if getattr(self, name) >= MOST_ENTITIES:
                raise ConfigError(f"{name}: expected less than {MOST_ENTITIES:,}, found {getattr(self, name):,}")
        for name in ("namesake_share", "mention_share", "reserved_share", "homonyms"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected 0 or more and less than 1, found {getattr(self, name)}")
        for name in ("elliptic_queries", "misleading", "paraphrase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected a share from 0 to 1, found {getattr(self, name)}")
