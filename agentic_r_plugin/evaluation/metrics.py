"""FlashRAG metrics of an agent and its searches. Use them by name under `metrics:` of a FlashRAG configuration.

FlashRAG finds metrics through the subclasses of its `BaseMetric`, so this module must be imported before an `Evaluator`
is built (`evaluation.pipeline` does so). A question to which a metric does not apply (no gold documents, no gold
answers, a yes/no answer) scores None and is left out of the mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flashrag.evaluator.metrics import BaseMetric

from agentic_r_plugin.answers import contains_answer, exact_match, f1, is_closed, sub_exact_match
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.evaluation.settings import read_settings
from agentic_r_plugin.field_values import listed
from agentic_r_plugin.forms import golden_answers
from agentic_r_plugin.records import StopReason

SHOWN_TOPK = 3
"""Passages per search that the recalls at 3 count. The paper's agents are shown three."""

DEPTH = 20
"""Passages per search that the recalls at 20 count."""

_LAST_TURNS = frozenset({StopReason.ANSWERED.value, StopReason.MAX_TURNS.value, StopReason.SEARCH_FAILED.value})
"""Stop reasons whose last turn is neither malformed nor a completed search: an answer, or a search without result."""

Scores = tuple[dict[str, float | None], list[float | None]]
"""Return type of a FlashRAG metric: means by name, and one score per question."""


def mean(scores: Iterable[float | None]) -> float | None:
    """Mean of the scores that are not None; None if there are none.

    >>> mean([1.0, None, 0.0])
    0.5
    """
    present = [score for score in scores if score is not None]
    return sum(present) / len(present) if present else None


def prediction(item: Any) -> str | None:
    """The agent's answer, or None. (`pred` is an empty string instead of None, for FlashRAG's own metrics.)"""
    return item.output["answer"] if "answer" in item.output else item.output.get("pred")


def gold_of(item: Any) -> list[str]:
    """Gold answers of a FlashRAG item, read by FlashRAG or by this package.

    Raises:
        RecordError: they are not texts.
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
        """Score of one question; None if the metric does not apply to it."""
        raise NotImplementedError

    def get_dataset_answer(self, data: Any) -> list[list[str]]:
        """Gold answers of each question; an empty list for an unlabelled one."""
        return [gold_of(item) for item in data]

    def calculate_metric(self, data: Any) -> Scores:
        """FlashRAG's interface: `({name: mean}, one score per question)`."""
        scores = [self.score(item, gold) for item, gold in zip(data, self.get_dataset_answer(data), strict=True)]
        return {self.metric_name: mean(scores)}, scores


class AgenticExactMatch(QuestionMetric):
    """Exact match: FlashRAG's `em`, except that a missing or empty answer never matches (`agentic_r_plugin.answers`).

    Gold answers are always plain text. FlashRAG reads those of its data set `curatedtrec` as regular expressions.
    """

    metric_name = "agentic_em"

    def score(self, item: Any, golden_answers: Sequence[str]) -> float | None:
        return float(exact_match(prediction(item), golden_answers)) if golden_answers else None


class AgenticSubExactMatch(QuestionMetric):
    """Whether the answer contains a gold answer: FlashRAG's `acc`, except that an empty answer never matches."""

    metric_name = "agentic_sub_em"

    def score(self, item: Any, golden_answers: Sequence[str]) -> float | None:
        return float(sub_exact_match(prediction(item), golden_answers)) if golden_answers else None


class AgenticF1(QuestionMetric):
    """Token F1: FlashRAG's `f1`, except that a missing answer scores 0 and scripts without spaces count characters."""

    metric_name = "agentic_f1"

    def score(self, item: Any, golden_answers: Sequence[str]) -> float | None:
        return f1(prediction(item), golden_answers) if golden_answers else None


class SearchTurns(QuestionMetric):
    """Number of searches per question."""

    metric_name = "search_turns"

    def score(self, item: Any, golden_answers: Sequence[str]) -> float:
        return float(len(trajectory(item)["turns"]))


class AnswerRecall(QuestionMetric):
    """Share of questions with a gold answer among the first three passages found by any search; also per search.

    The passages count as a whole, even if the protocol or the limits cut what the agent read of them. Questions whose
    answer occurs everywhere are left out (`answers.is_closed`: yes, no, an article, no answer).
    """

    metric_name = "answer_recall_at_3"

    def _ranks(self, item: Any, golden_answers: Sequence[str]) -> list[int | None]:
        """For each search, the first rank (from 1) with a gold answer among the passages shown."""
        return answer_ranks(
            [row["docs"][:SHOWN_TOPK] for row in item.output["retrieval_results"].values()], golden_answers
        )

    def score(self, item: Any, golden_answers: Sequence[str]) -> float | None:
        # Only refuses items that another pipeline answered.
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
    """Answer recall among the first 20 passages that the retriever finds for the agent's queries.

    None if the setting `depth` is below 20, because the searches were not that deep.
    """

    metric_name = "answer_recall_at_20"

    def _ranks(self, item: Any, golden_answers: Sequence[str]) -> list[int | None]:
        ranks = [row["answer_rank"] for row in item.output["retrieved"]]
        return [rank if rank is not None and rank <= DEPTH else None for rank in ranks]

    def calculate_metric(self, data: Any) -> Scores:
        return _where_looked(self.config, super().calculate_metric(data))


def _where_looked(config: Any, found: Scores) -> Scores:
    """`found`, with every value None if the setting `depth` is below 20."""
    means, scores = found
    return found if read_settings(config).depth >= DEPTH else (dict.fromkeys(means), [None] * len(scores))


def answer_ranks(rows: Iterable[Sequence[dict[str, str]]], golden_answers: Sequence[str]) -> list[int | None]:
    """For each list of FlashRAG docs, the first rank (from 1) with a gold answer; None if there is none."""
    return [
        next((rank for rank, doc in enumerate(docs, start=1) if contains_answer(doc["contents"], golden_answers)), None)
        for docs in rows
    ]


class GoldDocumentRecall(QuestionMetric):
    """Share of a question's gold documents (`metadata.gold_doc_ids`) in the first three passages shown for any search.

    Multi-hop questions have several. `gold_documents_complete` is the share of questions with all of them found.
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
    """Gold document recall among the first 20 passages that the retriever finds; None if `depth` is below 20."""

    metric_name = "gold_document_recall_at_20"
    complete_name = "gold_documents_complete_at_20"

    def _found(self, item: Any) -> set[str]:
        return {name for row in item.output["retrieved"] for name in row["ids"][:DEPTH]}

    def calculate_metric(self, data: Any) -> Scores:
        return _where_looked(self.config, super().calculate_metric(data))


class MalformedShare(QuestionMetric):
    """Share of turns that were neither a search nor an answer, over the turns of all questions.

    A last turn with a search beyond the limit, or with a search that failed, counts as well-formed.
    """

    metric_name = "malformed_share"

    @staticmethod
    def _counts(item: Any) -> tuple[int, int]:
        """(malformed turns, all turns of the agent)."""
        record = trajectory(item)
        malformed = record["malformed_turns"]
        if runs := record.get("runs"):  # a turn may hold several calls; the runs alternate, the first is the agent's
            return malformed, (len(runs) + 1) // 2
        return malformed, malformed + len(record["turns"]) + int(record["stop_reason"] in _LAST_TURNS)

    def score(self, item: Any, golden_answers: Sequence[str]) -> float:
        malformed, turns = self._counts(item)
        return malformed / max(turns, 1)

    def calculate_metric(self, data: Any) -> Scores:
        _, scores = super().calculate_metric(data)
        # A ratio of sums: in a mean of shares, a turn of a short trajectory would have more weight.
        counts = [self._counts(item) for item in data]
        turns = sum(all_turns for _, all_turns in counts)
        return {self.metric_name: sum(bad for bad, _ in counts) / max(turns, 1)}, scores


class GeneratedTokens(QuestionMetric):
    """Number of tokens that the agent generated per question."""

    metric_name = "generated_tokens"

    def score(self, item: Any, golden_answers: Sequence[str]) -> float:
        return float(trajectory(item)["generated_tokens"])


class AgenticJudge(QuestionMetric):
    """Whether a model finds the answer correct (`evaluate`'s setting `judge`); None if its judgement failed."""

    metric_name = "agentic_judge"

    def score(self, item: Any, golden_answers: Sequence[str]) -> float | None:
        if "judgement" not in item.output:
            raise ConfigError(f"question {item.id!r} has no judgement; set judge.llm of agentic-r evaluate")
        correct = item.output["judgement"]["correct"]
        return None if correct is None else float(correct)


def recall_by_turn(items: Iterable[Any]) -> list[dict[str, float | int | None]]:
    """Recall of the n-th search, over the questions with at least n searches.

    Args:
        items: FlashRAG items answered by `AgenticSearchPipeline`.

    Returns:
        For each turn, counted from 1: `num_questions` with that many searches, `answer_recall` and
        `gold_document_recall` of that search alone, and `answer_recall_so_far` of all searches up to it, over all
        questions. None if the metric applies to no question; answer recall does not apply to yes/no questions.
    """
    rows: list[tuple[list[float] | None, list[float | None]]] = []
    for item in items:
        gold, golden = set(listed(item.metadata, "gold_doc_ids")), gold_of(item)
        shown = [{passage["id"] for passage in turn["passages"]} for turn in trajectory(item)["turns"]]
        ranks = answer_ranks((row["docs"] for row in item.output["retrieval_results"].values()), golden)
        answers = None if is_closed(golden) else [float(rank is not None) for rank in ranks]
        rows.append((answers, [len(gold & ids) / len(gold) if gold else None for ids in shown]))
    table: list[dict[str, float | int | None]] = []
    for turn in range(max((len(documents) for _, documents in rows), default=0)):
        made = [row for row in rows if len(row[1]) > turn]
        table.append(
            {
                "turn": turn + 1,
                "num_questions": len(made),
                "answer_recall": mean(None if a is None else a[turn] for a, _ in made),
                "gold_document_recall": mean(documents[turn] for _, documents in made),
                # Questions with fewer searches keep what these have found.
                "answer_recall_so_far": mean(None if a is None else max(a[: turn + 1], default=0.0) for a, _ in rows),
            }
        )
    return table
