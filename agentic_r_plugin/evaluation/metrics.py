"""Metrics of an agent and its searches, as FlashRAG metrics: name them under `metrics:` of a FlashRAG configuration.

FlashRAG finds a metric through the subclasses of its `BaseMetric`, so this module must be imported before an
`Evaluator` is built (`evaluation.pipeline` does). A question for which a metric says nothing (no gold documents in its
metadata, no gold answers, a yes/no answer) scores None and does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flashrag.evaluator.metrics import BaseMetric

from agentic_r_plugin.answers import contains_answer, exact_match, f1, is_closed, sub_exact_match
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.evaluation.settings import read_settings
from agentic_r_plugin.forms import golden_answers, listed
from agentic_r_plugin.records import StopReason

SHOWN_TOPK = 3
"""The paper's agents are shown three passages a search; the recalls at 3 count no more of what was shown."""

DEPTH = 20
"""Passages of a search that the recalls at 20 count."""

_LAST_TURNS = frozenset({StopReason.ANSWERED.value, StopReason.MAX_TURNS.value, StopReason.SEARCH_FAILED.value})
"""Ends by a turn that is neither malformed nor a search that was carried out: an answer, or a search that was not."""

Scores = tuple[dict[str, float | None], list[float | None]]
"""What FlashRAG wants of a metric: means by name, and one score a question."""


def mean(scores: Iterable[float | None]) -> float | None:
    """Mean of the scores that are there; None when there is none.

    >>> mean([1.0, None, 0.0])
    0.5
    """
    present = [score for score in scores if score is not None]
    return sum(present) / len(present) if present else None


def prediction(item: Any) -> str | None:
    """The agent's answer; None where it gave none (`pred` is then an empty string, for FlashRAG's own metrics)."""
    return item.output["answer"] if "answer" in item.output else item.output.get("pred")


def gold_of(item: Any) -> list[str]:
    """Gold answers of a FlashRAG item, whichever reader it comes from.

    Raises:
        RecordError: they are no texts.
    """
    return golden_answers({"golden_answers": item.golden_answers, "choices": item.choices})


def trajectory(item: Any) -> dict[str, Any]:
    """The item's trajectory record.

    Raises:
        ConfigError: the item was not answered by `AgenticSearchPipeline`.
    """
    if "trajectory" not in item.output:
        raise ConfigError(f"question {item.id!r} has no trajectory; this metric needs AgenticSearchPipeline's output")
    return item.output["trajectory"]


class QuestionMetric(BaseMetric):
    """A metric that is the mean of one score per question."""

    metric_name = "agentic_base"

    def score(self, item: Any, golden_answers: Sequence[str]) -> float | None:
        """Score of one question; None where the metric says nothing about it."""
        raise NotImplementedError

    def get_dataset_answer(self, data: Any) -> list[list[str]]:
        """Gold answers of each question, none for an unlabelled one."""
        return [gold_of(item) for item in data]

    def calculate_metric(self, data: Any) -> Scores:
        """FlashRAG's interface: `({name: mean}, one score per question)`."""
        scores = [self.score(item, gold) for item, gold in zip(data, self.get_dataset_answer(data), strict=True)]
        return {self.metric_name: mean(scores)}, scores


class AgenticExactMatch(QuestionMetric):
    """Exact match; FlashRAG's `em`, but a missing or empty answer never matches (`agentic_r_plugin.answers`).

    FlashRAG takes the gold answers of its data set `curatedtrec` as regular expressions; here they are words.
    """

    metric_name = "agentic_em"

    def score(self, item: Any, golden_answers: Sequence[str]) -> float | None:
        return float(exact_match(prediction(item), golden_answers)) if golden_answers else None


class AgenticSubExactMatch(QuestionMetric):
    """Whether the answer holds a gold answer; FlashRAG's `acc`, but a missing or empty answer never matches."""

    metric_name = "agentic_sub_em"

    def score(self, item: Any, golden_answers: Sequence[str]) -> float | None:
        return float(sub_exact_match(prediction(item), golden_answers)) if golden_answers else None


class AgenticF1(QuestionMetric):
    """Token F1; FlashRAG's `f1`, but a missing answer scores 0, and characters of scripts without spaces are tokens."""

    metric_name = "agentic_f1"

    def score(self, item: Any, golden_answers: Sequence[str]) -> float | None:
        return f1(prediction(item), golden_answers) if golden_answers else None


class SearchTurns(QuestionMetric):
    """Searches per question."""

    metric_name = "search_turns"

    def score(self, item: Any, golden_answers: Sequence[str]) -> float:
        return float(len(trajectory(item)["turns"]))


class AnswerRecall(QuestionMetric):
    """Share of questions with a gold answer in the first three passages shown for any search; also per search.

    Questions whose answer is found everywhere do not count (`answers.is_closed`: yes, no, an article, none at all).
    """

    metric_name = "answer_recall_at_3"

    def _ranks(self, item: Any, golden_answers: Sequence[str]) -> list[int | None]:
        """For each search, the first rank (from 1) with a gold answer among the passages shown."""
        return answer_ranks(
            [row["docs"][:SHOWN_TOPK] for row in item.output["retrieval_results"].values()], golden_answers
        )

    def score(self, item: Any, golden_answers: Sequence[str]) -> float | None:
        trajectory(item)
        if is_closed(golden_answers):
            return None
        return float(any(rank is not None for rank in self._ranks(item, golden_answers)))

    def calculate_metric(self, data: Any) -> Scores:
        result, scores = super().calculate_metric(data)
        per_turn = [
            float(rank is not None)
            for item, gold in zip(data, self.get_dataset_answer(data), strict=True)
            if not is_closed(gold)
            for rank in self._ranks(item, gold)
        ]
        return result | {f"{self.metric_name}_per_turn": mean(per_turn)}, scores


class AnswerRecallAtDepth(AnswerRecall):
    """The same among the first 20 passages that the retriever finds for the agent's queries.

    None where the settings' `depth` is below 20: nobody looked so far.
    """

    metric_name = "answer_recall_at_20"

    def _ranks(self, item: Any, golden_answers: Sequence[str]) -> list[int | None]:
        ranks = [row["answer_rank"] for row in item.output["retrieved"]]
        return [rank if rank is not None and rank <= DEPTH else None for rank in ranks]

    def calculate_metric(self, data: Any) -> Scores:
        return _where_looked(self.config, super().calculate_metric(data))


def _where_looked(config: Any, found: Scores) -> Scores:
    """`found`, or None throughout where the settings' `depth` does not reach down to 20."""
    means, scores = found
    return found if read_settings(config).depth >= DEPTH else (dict.fromkeys(means), [None] * len(scores))


def answer_ranks(rows: Iterable[Sequence[dict[str, str]]], golden_answers: Sequence[str]) -> list[int | None]:
    """For each list of FlashRAG docs, the first rank (from 1) of one that holds a gold answer."""
    return [
        next((rank for rank, doc in enumerate(docs, start=1) if contains_answer(doc["contents"], golden_answers)), None)
        for docs in rows
    ]


class GoldDocumentRecall(QuestionMetric):
    """Share of a question's gold documents (`metadata.gold_doc_ids`) in the first three passages shown for any search.

    Multi-hop questions have several; `gold_documents_complete` is the share of questions with all of them there.
    """

    metric_name = "gold_document_recall"
    complete_name = "gold_documents_complete"

    def _found(self, item: Any) -> set[str]:
        return {passage["id"] for turn in trajectory(item)["turns"] for passage in turn["passages"][:SHOWN_TOPK]}

    def score(self, item: Any, golden_answers: Sequence[str]) -> float | None:
        gold = set(listed(item.metadata, "gold_doc_ids"))
        return len(gold & self._found(item)) / len(gold) if gold else None

    def calculate_metric(self, data: Any) -> Scores:
        result, scores = super().calculate_metric(data)
        return result | {self.complete_name: mean(None if s is None else float(s == 1.0) for s in scores)}, scores


class GoldDocumentRecallAtDepth(GoldDocumentRecall):
    """The same among the first 20 passages that the retriever finds for the agent's queries; None as above."""

    metric_name = "gold_document_recall_at_20"
    complete_name = "gold_documents_complete_at_20"

    def _found(self, item: Any) -> set[str]:
        return {name for row in item.output["retrieved"] for name in row["ids"][:DEPTH]}

    def calculate_metric(self, data: Any) -> Scores:
        return _where_looked(self.config, super().calculate_metric(data))


class MalformedShare(QuestionMetric):
    """Share of the agent's turns that were neither a search nor an answer, over all questions together.

    A last turn that asks for one search more than the limit allows, or for one that fails, counts as well-formed.
    """

    metric_name = "malformed_share"

    @staticmethod
    def _counts(item: Any) -> tuple[int, int]:
        """(malformed turns, all turns of the model)."""
        record = trajectory(item)
        malformed = record["malformed_turns"]
        return malformed, malformed + len(record["turns"]) + int(record["stop_reason"] in _LAST_TURNS)

    def score(self, item: Any, golden_answers: Sequence[str]) -> float:
        malformed, turns = self._counts(item)
        return malformed / max(turns, 1)

    def calculate_metric(self, data: Any) -> Scores:
        _, scores = super().calculate_metric(data)
        counts = [self._counts(item) for item in data]
        turns = sum(all_turns for _, all_turns in counts)
        return {self.metric_name: sum(bad for bad, _ in counts) / max(turns, 1)}, scores


class GeneratedTokens(QuestionMetric):
    """Tokens the agent wrote per question."""

    metric_name = "generated_tokens"

    def score(self, item: Any, golden_answers: Sequence[str]) -> float:
        return float(trajectory(item)["generated_tokens"])


METRICS: tuple[type[QuestionMetric], ...] = (
    AgenticExactMatch,
    AgenticF1,
    AgenticSubExactMatch,
    SearchTurns,
    AnswerRecall,
    AnswerRecallAtDepth,
    GoldDocumentRecall,
    GoldDocumentRecallAtDepth,
    MalformedShare,
    GeneratedTokens,
)
METRIC_NAMES: tuple[str, ...] = tuple(metric.metric_name for metric in METRICS)


def recall_by_turn(items: Iterable[Any]) -> list[dict[str, float | int | None]]:
    """What the n-th search of a question shows, over the questions that make one.

    Args:
        items: answered by `AgenticSearchPipeline`.

    Returns:
        For each turn, counted from 1: `num_questions` that searched so often, `answer_recall` and
        `gold_document_recall` of that search alone, and `answer_recall_so_far`, over all questions, of it and the
        searches before it. None where no question says anything; yes/no questions say nothing of answers.
    """
    rows: list[tuple[list[bool] | None, list[float | None]]] = []
    for item in items:
        turns = trajectory(item)["turns"]
        gold = set(listed(item.metadata, "gold_doc_ids"))
        shown = [{passage["id"] for passage in turn["passages"]} for turn in turns]
        docs = [row["docs"] for row in item.output["retrieval_results"].values()]
        golden = gold_of(item)
        found = [rank is not None for rank in answer_ranks(docs, golden)]
        closed = is_closed(golden)
        rows.append((None if closed else found, [len(gold & ids) / len(gold) if gold else None for ids in shown]))
    table: list[dict[str, float | int | None]] = []
    for turn in range(max((len(documents) for _, documents in rows), default=0)):
        made = [(answers, documents) for answers, documents in rows if len(documents) > turn]
        table.append(
            {
                "turn": turn + 1,
                "num_questions": len(made),
                "answer_recall": mean(None if answers is None else float(answers[turn]) for answers, _ in made),
                "gold_document_recall": mean(documents[turn] for _, documents in made),
                "answer_recall_so_far": mean(
                    None if answers is None else float(any(answers[: turn + 1])) for answers, _ in rows
                ),
            }
        )
    return table
