"""Candidates: the passages that the previous retriever finds for each query (method section 4, step 2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from agentic_r_plugin.backends import SearchSpec, open_search
from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, check_least, setting
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.data.stages.runner import RunnerSpec, StageWorker
from agentic_r_plugin.data.stages.stage import Stage, for_workers, record_units, run_stage
from agentic_r_plugin.errors import ConfigError, RecordError, SearchRefusedError
from agentic_r_plugin.protocol import AgentProtocol, load_protocol
from agentic_r_plugin.records import Candidates, ScoredPassage, Trajectory
from agentic_r_plugin.search.base import SearchBackend, SearchRequest, search_each
from agentic_r_plugin.storage.claim import MANIFEST, companion
from agentic_r_plugin.storage.table import UnitResult
from agentic_r_plugin.store import read_json


@dataclass(frozen=True, kw_only=True)
class CandidatesConfig:
    """Retrieve the candidate passages of every query of every trajectory."""

    in_: str = setting("trajectories file", BY_CONTENTS)
    out: str = setting("candidates file to write", FREE)
    search: SearchSpec = setting("the previous retriever", default_factory=SearchSpec)
    protocol: str = setting("agent_protocol of the trajectories", default="search_r1")
    protocol_options: dict[str, Any] = setting(
        "options of the protocol that differ from its own", LATER, default_factory=dict
    )
    topk: int = setting("candidates per query", default=20)
    reasoning: bool = setting(
        "keep the agent's reasoning, for formulations that read it (candidates/2)", LATER, default=False
    )
    max_turn: int = setting("leave out later turns (the released code: 4); 0: none", default=0)
    batch_size: int = setting("trajectories at once", FREE, default=64)
    runner: RunnerSpec = setting("where it runs", FREE, default_factory=RunnerSpec)

    def __post_init__(self) -> None:
        check_least(self, "candidates.", topk=1, max_turn=0)


def check_protocol(stage: str, source: str, protocol: str) -> None:
    """Raise ConfigError if the manifest of `source` says that its agent wrote in another protocol."""
    manifest = companion(Path(source), MANIFEST)
    before = read_json(manifest).get("made_from", {}).get("protocol") if manifest.is_file() else None
    if before not in (None, protocol):
        raise ConfigError(
            f"{stage}.protocol={protocol}: {source} was made with protocol={before}, in which its agent writes; give "
            f"protocol={before}"
        )


def queries_of(trajectory: Trajectory, protocol: AgentProtocol) -> list[Candidates]:
    """The queries of a trajectory, with no passages yet.

    Raises:
        RecordError: the trajectory's text and its turns disagree.
    """
    searches = protocol.prefixes(trajectory)
    in_text, in_turns = [search.query for search in searches], [turn.query for turn in trajectory.turns]
    if in_text != in_turns:
        raise RecordError(
            f"trajectory {trajectory.id!r}: its turns hold the queries {in_turns}, its text {in_text}; was it written "
            f"with another agent protocol than {protocol.name!r}, or other options of it?"
        )
    return [
        Candidates(
            id=trajectory.id,
            turn=turn.turn,
            question=trajectory.question,
            golden_answers=trajectory.golden_answers,
            query=turn.query,
            history=tuple(in_turns[:position]),
            prefix=search.text,
            passages=(),
            reasoning=turn.reasoning,
            turn_start=search.turn_start,
            last_shown=_last_shown(trajectory, search.turn_start),
            opens=search.opens,
        )
        for position, (turn, search) in enumerate(zip(trajectory.turns, searches, strict=True))
    ]


def _last_shown(trajectory: Trajectory, turn_start: int | None) -> tuple[str, ...]:
    """Ids of the passages of the last search before a turn that holds several calls; empty for a turn with one."""
    before = [turn.passages for turn in trajectory.turns if turn_start is not None and turn.end <= turn_start]
    return tuple(passage.id for passage in before[-1]) if before else ()


def find_candidates(
    trajectories: Iterable[Trajectory],
    search: SearchBackend,
    *,
    protocol: AgentProtocol,
    topk: int = 20,
    max_turn: int = 0,
    keep_reasoning: bool = False,
    cost: Cost | None = None,
) -> Iterator[list[Candidates] | SearchRefusedError]:
    """Search for candidates for every query of a batch of trajectories, in one call of the retriever.

    Yields for each trajectory its queries with their candidates, or the refusal of one of its queries.

    Args:
        search: the previous retriever; each request also carries the question, the earlier queries and the reasoning.
        protocol: the protocol that the trajectories were written with.
        max_turn: later turns are left out; 0 keeps all.
        keep_reasoning: whether the candidates hold the agent's reasoning.
        cost: updated in place, if given.

    Raises:
        SearchError: the retriever failed.
        RecordError: a trajectory's text and turns disagree.
    """
    queries = [
        [query for query in queries_of(trajectory, protocol) if not max_turn or query.turn <= max_turn]
        for trajectory in trajectories
    ]
    requests = [SearchRequest.of(query) for of_trajectory in queries for query in of_trajectory]
    if cost is not None:
        cost.searches += len(requests)
    # One call for all trajectories of the batch; they take their results from it in turn.
    found = iter(search_each(search, requests, topk))
    for of_trajectory in queries:
        results = [next(found) for _ in of_trajectory]
        refused = next((result for result in results if isinstance(result, SearchRefusedError)), None)
        # The unit is a trajectory, and its candidates are complete or absent: one refused query refuses all of them.
        yield refused or [
            replace(
                query,
                passages=tuple(ScoredPassage(id=hit.passage.id, score=hit.score) for hit in hits),
                reasoning=query.reasoning if keep_reasoning else "",  # without it, records stay candidates/1
            )
            for query, hits in zip(of_trajectory, results, strict=True)
            if not isinstance(hits, SearchRefusedError)  # always true here; for the type checker
        ]


class CandidatesWorker(StageWorker):
    """Retrieves candidates for batches of trajectories; holds the previous retriever."""

    def __init__(self, config: CandidatesConfig) -> None:
        super().__init__()
        self.config = config
        self._search = self.models.enter_context(open_search(config.search))
        self._protocol = load_protocol(config.protocol, config.protocol_options)

    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of the retriever."""
        return {"retriever": self._search.fingerprint()}

    def work(self, batch: Sequence[Trajectory]) -> list[UnitResult]:
        """Per trajectory, its queries with candidates, or the refusal of one of them."""
        config = self.config
        found = find_candidates(
            batch,
            self._search,
            protocol=self._protocol,
            topk=config.topk,
            max_turn=config.max_turn,
            keep_reasoning=config.reasoning,
            cost=self.cost,
        )
        return [
            UnitResult.refused(queries)
            if isinstance(queries, SearchRefusedError)
            else UnitResult(records=tuple(queries), dropped=None if queries else "no_search")
            for queries in found
        ]


def run(config: CandidatesConfig, *, resume: bool = False) -> None:
    """Run the command `candidates`."""
    check_protocol("candidates", config.in_, config.protocol)
    stage = Stage(
        name="candidates",
        config=config,
        inputs={"trajectories": Path(config.in_)},
        record=Candidates,
        units=lambda: record_units(config.in_, Trajectory, attrgetter("id")),
        worker=partial(CandidatesWorker, for_workers(config)),
        batch_size=config.batch_size,
    )
    run_stage(stage, resume=resume)
