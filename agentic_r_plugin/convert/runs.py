"""`agentic-r convert runs`: what was retrieved, for trec_eval, ranx and BrowseComp-Plus.

| in | `to` | out |
|---|---|---|
| trajectories (a cell's `per_question.jsonl`) | `trec` | one ranking per question: passages in the order shown |
| candidates | `trec` | one ranking per query, named `id/turn` |
| trajectories | `browsecomp_plus` | a folder with one run file per question |
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agentic_r_plugin import components
from agentic_r_plugin.config import BY_CONTENTS, FREE, setting
from agentic_r_plugin.convert.output import convert_once
from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.protocol import AgentProtocol
from agentic_r_plugin.records import Candidates, Record, StopReason, Trajectory
from agentic_r_plugin.store import read_lines, read_records, shards, write_json
from agentic_r_plugin.tags import TagProtocol, with_tags
from agentic_r_plugin.trec import run_lines, word, write_lines


@dataclass(frozen=True, kw_only=True)
class ConvertRunsConfig:
    """Write what was retrieved as a TREC run, or trajectories as BrowseComp-Plus run files."""

    in_: str = setting("trajectories, or candidates", BY_CONTENTS)
    out: str = setting("file to write; for browsecomp_plus a folder", FREE)
    to: str = setting("trec or browsecomp_plus", default="trec")
    tag: str = setting("name of the run; for browsecomp_plus the model's", default="agentic-r")
    protocol: str = setting("agent_protocol of the trajectories", default="search_r1")

    def __post_init__(self) -> None:
        if self.to not in ("trec", "browsecomp_plus"):
            raise ConfigError(f"to={self.to!r}: expected trec or browsecomp_plus")
        word(self.tag)


def run(config: ConvertRunsConfig, *, resume: bool = False) -> None:
    """Run the command `convert runs`."""
    folder = config.to == "browsecomp_plus"
    write = _write_browsecomp_plus if folder else _write_trec
    convert_once(config, lambda out: write(config, out), inputs={"in": config.in_}, resume=resume, folder=folder)


def _write_trec(config: ConvertRunsConfig, out: Path) -> dict[str, int]:
    counts = Counter(rankings=0, passages=0)

    def lines() -> Iterator[str]:
        for name, ranking in _rankings(config.in_):
            counts["rankings"] += 1
            counts["passages"] += len(ranking)
            yield from run_lines(name, ranking, config.tag)
        if not counts["rankings"]:
            raise RecordError("no trajectories or candidates", path=config.in_)

    write_lines(out, lines())
    return dict(counts)


def _rankings(path: str) -> Iterator[tuple[str, Sequence[tuple[str, float]]]]:
    """(name, passages with their scores) of each ranking.

    The passages of a trajectory come from several searches, whose scores do not compare, so their scores are 1 / rank.
    """
    if holds(path, Candidates):
        for query in read_records(path, Candidates):
            yield f"{query.id}/{query.turn}", [(passage.id, passage.score) for passage in query.passages]
    else:
        for record in read_records(path, Trajectory):
            yield record.id, [(name, 1 / rank) for rank, name in enumerate(_shown(record), start=1)]


def _shown(record: Trajectory) -> list[str]:
    """Passages of all searches, in the order in which they were first shown."""
    return list(dict.fromkeys(passage.id for turn in record.turns for passage in turn.passages))


def _write_browsecomp_plus(config: ConvertRunsConfig, out: Path) -> dict[str, int]:
    protocol = with_tags(config.protocol)
    count = 0
    for count, record in enumerate(read_records(config.in_, Trajectory), start=1):
        write_json(out / f"run_{count:06d}.json", _browsecomp_plus(record, protocol, config.tag))
    if not count:
        raise RecordError("no trajectories", path=config.in_)
    return {"files": count}


def _browsecomp_plus(record: Trajectory, protocol: TagProtocol, model: str) -> dict[str, Any]:
    def event(kind: str, output: Any, tool: str | None = None, arguments: str | None = None) -> dict[str, Any]:
        return {"type": kind, "tool_name": tool, "arguments": arguments, "output": output}

    events = []
    for turn in record.turns:
        if turn.reasoning:
            events.append(event("reasoning", [turn.reasoning]))
        found = json.dumps([{"docid": passage.id, "score": passage.score} for passage in turn.passages])
        events.append(event("tool_call", found, "search", json.dumps({"query": turn.query}, ensure_ascii=False)))
    if record.answer is not None:
        if reasoning := _last_thought(record, protocol):
            events.append(event("reasoning", [reasoning]))
        events.append(event("output_text", record.answer))
    return {
        "metadata": {"model": model},
        "query_id": record.id,
        "tool_call_counts": {"search": len(record.turns)},
        "status": "completed" if record.stop_reason == StopReason.ANSWERED else "incomplete",
        "retrieved_docids": _shown(record),
        "result": events,
    }


def _last_thought(record: Trajectory, protocol: TagProtocol) -> str:
    """What the agent wrote before its answer, without tags."""
    if not record.runs:
        thought, _, _ = protocol.exchanges(record.text)[-1][0].rpartition(protocol.opening(protocol.answer_tag))
        return re.sub(r"</?\w+>", "", thought).strip()
    # An agent that calls tools. Its last turn, which answers, holds no call, whatever the form of its calls.
    tools: AgentProtocol = components.load("agent_protocol", "tool_calls")
    pieces = tools.pieces(replace(record, text=record.text[-record.runs[-1] :], runs=record.runs[-1:]))
    return "\n".join(piece.text for piece in pieces if piece.kind == "think")


def holds(path: str, record: type[Record]) -> bool:
    """Whether the first record of a file or folder is of this kind, whatever its schema number."""
    first = next((row for shard in shards(path) for _, row in read_lines(shard)), None)
    kind = str(record.schema).partition("/")[0]
    return isinstance(first, dict) and str(first.get("schema")).partition("/")[0] == kind
