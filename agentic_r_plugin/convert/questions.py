"""`agentic-r convert questions`: questions of other projects, from files or the Hugging Face hub, in FlashRAG's form.

The other commands read most forms as they are. This command adds the data sets that only `datasets` reads, and joins
BEIR's queries with their relevant documents.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agentic_r_plugin.config import BY_CONTENTS, FREE
from agentic_r_plugin.convert.output import convert_once
from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.forms import LISTS
from agentic_r_plugin.questions import FORMAT, Rows, checked, read_rows
from agentic_r_plugin.records import Question
from agentic_r_plugin.store import write_records

HUB = "hub:"
"""Prefix of the name of a data set on the hub."""


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    """Write questions of any form in FlashRAG's form, with one id each."""

    in_: str = field(
        metadata={"help": "questions file or folder, folder saved by `datasets`, or hub:NAME", **BY_CONTENTS}
    )
    out: str = field(metadata={"help": "file to write: .jsonl, .jsonl.gz or .parquet", **FREE})
    format: str = field(default="", metadata=FORMAT)
    split: str = field(default="train", metadata={"help": "of a data set of the hub, or of a saved one"})
    subset: str = field(default="", metadata={"help": "configuration of a data set of the hub"})
    qrels: str = field(
        default="",
        metadata={"help": "qrels of BEIR (.tsv) or TREC: only their questions, with gold documents", **BY_CONTENTS},
    )


def run(config: QuestionsConfig, *, resume: bool = False) -> None:
    """Run the command `convert questions`.

    Raises:
        OutputExistsError: the output exists and `resume` is off.
        ConfigError: an unknown format, or a data set that `datasets` cannot open.
        RecordError: a broken question, none, or a broken line of the qrels; names file and line.
    """

    def write(out: Path) -> dict[str, int]:
        counts = dict.fromkeys(("questions", "with_golden_answers", *LISTS), 0)

        def counted() -> Iterator[Question]:
            for question in converted(config):
                counts["questions"] += 1
                counts["with_golden_answers"] += bool(question.golden_answers)
                for name in LISTS:
                    counts[name] += bool(question.metadata.get(name))
                yield question
            if not counts["questions"]:
                raise RecordError(
                    f"no question{f' with a relevant document in {config.qrels}' if config.qrels else ''}",
                    path=config.in_,
                )

        write_records(out, counted())
        return counts

    files = {"in": "" if _by_datasets(config) else config.in_, "qrels": config.qrels}
    convert_once(config, write, inputs=files, resume=resume)


def converted(config: QuestionsConfig) -> Iterator[Question]:
    """The questions, one at a time; with `qrels` only those with a relevant document, which is a gold document then.

    Raises:
        ConfigError, RecordError: as `run`.
    """
    relevant = read_qrels(config.qrels) if config.qrels else None
    if _by_datasets(config):
        rows = checked(lambda: _rows(config), format=config.format)
    else:
        rows = read_rows(config.in_, format=config.format)
    for question, _ in rows:
        if relevant is None:
            yield question
        elif gold := relevant.get(question.id):
            yield replace(question, metadata=question.metadata | {"gold_doc_ids": gold})


def read_qrels(path: str | Path) -> dict[str, list[str]]:
    """Question id -> ids of its relevant documents (a grade above 0), in the order of the file.

    Args:
        path: BEIR's `query-id corpus-id score` with a header and tabs, or TREC's `qid 0 docid grade`.

    Raises:
        RecordError: no such file, or another line; names file and line.
    """
    path, relevant = Path(path), defaultdict[str, list[str]](list)
    if not path.is_file():
        raise RecordError("no such file", path=path)
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.split("\t") if "\t" in line else line.split()
            if not line.strip() or (number == 1 and fields[0] == "query-id"):
                continue
            try:
                if len(fields) not in (3, 4) or not math.isfinite(grade := float(fields[-1])):
                    raise ValueError
            except ValueError:
                expected = "expected a question id, a document id and a grade (BEIR), or with a 0 between them (TREC)"
                raise RecordError(f"{expected}, found {line.strip()[:80]!r}", path=path, line=number) from None
            if grade > 0:
                relevant[fields[0].strip()].append(fields[-2].strip())
    return dict(relevant)


def _by_datasets(config: QuestionsConfig) -> bool:
    """Whether `in` is a data set of the hub or a folder that `save_to_disk` of `datasets` wrote."""
    saved = (Path(config.in_) / name for name in ("state.json", "dataset_dict.json"))
    return config.in_.startswith(HUB) or any(file.is_file() for file in saved)


def _rows(config: QuestionsConfig) -> Rows:
    """Rows of a data set that `datasets` opens; of the hub they are streamed.

    Raises:
        ConfigError: it cannot be opened.
    """
    import datasets

    name = config.in_.removeprefix(HUB)
    data: Any
    try:
        if config.in_.startswith(HUB):
            data = datasets.load_dataset(name, config.subset or None, split=config.split, streaming=True)
        else:
            data = datasets.load_from_disk(name)
            if isinstance(data, datasets.DatasetDict):
                if config.split not in data:
                    raise ValueError(f"its splits are {', '.join(data)}")
                data = data[config.split]
        for number, row in enumerate(data, start=1):
            yield Path(name), number, row
    except Exception as error:
        where = (
            "; where the hub cannot be reached, download the data set elsewhere and give its Parquet or JSON files "
            f"(hf download --repo-type dataset {name})"
            if config.in_.startswith(HUB)
            else ""
        )
        raise ConfigError(
            f"{config.in_}, split {config.split!r}: `datasets` cannot open it: {type(error).__name__}: {error}{where}"
        ) from error
