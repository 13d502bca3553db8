"""Questions in FlashRAG layout as a verl data set (Parquet)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.protocol import AgentProtocol, Codec, Limits
from agentic_r_plugin.records import Question
from agentic_r_plugin.store import atomic_path, read_records


def read_questions(path: str | Path, *, limit: int | None = None) -> list[Question]:
    """Questions of a file, in order; at most `limit`.

    Raises:
        RecordError: no such file, or a broken line (file and line).
        ConfigError: no question in it, or an id that stands twice.
    """
    questions = list(read_records(path, Question))[:limit]
    if not questions:
        raise ConfigError(f"{path}: expected at least one question, found none")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise ConfigError(f"{path}: question id {question.id!r} stands twice; ids must be unique")
        seen.add(question.id)
    return questions


def verl_row(question: Question, index: int, protocol: AgentProtocol, data_source: str) -> dict[str, Any]:
    """One row: what verl's data set, our agent loop and our reward read."""
    answers = list(question.golden_answers)
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": protocol.prompt(question.question)}],
        "ability": "search",
        "reward_model": {"style": "rule", "ground_truth": answers},
        "extra_info": {
            "index": index,
            "id": question.id,
            "question": question.question,
            "golden_answers": answers,
        },
    }


def write_parquet(path: str | Path, questions: Sequence[Question], protocol: AgentProtocol, data_source: str) -> None:
    """Write the data set atomically; rows are numbered in order (`extra_info.index`)."""
    import pyarrow
    import pyarrow.parquet

    rows = [verl_row(question, index, protocol, data_source) for index, question in enumerate(questions)]
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)


def prompt_lengths(questions: Sequence[Question], protocol: AgentProtocol, codec: Codec, limits: Limits) -> list[int]:
    """Tokens of each question's prompt.

    Raises:
        ConfigError: a prompt leaves the model no room within `limits.max_tokens`.
    """
    lengths = [len(protocol.prompt_ids(question.question, codec)) for question in questions]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    if lengths[longest] >= limits.max_tokens:
        raise ConfigError(
            f"limits.max_tokens={limits.max_tokens}: the prompt of question {questions[longest].id!r} alone takes "
            f"{lengths[longest]} tokens; raise the limit or leave the question out"
        )
    return lengths


def data_source_name(path: str | Path) -> str:
    """Name of the benchmark a question file belongs to: its folder's, as in FlashRAG's layout.

    >>> data_source_name("data/hotpotqa/dev.jsonl")
    'hotpotqa'
    """
    return Path(path).resolve().parent.name or "questions"
