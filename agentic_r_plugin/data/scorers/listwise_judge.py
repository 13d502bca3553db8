"""The paper's relevance scorer: a language model scores all candidates of a query together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from agentic_r_plugin.config import fingerprint
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.data.judge import ask, fill, load_prompt, parse_scores
from agentic_r_plugin.data.scorers.base import Resources, ScoringTask, check_options, reference
from agentic_r_plugin.errors import ConfigError, JudgeError
from agentic_r_plugin.llm.base import ChatBackend
from agentic_r_plugin.records import Passage

WINDOWS = {"paper": 20, "released_code": 10}
"""Passages per prompt, by preset."""


class ListwiseJudge:
    """An LLM scores the candidates of a query together, in five bands of 0..100 (the paper's scorer).

    Args:
        window: passages scored per prompt: 20 in the paper, 10 in the released code.
        max_retries: further attempts after a reply that does not hold exactly the requested scores.
        prompt: custom prompt file; empty uses the package's `prompts/listwise_relevance.txt`.
    """

    name, prompt_name = "listwise_judge", "listwise_relevance"
    known_options: tuple[str, ...] = ("max_retries", "max_tokens", "preset", "prompt", "window")
    needs_questions = False

    @staticmethod
    def passages_per_prompt(options: Mapping[str, Any]) -> int:
        """The window, from `window` or else from `preset`.

        Raises:
            ConfigError: no such preset.
        """
        preset = options.get("preset", "paper")
        if preset not in WINDOWS:
            raise ConfigError(f"listwise_judge: preset={preset!r}: expected one of {', '.join(WINDOWS)}")
        return int(options.get("window", WINDOWS[preset]))

    def __init__(
        self,
        judge: ChatBackend,
        *,
        window: int = 20,
        max_retries: int = 3,
        max_tokens: int = 256,
        prompt: str = "",
        cost: Cost | None = None,
    ) -> None:
        if window < 1 or max_retries < 0 or max_tokens < 1:
            raise ConfigError(
                f"{self.name}: window={window}, max_retries={max_retries}, max_tokens={max_tokens}: expected at least "
                "1, 0 and 1"
            )
        self.judge, self.window, self.max_retries, self.max_tokens = judge, window, max_retries, max_tokens
        self.cost = cost if cost is not None else Cost()
        self.prompt = load_prompt(self.prompt_name, prompt)

    @classmethod
    def build(cls, options: Mapping[str, Any], resources: Resources) -> ListwiseJudge:
        """Build from `preset` (`paper` or `released_code`), `window`, `max_retries`, `max_tokens` and `prompt`.

        Raises:
            ConfigError: an unknown option or preset.
        """
        check_options(cls.name, options, *cls.known_options)
        for name in ("max_retries", "max_tokens", "window"):
            if not isinstance(value := options.get(name, 1), int):
                raise ConfigError(f"{cls.name}: {name}: expected a whole number, found {value!r}")
        window = cls.passages_per_prompt(options)
        given = {key: value for key, value in options.items() if key not in ("preset", "window")}
        return cls(resources.open_judge(), cost=resources.cost, window=window, **given)

    def score(self, tasks: Sequence[ScoringTask]) -> list[dict[str, int] | JudgeError]:
        """Scores of every task; if one window of a query fails, the query gets that window's JudgeError."""
        # The windows of all queries go to the judge in one call, as one large batch.
        windows = [
            (index, task.passages[start : start + self.window])
            for index, task in enumerate(tasks)
            for start in range(0, len(task.passages), self.window)
        ]
        replies = ask(
            self.judge,
            [self.render(tasks[index], passages) for index, passages in windows],
            [partial(self.parse, length=len(passages)) for _, passages in windows],
            max_tokens=self.max_tokens,
            max_retries=self.max_retries,
            cost=self.cost,
        )
        results: list[dict[str, int] | JudgeError] = [{} for _ in tasks]
        for (index, passages), scores in zip(windows, replies, strict=True):
            result = results[index]
            if isinstance(scores, JudgeError):
                results[index] = scores
            # After a failed window, the query keeps that error, and scores of its later windows are not used.
            elif isinstance(result, dict):
                result.update(zip((passage.id for passage in passages), scores, strict=True))
        return results

    def parse(self, reply: str, length: int) -> list[int]:
        """Scores in a reply; raises JudgeError for any other reply."""
        return parse_scores(reply, length)

    def render(self, task: ScoringTask, passages: Sequence[Passage]) -> str:
        """The prompt for one window of a query's passages."""
        return fill(
            self.prompt,
            question=task.query.question,
            query=task.query.query,
            reference=reference(task),
            passages="\n".join(
                f"[{rank}] {passage.title}: {passage.text}" for rank, passage in enumerate(passages, start=1)
            ),
            num_passages=len(passages),
            # For prompts with one passage (the pointwise judge).
            passage=f"{passages[0].title}: {passages[0].text}",
        )

    def fingerprint(self) -> str:
        """Hash of the judge model, the prompt and the options."""
        return fingerprint(self.judge.fingerprint(), self.prompt, self.window, self.max_retries, self.max_tokens)
