"""`agentic-r convert questions`: questions in any form that is read, as FlashRAG's JSON Lines or Parquet."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentic_r_plugin.config import BY_CONTENTS, FREE
from agentic_r_plugin.convert.output import convert_once
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.store import write_records


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    """Write questions of any form in FlashRAG's form, with one id each."""

    in_: str = field(metadata={"help": "questions file or folder, in any form of docs/formats.md", **BY_CONTENTS})
    out: str = field(metadata={"help": "file to write: .jsonl, .jsonl.gz or .parquet", **FREE})


def run(config: QuestionsConfig, *, resume: bool = False) -> None:
    """Run the command `convert questions`."""

    def write(out: Path) -> dict[str, Any]:
        return {"questions": write_records(out, read_questions(config.in_))}

    convert_once(config, write, inputs={"in": config.in_}, resume=resume)
