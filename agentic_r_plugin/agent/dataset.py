"""Convert questions in FlashRAG layout to a verl data set (Parquet)."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.protocol import AgentProtocol, Codec, Limits
from agentic_r_plugin.questions import read_rows
from agentic_r_plugin.records import Question
from agentic_r_plugin.store import atomic_path


@dataclass(frozen=True, kw_only=True)
class SourcedQuestion:
    """A question record and the benchmark it comes from; verl reports validation by benchmark."""

    record: Question
    source: str


def read_sourced_questions(path: str | Path, format: str = "") -> list[SourcedQuestion]:
    """Read the questions of a file in order; each has gold answers.

    The benchmark is the row's `data_source` if present (Parquet from `write_parquet`, Search-R1 or verl), else the
    name of the file's folder, as in FlashRAG's layout.

    Raises:
        RecordError: as `questions.read_rows`.
        ConfigError: an unknown format, or the file holds no question.
    """
    folder = Path(path).resolve().parent.name or "questions"
    found = [
        SourcedQuestion(record=question, source=str(row.get("data_source") or folder))
        for question, row in read_rows(path, labelled=True, format=format)
    ]
    if not found:
        raise ConfigError(f"{path}: expected at least one question, found none")
    return found


def draw(questions: list[SourcedQuestion], most: int, seed: int | str) -> list[SourcedQuestion]:
    """Sample at most `most` questions with the given seed, keeping their order; 0: all."""
    if not most or most >= len(questions):
        return questions
    chosen = sorted(random.Random(seed).sample(range(len(questions)), most))
    return [questions[index] for index in chosen]


def verl_row(item: SourcedQuestion, index: int, protocol: AgentProtocol) -> dict[str, Any]:
    """Build one data set row.

    verl reads `data_source`, `prompt` (to measure its length) and `reward_model.ground_truth`, which it passes to our
    `verl_reward.compute_score`. Our agent loop reads `extra_info`, from which it rebuilds the question.
    """
    record = item.record
    answers = list(record.golden_answers)
    return {
        "data_source": item.source,
        "prompt": [{"role": "user", "content": protocol.prompt(record.question)}],
        "ability": "search",
        "reward_model": {"style": "rule", "ground_truth": answers},
        # `index` identifies the row in sampling seeds and in the order of a batch (`agent_loop._place`).
        "extra_info": {"index": index, "id": record.id, "question": record.question, "golden_answers": answers},
    }


def write_parquet(path: str | Path, questions: Sequence[SourcedQuestion], protocol: AgentProtocol) -> None:
    """Write the data set atomically; rows are numbered in order (`extra_info.index`)."""
    import pyarrow
    import pyarrow.parquet

    rows = [verl_row(item, index, protocol) for index, item in enumerate(questions)]
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)


def fitting(
    questions: Sequence[SourcedQuestion], protocol: AgentProtocol, codec: Codec, limits: Limits
) -> tuple[list[SourcedQuestion], list[int]]:
    """Select the questions whose prompts leave the model room within `limits.max_tokens`; count their prompt tokens.

    Prints on stderr how many questions are left out.

    Raises:
        ConfigError: no question fits.
    """
    lengths = [len(protocol.prompt_ids(item.record.question, codec)) for item in questions]
    # A prompt must leave room for at least one token of the model.
    kept = [place for place, length in enumerate(lengths) if length < limits.max_tokens]
    if len(kept) < len(lengths):
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        named = questions[longest].record.id
        problem = (
            f"limits.max_tokens={limits.max_tokens} leaves no room after the prompts of {len(lengths) - len(kept)} of "
            f"{len(lengths)} questions; the longest, of question {named!r}, takes {lengths[longest]} tokens"
        )
        if not kept:
            raise ConfigError(f"{problem}; raise the limit")
        print(f"train-agent: {problem}; they are left out", file=sys.stderr)
    return [questions[place] for place in kept], [lengths[place] for place in kept]
