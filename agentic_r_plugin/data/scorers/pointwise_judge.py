"""Relevance by a language model that scores one passage at a time: costlier than the listwise judge, no comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentic_r_plugin.config import fingerprint
from agentic_r_plugin.data.judge import parse_score
from agentic_r_plugin.data.scorers.listwise_judge import ListwiseJudge
from agentic_r_plugin.llm.base import ChatBackend


class PointwiseJudge(ListwiseJudge):
    """An LLM scores each candidate by itself, in five bands of 0..100; arguments as in `ListwiseJudge`.

    If one passage of a query fails, the query gets that passage's JudgeError.
    """

    name, prompt_name = "pointwise_judge", "pointwise_relevance"
    known_options = ("max_retries", "max_tokens", "prompt")

    @staticmethod
    def passages_per_prompt(options: Mapping[str, Any]) -> int:
        """One."""
        return 1

    def __init__(self, judge: ChatBackend, *, max_tokens: int = 16, **options: Any) -> None:
        super().__init__(judge, max_tokens=max_tokens, **options | {"window": 1})

    def parse(self, reply: str, length: int) -> list[int]:
        """The one score of a reply."""
        return [parse_score(reply)]

    def fingerprint(self) -> str:
        """Hash of the judge model, the prompt and the options."""
        return fingerprint(self.judge.fingerprint(), self.prompt, self.max_retries, self.max_tokens)
