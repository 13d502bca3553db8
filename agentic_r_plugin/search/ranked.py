"""Retrieval metrics over relevance judgements, computed by `ranx` (extra `ranx`)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.field_values import listed
from agentic_r_plugin.records import Question
from agentic_r_plugin.trec import read_grades

METRICS = ("recall@5", "recall@100", "recall@1000", "ndcg@10")
"""The retrieval metrics of BrowseComp-Plus."""

Qrels = dict[str, dict[str, int]]
"""Question id -> document id -> grade; each question has a grade above 0."""

_DEPTH = re.compile(r"@(\d+)")
_NOTHING = {-1: 0}
"""An empty ranking, which ranx cannot represent: one document that is not judged."""


def read_qrels(path: str, questions: Iterable[Question]) -> Qrels:
    """The judgements in a file of qrels on these questions, of those with a relevant document.

    Raises:
        RecordError: as `trec.read_grades`.
    """
    found: Qrels = {question.id: {} for question in questions}
    for question, document, grade in read_grades(path):
        if question in found:
            found[question][document] = max(0, int(grade))
    return {question: grades for question, grades in found.items() if any(grades.values())}


def named_documents(kind: str, questions: Iterable[Question]) -> Qrels:
    """The documents in `metadata.KIND_doc_ids` of the questions that have any, each with grade 1."""
    found = {question.id: dict.fromkeys(listed(question.metadata, f"{kind}_doc_ids"), 1) for question in questions}
    return {question: grades for question, grades in found.items() if grades}


def check_metrics(names: Sequence[str]) -> None:
    """Check before any search that ranx is installed and knows these metrics.

    Raises:
        ConfigError: it is not, or does not.
    """
    for name in names:
        try:
            scores([name], {"q": {"d": 1}}, {"q": ["d"]})
        except ImportError as error:
            raise ConfigError(f'metrics need ranx: pip install "agentic-r-plugin[ranx]" ({error})') from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"metrics: expected metrics of ranx, such as ndcg@10, found {name!r}: {error}") from error


def depth_of(names: Sequence[str]) -> int:
    """Passages per question that these metrics look at; 0 if they name no depth."""
    return max((int(depth) for name in names for depth in _DEPTH.findall(name)), default=0)


def score_table(
    names: Sequence[str], judged: Mapping[str, Qrels], rankings: Mapping[str, Sequence[tuple[str, float]]]
) -> dict[str, list[float | None]]:
    """`QRELS METRIC` -> score of each ranking, in their order; None for a question that these qrels do not judge.

    Args:
        names: metrics as ranx writes them.
        judged: name -> qrels.
        rankings: question id -> (document id, score), best first, each document once.
    """
    table: dict[str, list[float | None]] = {}
    for name, qrels in judged.items():
        part = {key: qrels[key] for key in rankings if key in qrels}
        found = scores(names, part, {key: [document for document, _ in rankings[key]] for key in part})
        for metric in names:
            of_question = dict(zip(part, found[metric], strict=True))
            table[f"{name} {metric}"] = [of_question.get(key) for key in rankings]
    return table


def scores(names: Sequence[str], qrels: Qrels, rankings: Mapping[str, Sequence[str]]) -> dict[str, list[float]]:
    """Each metric of each question, in the order of `qrels`; `rankings` hold document ids, best first, each once."""
    import ranx

    if not qrels:
        return {name: [] for name in names}
    relevant, found = {}, {}
    for question, grades in qrels.items():
        # ranx compares hashes of ids as 64-bit floats, so it gets small numbers, whose hashes are exact. It sorts by
        # score and leaves the order of equal scores open, so it gets ranks.
        number = {document: n for n, document in enumerate(dict.fromkeys([*grades, *rankings[question]]))}
        relevant[question] = {number[document]: grade for document, grade in grades.items()}
        found[question] = {number[document]: -rank for rank, document in enumerate(rankings[question])} or _NOTHING
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numba, about casts within ranx
        # twice, because ranx 0.3.21 loses a single metric with a depth
        table = ranx.evaluate(relevant, found, [*names, *names], return_mean=False)
    return {name: table[name].tolist() for name in names}
