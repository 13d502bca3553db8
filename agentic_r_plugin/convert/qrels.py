"""`agentic-r convert qrels`: which passages are relevant, in TREC's form.

| in | out |
|---|---|
| questions | their gold documents, relevance 1 |
| relevance | the judge's scores 0..100 of each query, named `id/turn` as in the run of candidates |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, setting
from agentic_r_plugin.convert.output import convert_once
from agentic_r_plugin.convert.runs import holds
from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.field_values import listed
from agentic_r_plugin.questions import FORMAT, read_questions
from agentic_r_plugin.records import Relevance
from agentic_r_plugin.store import read_records
from agentic_r_plugin.trec import word, write_lines


@dataclass(frozen=True, kw_only=True)
class ConvertQrelsConfig:
    """Write gold documents or judged relevance as TREC qrels."""

    in_: str = setting("questions with metadata.gold_doc_ids, or relevance", BY_CONTENTS)
    out: str = setting("file to write", FREE)
    format: str = field(default="", metadata={**FORMAT, **LATER})


def run(config: ConvertQrelsConfig, *, resume: bool = False) -> None:
    """Run the command `convert qrels`."""
    convert_once(config, lambda out: _write_qrels(config, out), inputs={"in": config.in_}, resume=resume)


def _write_qrels(config: ConvertQrelsConfig, out: Path) -> dict[str, int]:
    counts = Counter(queries=0, judged=0)

    def judged() -> Iterator[tuple[str, dict[str, int]]]:
        if holds(config.in_, Relevance):
            yield from ((f"{item.id}/{item.turn}", item.scores) for item in read_records(config.in_, Relevance))
            return
        for question in read_questions(config.in_, format=config.format):
            yield question.id, dict.fromkeys(listed(question.metadata, "gold_doc_ids"), 1)

    def lines() -> Iterator[str]:
        for name, relevance in judged():
            counts["queries"] += bool(relevance)
            for passage, score in relevance.items():
                counts["judged"] += 1
                yield f"{word(name)} 0 {word(passage)} {score}\n"
        if not counts["judged"]:
            raise RecordError("no question has gold documents in metadata.gold_doc_ids", path=config.in_)

    write_lines(out, lines())
    return dict(counts)
