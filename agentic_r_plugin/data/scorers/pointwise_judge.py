"""Relevance by a language model that scores one passage at a time: costlier than the listwise judge, no comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentic_r_plugin.config import fingerprint
from agentic_r_plugin.data.judge import ask, fill, load_prompt, parse_score
from agentic_r_plugin.data.scorers.base import Resources, ScoringTask, check_options, reference
from agentic_r_plugin.errors import ConfigError, JudgeError
from agentic_r_plugin.llm.base import ChatBackend
from agentic_r_plugin.records import Passage
from agentic_r_plugin.rollout import RolloutCost


class PointwiseJudge:
    """An LLM scores each candidate by itself, in five bands of 0..100.

    Args:
        judge: the model.
        max_retries: further attempts after a reply that is not one score.
        max_tokens: maximum length of a reply.
        prompt: custom prompt file; empty uses the package's `prompts/pointwise_relevance.txt`.
        cost: updated in place.
    """

    needs_questions = False

    @staticmethod
    def passages_per_prompt(options: Mapping[str, Any]) -> int:
        """One."""
        return 1

    def __init__(
        self,
        judge: ChatBackend,
        *,
        max_retries: int = 3,
        max_tokens: int = 16,
        prompt: str = "",
        cost: RolloutCost | None = None,
    ) -> None:
        if max_retries < 0 or max_tokens < 1:
            raise ConfigError(f"pointwise_judge: max_retries={max_retries}, max_tokens={max_tokens}: expected 0 and 1")
        self.judge, self.max_retries, self.max_tokens = judge, max_retries, max_tokens
        self.cost = cost if cost is not None else RolloutCost()
        self.prompt = load_prompt("pointwise_relevance", prompt)

    @classmethod
    def build(cls, options: Mapping[str, Any], resources: Resources) -> PointwiseJudge:
        """Build from `max_retries`, `max_tokens` and `prompt`.

        Raises:
            ConfigError: an unknown option.
        """
        check_options("pointwise_judge", options, "max_retries", "max_tokens", "prompt")
        return cls(resources.open_judge(), cost=resources.cost, **options)

    def score(self, tasks: Sequence[ScoringTask]) -> list[dict[str, int] | JudgeError]:
        """Scores of every task; if one passage of a query fails, the query gets that passage's JudgeError."""
        pairs = [(index, passage) for index, task in enumerate(tasks) for passage in task.passages]
        replies = ask(
            self.judge,
            [self.render(tasks[index], passage) for index, passage in pairs],
            [parse_score] * len(pairs),
            max_tokens=self.max_tokens,
            max_retries=self.max_retries,
            cost=self.cost,
        )
        results: list[dict[str, int] | JudgeError] = [{} for _ in tasks]
        for (index, passage), score in zip(pairs, replies, strict=True):
            result = results[index]
            if isinstance(score, JudgeError):
                results[index] = score
            elif isinstance(result, dict):
                result[passage.id] = score
        return results

    def render(self, task: ScoringTask, passage: Passage) -> str:
        """The prompt for one passage."""
        return fill(
            self.prompt,
            question=task.query.question,
            query=task.query.query,
            reference=reference(task),
            passage=f"{passage.title}: {passage.text}",
        )

    def fingerprint(self) -> str:
        """Hash of the judge model, the prompt and the options."""
        return fingerprint(self.judge.fingerprint(), self.prompt, self.max_retries, self.max_tokens)
