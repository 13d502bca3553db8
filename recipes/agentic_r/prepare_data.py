"""FlashRAG's data sets as verl's Parquet files: HotpotQA and TriviaQA to train on, the paper's seven to validate on.

    python recipes/agentic_r/prepare_data.py --data-dir FLASHRAG_DATA --out data [--validation-per-set 128]

Reads `FLASHRAG_DATA/<set>/<split>.jsonl` (or .json, .parquet) and writes `train.parquet` and `validation.parquet` in
`--out`. Question ids get the set's name in front, because FlashRAG numbers each set from 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from agentic_r_plugin import components
from agentic_r_plugin.agent.dataset import SourcedQuestion, draw, write_parquet
from agentic_r_plugin.cli import reported
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.evaluation.benchmarks import split_file
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.storage.claim import require_new

TRAIN = ("hotpotqa:train", "triviaqa:train")
VALIDATION = (
    "hotpotqa:dev",
    "2wikimultihopqa:dev",
    "musique:dev",
    "bamboogle:test",
    "nq:test",
    "triviaqa:test",
    "popqa:test",
)
"""Set and split, as in the paper (method section 8)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write both files; an existing one is an error without --overwrite."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="FlashRAG's data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--train", nargs="+", default=TRAIN, metavar="SET:SPLIT")
    parser.add_argument("--validation", nargs="*", default=VALIDATION, metavar="SET:SPLIT")
    parser.add_argument("--train-per-set", type=int, default=0, help="at most that many of each set, drawn; 0: all")
    parser.add_argument("--validation-per-set", type=int, default=128, help="the same; 0: all 51,713")
    parser.add_argument("--protocol", default="search_r1_released", help="its prompt is written into the rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args(arguments)
    protocol = components.load("agent_protocol", options.protocol)
    chosen = {
        "train": (options.train, options.train_per_set),
        "validation": (options.validation, options.validation_per_set),
    }
    for name, (sets, per_set) in chosen.items():
        path = options.out / f"{name}.parquet"
        if not options.overwrite:
            require_new(path, or_else="pass --overwrite")
        questions = [
            question
            for item in sets
            for question in draw(load(options.data_dir, item), per_set, f"{options.seed}:{item}")
        ]
        if not questions:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, questions, protocol)
        counts = {
            source: sum(q.source == source for q in questions) for source in dict.fromkeys(q.source for q in questions)
        }
        print(f"{path}: {len(questions):,} questions ({', '.join(f'{k} {v:,}' for k, v in counts.items())})")
    return 0


def load(data_dir: Path, item: str) -> list[SourcedQuestion]:
    """The questions of one `SET:SPLIT`.

    Raises:
        ConfigError: not of that form, or no such split.
        RecordError: as `questions.read_questions`; a question without answers.
    """
    name, _, split = item.partition(":")
    if not name or not split:
        raise ConfigError(f"{item!r}: expected SET:SPLIT, such as hotpotqa:train")
    questions = read_questions(split_file(data_dir / name, split), labelled=True)
    return [
        SourcedQuestion(record=replace(question, id=f"{name}/{split}/{question.id}"), source=name)
        for question in questions
    ]


if __name__ == "__main__":
    with reported("prepare_data.py"):
        sys.exit(main())
