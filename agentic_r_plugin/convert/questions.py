"""`agentic-r convert questions`: questions of other projects, from files or the Hugging Face hub, in FlashRAG's form.

The other commands read most forms as they are. This command adds the data sets that only `datasets` reads, and names
gold documents: those of qrels, or the passages of a corpus that are the supporting paragraphs in a question's row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agentic_r_plugin.config import BY_CONTENTS, FREE, fingerprint, setting
from agentic_r_plugin.convert.hub import HubConfig, push_file
from agentic_r_plugin.convert.output import convert_once
from agentic_r_plugin.convert.passages import PassageFinder, context_passage
from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.field_values import listed
from agentic_r_plugin.forms import LISTS, context_documents
from agentic_r_plugin.questions import FORMAT, Rows, questions_in, read_rows, relevant_only
from agentic_r_plugin.records import Question
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.store import beir_queries, sampled_fingerprint, write_records

HUB = "hub:"
"""Prefix of the name of a data set on the hub."""


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig(HubConfig):
    """Write questions of any form in FlashRAG's form, with one id each."""

    in_: str = setting("questions file or folder, folder saved by `datasets`, or hub:NAME", BY_CONTENTS)
    out: str = setting("file to write: .jsonl, .jsonl.gz or .parquet", FREE)
    format: str = field(default="", metadata=FORMAT)
    split: str = setting("of a data set of the hub, a saved one, or BEIR's", default="train")
    subset: str = setting("configuration of a data set of the hub", default="")
    qrels: str = setting(
        "qrels of BEIR (.tsv) or TREC: only their questions, with gold documents", BY_CONTENTS, default=""
    )
    corpus: str = setting(
        "corpus in which the rows' own supporting paragraphs are gold documents", BY_CONTENTS, default=""
    )

    def __post_init__(self) -> None:
        if self.qrels and self.corpus:
            raise ConfigError("qrels, corpus: expected one of them, both name the gold documents")


def run(config: QuestionsConfig, *, resume: bool = False) -> None:
    """Run the command `convert questions`.

    Raises:
        OutputExistsError: the output exists and `resume` is off.
        ConfigError: an unknown format, or a data set that `datasets` cannot open.
        RecordError: a broken question, none, or a broken line of the qrels; names file and line.
        BackendError: the upload failed; the file is written and whole.
    """

    def write(out: Path) -> dict[str, Any]:
        counts = dict.fromkeys(("questions", "with_golden_answers", *LISTS), 0)

        def counted(finder: PassageFinder | None) -> Iterator[Question]:
            for question in converted(config, finder, counts):
                counts["questions"] += 1
                counts["with_golden_answers"] += bool(question.golden_answers)
                for name in LISTS:
                    counts[name] += bool(question.metadata.get(name))
                yield question
            if not counts["questions"]:
                where = f" with a relevant document in {qrels}" if (qrels := _qrels(config)) else ""
                raise RecordError(f"no question{where}", path=config.in_)

        with ExitStack() as stack:
            finder = None
            if config.corpus:
                corpus = stack.enter_context(Corpus(config.corpus))
                finder = stack.enter_context(closing(PassageFinder(corpus, out.parent)))
            write_records(out, counted(finder))
            return {**counts, **({"gold_passages": finder.counts} if finder else {})}

    files = {"in": "" if _by_datasets(config) else str(_source(config)), "qrels": config.qrels, "corpus": config.corpus}
    report = convert_once(config, write, inputs=files, made_from=_data_set(config), resume=resume)
    rows = report["questions"]
    text = (
        f"# Questions\n\n{rows} questions, {report['with_golden_answers']} with gold answers and "
        f"{report['gold_doc_ids']} with ids of gold documents, written by `agentic-r convert questions`: `id`, "
        "`question`, `golden_answers`, `metadata`."
    )
    push_file(config, text, rows=rows, task="question-answering", tags=["questions"])


def converted(
    config: QuestionsConfig, finder: PassageFinder | None = None, counts: dict[str, int] | None = None
) -> Iterator[Question]:
    """The questions, one at a time; with qrels only those with a relevant document, which is a gold document then.

    With a `finder` the supporting paragraphs in a question's row are its gold documents, if the row holds them all.
    `counts` takes what the qrels leave out (`questions.relevant_only`).

    Raises:
        ConfigError, RecordError: as `run`.
    """
    if _by_datasets(config):
        rows = questions_in(_data_set_rows(config), format=config.format)
    else:
        source = _source(config)
        rows = read_rows(beir_queries(source) or source, format=config.format)
    if qrels := _qrels(config):
        rows = relevant_only(rows, qrels, counts)
    for question, row in rows:
        if finder is not None and (names := _own_gold(question, row, finder)):
            question = replace(question, metadata=question.metadata | {"gold_doc_ids": names})
        yield question


def _source(config: QuestionsConfig) -> Path:
    """The file or folder of the questions: in a BEIR data set, the qrels of the split."""
    qrels = Path(config.in_, "qrels", f"{config.split}.tsv")
    return qrels if beir_queries(qrels) and qrels.is_file() else Path(config.in_)


def _qrels(config: QuestionsConfig) -> Path | None:
    """The qrels that choose the questions: those of the settings, or of a BEIR data set."""
    if config.qrels or _by_datasets(config):
        return Path(config.qrels) if config.qrels else None
    return source if beir_queries(source := _source(config)) else None


def _own_gold(question: Question, row: Mapping[str, Any], finder: PassageFinder) -> list[str]:
    """Ids of the supporting paragraphs in a question's row; one that the corpus lacks keeps its own."""
    passages = [context_passage(document) for document in context_documents(row) if document["gold"]]
    if not {*listed(question.metadata, "supporting_titles")} <= {passage.title for passage in passages}:
        return []
    return list(dict.fromkeys((finder.find(passage) or passage).id for passage in passages))


def _by_datasets(config: QuestionsConfig) -> bool:
    """Whether `in` is a data set of the hub or a folder that `save_to_disk` of `datasets` wrote."""
    saved = (Path(config.in_) / name for name in ("state.json", "dataset_dict.json"))
    return config.in_.startswith(HUB) or any(file.is_file() for file in saved)


def _data_set(config: QuestionsConfig) -> dict[str, str]:
    """What a resume compares of a data set that `datasets` reads: its name on the hub, or samples of saved files."""
    if not _by_datasets(config):
        return {}
    saved = sorted(Path(config.in_).rglob("*.arrow"))
    return {"data set": fingerprint(*map(sampled_fingerprint, saved)) if saved else config.in_}


def _data_set_rows(config: QuestionsConfig) -> Callable[[], Rows]:
    """Reads the rows of a data set from the start; it is opened once. Of the hub they are streamed.

    Its name, subset and split are the name of the set, from which questions without an id get theirs.

    Raises:
        ConfigError: it cannot be opened; also while it is read.
    """
    import datasets

    name = config.in_.removeprefix(HUB)
    data: Any
    with _opening(config):
        if config.in_.startswith(HUB):
            parts = [name, config.subset, config.split]
            data = datasets.load_dataset(name, config.subset or None, split=config.split, streaming=True)
        else:
            parts = [name]
            data = datasets.load_from_disk(name)
            if isinstance(data, datasets.DatasetDict):
                if config.split not in data:
                    raise ValueError(f"its splits are {', '.join(data)}")
                parts.append(config.split)
                data = data[config.split]
    label = Path("_".join(filter(None, parts)))

    def rows() -> Rows:
        with _opening(config):
            for number, row in enumerate(data, start=1):
                yield label, number, row

    return rows


@contextmanager
def _opening(config: QuestionsConfig) -> Iterator[None]:
    """Turn the errors of `datasets` into a ConfigError that names the data set and the way out."""
    try:
        yield
    except Exception as error:
        where = (
            "; where the hub cannot be reached, download the data set elsewhere and give its Parquet or JSON files "
            f"(hf download --repo-type dataset {config.in_.removeprefix(HUB)})"
            if config.in_.startswith(HUB)
            else ""
        )
        raise ConfigError(
            f"{config.in_}, split {config.split!r}: `datasets` cannot open it: {type(error).__name__}: {error}{where}"
        ) from error
