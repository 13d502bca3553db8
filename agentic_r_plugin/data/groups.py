"""Training groups: one positive and its negatives a query (method section 4, step 6)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agentic_r_plugin.data.journal import Outcome
from agentic_r_plugin.data.selection import PRESETS, SelectionRule, select
from agentic_r_plugin.data.stage import UNRECORDED, Stage, run_stage
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.records import Candidates, Correctness, Group, Relevance
from agentic_r_plugin.store import read_records

Key = tuple[str, int]
"""(question id, turn)."""


@dataclass(frozen=True, kw_only=True)
class GroupsConfig:
    """Pick the positive and the negatives of every query."""

    candidates: str = field(metadata={"help": "candidates file", **UNRECORDED})
    relevance: str = field(default="", metadata={"help": "relevance file", **UNRECORDED})
    correctness: str = field(default="", metadata={"help": "correctness file", **UNRECORDED})
    out: str = field(metadata={"help": "groups file to write", **UNRECORDED})
    preset: str = field(default="paper", metadata={"help": "paper, or released_code: up to 3 tied positives"})
    threshold: int = field(default=60, metadata={"help": "a positive's least relevance"})
    num_negatives: int = field(default=15, metadata={"help": "negatives a group"})
    use_relevance: bool = field(default=True, metadata={"help": "off: ablation without relevance"})
    use_correctness: bool = field(default=True, metadata={"help": "off: ablation without correctness"})
    seed: int = field(default=0, metadata={"help": "of the negatives' sampling"})

    def rule(self) -> SelectionRule:
        """The rule these settings ask for.

        Raises:
            ConfigError: an unknown preset, or settings that contradict each other.
        """
        if self.preset not in PRESETS:
            raise ConfigError(f"preset={self.preset!r}: expected one of {', '.join(PRESETS)}")
        return SelectionRule(
            threshold=self.threshold,
            num_negatives=self.num_negatives,
            use_relevance=self.use_relevance,
            use_correctness=self.use_correctness,
            seed=self.seed,
            **PRESETS[self.preset],
        )


def select_groups(
    queries: Iterable[Candidates],
    relevance: Mapping[Key, Mapping[str, int]],
    correctness: Mapping[Key, Mapping[str, int]],
    rule: SelectionRule,
) -> Iterator[list[Group] | str]:
    """For each query its groups, or the reason why it has none (`data.selection`).

    Raises:
        RecordError: scores are missing that a decision needs.
    """
    for query in queries:
        yield select(query, relevance.get(query.key), correctness.get(query.key), rule)


def read_relevance(path: str | Path) -> dict[Key, dict[str, int]]:
    """Relevance by query.

    Raises:
        RecordError: no such file or a broken record.
    """
    return {(record.id, record.turn): record.scores for record in read_records(path, Relevance)}


def read_correctness(path: str | Path) -> dict[Key, dict[str, int]]:
    """Correctness by query and passage.

    Raises:
        RecordError: no such file or a broken record.
    """
    found: dict[Key, dict[str, int]] = defaultdict(dict)
    for record in read_records(path, Correctness):
        found[record.id, record.turn][record.passage_id] = record.em
    return dict(found)


def query_units(path: str | Path) -> Iterator[tuple[str, Candidates]]:
    """Units of the stages that work on queries."""
    return ((f"{query.id}/{query.turn}", query) for query in read_records(path, Candidates))


def run(config: GroupsConfig, *, resume: bool = False) -> None:
    """The command `groups`."""
    rule = config.rule()
    inputs = {"candidates": Path(config.candidates)}
    for role, needed in (("relevance", rule.use_relevance), ("correctness", rule.use_correctness)):
        path = getattr(config, role)
        if needed and not path:
            raise ConfigError(f"groups: no --{role} file; give one, or switch it off with --no-use-{role}")
        if needed:
            inputs[role] = Path(path)
    relevance = read_relevance(inputs["relevance"]) if rule.use_relevance else {}
    correctness = read_correctness(inputs["correctness"]) if rule.use_correctness else {}

    def work(batch: Iterable[Candidates]) -> Iterator[Outcome]:
        for picked in select_groups(batch, relevance, correctness, rule):
            yield Outcome(dropped=picked) if isinstance(picked, str) else Outcome(records=tuple(picked))

    stage = Stage(
        name="groups",
        config=config,
        out=Path(config.out),
        inputs=inputs,
        record=Group,
        units=lambda: query_units(config.candidates),
        work=work,
        batch_size=1024,
    )
    run_stage(stage, resume=resume)
