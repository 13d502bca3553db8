"""A language model as judge of answers: the metric `agentic_judge` of `evaluate`, next to exact match.

Each answer is judged once, after all questions are answered; a judgement is stored with its question at once, so that a
resume asks for the missing ones only. A question whose judgement failed has no score and is counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from agentic_r_plugin.cost import Cost
from agentic_r_plugin.data.judge import ask, fill, load_prompt, parse_verdict
from agentic_r_plugin.errors import JudgeError
from agentic_r_plugin.evaluation.metrics import gold_of, prediction
from agentic_r_plugin.evaluation.settings import AnswerJudgeSettings
from agentic_r_plugin.llm.base import ChatBackend
from agentic_r_plugin.progress import progress
from agentic_r_plugin.records import Judgement


class AnswerJudge:
    """Judges the answers of FlashRAG items; the judgement is the item's output `judgement`.

    An unanswered question is wrong, and one without gold answers has no judgement; the model is asked about neither.

    Args:
        backend: the model.
        settings: prompt, retries and limits.
    """

    def __init__(self, backend: ChatBackend, settings: AnswerJudgeSettings) -> None:
        self.backend, self.settings = backend, settings
        self.prompt = load_prompt("answer_correct", settings.prompt)

    def judge(self, dataset: Any, cost: Cost, batch_size: int, on_batch: Callable[[Sequence[Any]], None]) -> Any:
        """Judge the items that have no judgement yet, or a failed one; returns the data set.

        Args:
            dataset: answered items.
            cost: updated in place.
            batch_size: answers judged at once.
            on_batch: called with the items of each judged batch.

        Raises:
            JudgeError: more than `max_error_share` of the judgements failed; a resume asks for them again.
            BackendError: the judge's backend failed; batches passed to `on_batch` are complete.
        """
        # A missing judgement counts as failed: the error "" in its place is not None.
        waiting = [item for item in dataset if item.output.get("judgement", {"error": ""})["error"] is not None]
        with progress(total=len(dataset), initial=len(dataset) - len(waiting), desc="judge", unit="answer") as shown:
            for start in range(0, len(waiting), batch_size):
                batch = waiting[start : start + batch_size]
                self._judge(batch, cost)
                on_batch(batch)
                shown.update(len(batch))
        failed = [item.output["judgement"] for item in dataset if item.output["judgement"]["error"] is not None]
        if len(failed) > self.settings.max_error_share * len(dataset):
            raise JudgeError(
                f"{len(failed)} of {len(dataset)} judgements failed, more than judge.max_error_share="
                f"{self.settings.max_error_share:g}; first, {failed[0]['id']}: {failed[0]['error']}. Correct the "
                "judge's settings and resume: only these answers are judged again"
            )
        return dataset

    def _judge(self, items: Sequence[Any], cost: Cost) -> None:
        asked = [item for item in items if gold_of(item) and (prediction(item) or "").strip()]
        prompts = [
            fill(self.prompt, question=item.question, golden_answers="; ".join(gold_of(item)), answer=prediction(item))
            for item in asked
        ]
        limits = {"max_tokens": self.settings.max_tokens, "max_retries": self.settings.max_retries}
        found = ask(self.backend, prompts, [parse_verdict] * len(prompts), **limits, cost=cost) if asked else []
        verdicts = {str(item.id): verdict for item, verdict in zip(asked, found, strict=True)}
        for item in items:
            given: dict[str, Any] = {"correct": False if gold_of(item) else None}
            verdict = verdicts.get(str(item.id))
            if isinstance(verdict, JudgeError):
                given = {"correct": None, "error": str(verdict)}
            elif verdict is not None:
                given = {"correct": verdict[0], "reason": verdict[1]}
            item.update_output("judgement", Judgement(id=str(item.id), answer=prediction(item), **given).to_dict())

    @staticmethod
    def judgements(dataset: Any) -> list[Judgement]:
        """The judgement of each item."""
        return [Judgement.from_dict(item.output["judgement"]) for item in dataset]

    def report(self, dataset: Any) -> dict[str, Any]:
        """Entries of a cell's result about the judge."""
        failed = [item.error for item in self.judgements(dataset) if item.error is not None]
        counts = {"failed": len(failed), "first_error": failed[0] if failed else None}
        return {"judge": counts, "judge_fingerprint": self.backend.fingerprint()}
