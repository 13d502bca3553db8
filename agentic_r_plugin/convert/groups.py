"""`agentic-r convert groups`: training groups as data sets of other trainers.

Each data set is a folder with `train.jsonl` and a card, which says which prefixes the trainer must be given: the query
is formulated as our own trainer does (`Q [SEP] q`), prefixes are in the text only where the trainer adds none.

| to | row | the trainer adds |
|---|---|---|
| `tevatron` | `query_id, query, positive_passages, negative_passages` | `--query_prefix`, `--passage_prefix` |
| `flagembedding` | `query, pos, neg` | `--query_instruction_for_retrieval`, `--passage_instruction_for_retrieval` |
| `sentence_transformers` | `anchor, positive, negative_1 ...` | nothing, so the prefixes are in the text |

If a group has a weight, every row has one: as `weight`, which the first two trainers do not read, or as `label`, which
sentence-transformers gives to the loss.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentic_r_plugin.config import BY_CONTENTS, FREE, setting
from agentic_r_plugin.convert.hub import CARD, HubConfig, card, push
from agentic_r_plugin.convert.output import convert_once
from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.query import retrieval_query
from agentic_r_plugin.records import Group, Passage
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import RetrieverRecord
from agentic_r_plugin.store import atomic_path, dump_line, placed_records, read_records

log = logging.getLogger(__name__)

Row = dict[str, Any]
DATA = "train.jsonl"


@dataclass(frozen=True, kw_only=True)
class ConvertGroupsConfig(HubConfig):
    """Write training groups as a data set of another trainer."""

    in_: str = setting("training groups (agentic-r groups)", BY_CONTENTS)
    out: str = setting("folder of the data set to write", FREE)
    to: str = setting("tevatron, flagembedding or sentence_transformers")
    corpus: str = setting("corpus the groups' passages are in", BY_CONTENTS)
    retriever: str = setting(
        "model that will be trained: gives formulation and prefixes", BY_CONTENTS, default="intfloat/e5-base-v2"
    )
    preset: str = setting("prefixes of a family, as in train-retriever", default="auto")
    formulation: str | None = setting("in place of the retriever's, or question_query", default=None)
    query_prompt: str | None = setting("prefix of queries, in place of the retriever's", default=None)
    passage_prompt: str | None = setting("prefix of passages, likewise", default=None)

    def __post_init__(self) -> None:
        if self.to not in _FORMS:
            raise ConfigError(f"to={self.to!r}: expected one of {', '.join(_FORMS)}")


def _tevatron(group: Group, query: str, passages: list[Passage], record: RetrieverRecord) -> Row:
    documents = [{"docid": passage.id, "title": passage.title, "text": passage.text} for passage in passages]
    return {
        "query_id": f"{group.id}/{group.turn}",
        "query": query,
        "positive_passages": documents[:1],
        "negative_passages": documents[1:],
    }


def _flagembedding(group: Group, query: str, passages: list[Passage], record: RetrieverRecord) -> Row:
    texts = [passage.contents for passage in passages]
    return {"query": query, "pos": texts[:1], "neg": texts[1:]}


def _sentence_transformers(group: Group, query: str, passages: list[Passage], record: RetrieverRecord) -> Row:
    positive, *negatives = [record.passage_prompt + passage.contents for passage in passages]
    columns = {f"negative_{number}": text for number, text in enumerate(negatives, start=1)}
    return {"anchor": record.query_prompt + query, "positive": positive, **columns}


_FORMS: dict[str, tuple[Callable[[Group, str, list[Passage], RetrieverRecord], Row], str]] = {
    "tevatron": (
        _tevatron,
        'Tevatron adds the prefixes and joins title and text with a space. Train with `--query_prefix "{query}" '
        '--passage_prefix "{passage}" --train_group_size {size}`. Our own trainer and index encode `"title"`, a line '
        "break and the text: index with Tevatron what was trained with it.",
    ),
    "flagembedding": (
        _flagembedding,
        "FlagEmbedding adds the prefixes that it is given. Train with "
        '`--query_instruction_for_retrieval "{query}" --query_instruction_format "{{}}{{}}" '
        '--passage_instruction_for_retrieval "{passage}" '
        '--passage_instruction_format "{{}}{{}}" --train_group_size {size}`.',
    ),
    "sentence_transformers": (
        _sentence_transformers,
        'The texts hold the prefixes (`"{query}"` of queries, `"{passage}"` of passages), since the trainer of '
        "sentence-transformers adds none; do not set its `prompts`. Any loss for (anchor, positive, negatives) takes "
        "the columns, such as `MultipleNegativesRankingLoss`.",
    ),
}

_UNREAD = ("weight", "which this trainer does not read: it trains on all groups alike")
_WEIGHTS = {
    "sentence_transformers": (
        "label",
        "which the trainer gives to the loss as labels; `MultipleNegativesRankingLoss` and its relatives ignore them",
    )
}
"""Field of a group's weight, and what the trainer does with it."""


def run(config: ConvertGroupsConfig, *, resume: bool = False) -> None:
    """Run the command `convert groups`.

    Raises:
        RecordError: a broken group, or a passage that the corpus lacks, with file and line.
        BackendError: the upload failed; the folder is written and whole.
    """
    inputs = {"in": config.in_, "corpus": config.corpus}
    convert_once(config, lambda out: _write(config, out), inputs=inputs, resume=resume, folder=True)
    if config.push_to_hub:
        push(config, (Path(config.out) / CARD).read_text(encoding="utf-8"))


def _write(config: ConvertGroupsConfig, out: Path) -> dict[str, Any]:
    record = _retriever_record(config)
    row_of, use = _FORMS[config.to]
    weight_field, read_by = _WEIGHTS.get(config.to, _UNREAD)
    sizes, weighted = [], 0
    # A first pass for the number of negatives, so that memory does not hold the groups.
    for group in read_records(config.in_, Group):
        sizes.append(len(group.negatives))
        weighted += group.weight != 1
    if not sizes:
        raise RecordError("no training groups", path=config.in_)
    # all rows of a table have the same columns, so there all groups get as many negatives as the smallest has
    most = min(sizes) if config.to == "sentence_transformers" else max(sizes)
    with Corpus(config.corpus) as corpus, atomic_path(out / DATA) as temporary, temporary.open("wb") as stream:
        for shard, number, group in placed_records(config.in_, Group):
            try:
                passages = [corpus.by_id(name) for name in (group.positive, *group.negatives[:most])]
            except RecordError as error:
                raise RecordError(str(error), path=shard, line=number) from error
            query = retrieval_query(
                group.question, group.query, group.history, record.formulation, reasoning=group.reasoning
            )
            row = row_of(group, query, passages, record)
            stream.write(dump_line(row | ({weight_field: group.weight} if weighted else {})))
    text = (
        f"# Training groups for a retriever\n\n{len(sizes)} groups of one positive and {most} negatives, selected by "
        "`agentic-r groups` after Agentic-R (arXiv 2601.11888).\n\n"
        f"Queries are formulated as `{record.formulation}`. "
        + use.format(query=record.query_prompt, passage=record.passage_prompt, size=most + 1)
    )
    if weighted:
        weights = f"{weighted} of the groups have a weight other than 1, in the field `{weight_field}`, {read_by}."
        text += f"\n\n{weights}"
        log.warning("to=%s: %s", config.to, weights)
    tags = [config.to.replace("_", "-")]
    with atomic_path(out / CARD) as temporary:
        temporary.write_text(card(out, text, rows=len(sizes), task="text-retrieval", tags=tags), encoding="utf-8")
    return {"groups": len(sizes), "negatives": most, "fewest": min(sizes), "most": max(sizes)} | {
        "formulation": record.formulation, "query_prompt": record.query_prompt, "passage_prompt": record.passage_prompt,
    } | ({"weighted": weighted} if weighted else {})  # fmt: skip


def _retriever_record(config: ConvertGroupsConfig) -> RetrieverRecord:
    """Formulation and prefixes with which `train-retriever` would train the same model."""
    from agentic_r_plugin.retriever.settings import TrainRetrieverConfig
    from agentic_r_plugin.retriever.start import initial_retriever

    names = ("corpus", "out", "retriever", "preset", "formulation", "query_prompt", "passage_prompt")
    given = {name: getattr(config, name) for name in names}
    return initial_retriever(TrainRetrieverConfig(groups=config.in_, device="cpu", **given)).record
