"""Rewards: what a finished trajectory is worth. Components of kind `reward`.

A reward is a function of the outcome and its options, which are keyword arguments. The reward of a trajectory is the
weighted sum of those that `train_agent.reward` names; each is recorded as a part, before its weight. Without the
setting it is exact match alone (method section 6). The agent loop computes it; `verl_reward` passes it to verl.
"""

from __future__ import annotations

import atexit
import inspect
import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

from agentic_r_plugin import components
from agentic_r_plugin.answers import contains_answer, exact_match, f1
from agentic_r_plugin.backends import LLMSpec, open_llm
from agentic_r_plugin.config import load_config
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.data.judge import ask, fill, load_prompt, parse_score
from agentic_r_plugin.errors import ConfigError, JudgeError, TrainingError
from agentic_r_plugin.records import StopReason


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished trajectory whose searches all succeeded."""

    question: str
    golden_answers: tuple[str, ...]
    answer: str | None
    """From the model's own tokens; None if it gave none."""
    stop_reason: StopReason
    shown: tuple[str, ...]
    """Title and text of the passages and documents that the agent read, in order and as they were cut. What else the
    environment writes is left out, because error messages repeat the agent's words."""
    searches: int
    turns: int
    """Turns of the model; one may hold several searches, or open documents."""
    malformed_turns: int


Value = float | Mapping[str, float]
"""A reward's value, or a mapping with `value` and further numbers to record (`NAME_KEY`)."""

Reward = Callable[..., Value]


class RewardSum:
    """Weighted sum of rewards.

    Args:
        weights: name of a registered `reward` -> its weight; empty: exact match alone, whose part is not recorded.
        options: name -> keyword arguments of that reward.

    Raises:
        UnknownComponentError: a name is not registered.
        ConfigError: an option that the reward does not have, or options of a reward without a weight.
    """

    def __init__(self, weights: Mapping[str, float], options: Mapping[str, Mapping[str, Any]]) -> None:
        if unused := sorted(set(options) - set(weights)):
            raise ConfigError(
                f"reward_options: {unused[0]!r} has no weight in reward ({', '.join(weights) or 'empty'})"
            )
        self.weights, self.options = dict(weights) or {"exact_match": 1.0}, dict(options)
        self.with_parts = bool(weights)
        self.rewards: dict[str, Reward] = {name: components.load("reward", name) for name in self.weights}
        for name, reward in self.rewards.items():
            try:
                inspect.signature(reward).bind(None, **options.get(name, {}))
            except TypeError as error:
                raise ConfigError(f"reward_options.{name}: {error}; {name}{inspect.signature(reward)}") from None

    def parts(self, outcome: Outcome) -> dict[str, float]:
        """Value of each reward, before its weight, with the further numbers that it records.

        Raises:
            TrainingError: a reward is not a finite number; training on it would destroy the agent's weights.
        """
        found: dict[str, float] = {}
        for name, reward in self.rewards.items():
            value = reward(outcome, **self.options.get(name, {}))
            numbers = value if isinstance(value, Mapping) else {"value": value}
            if not math.isfinite(numbers.get("value", math.nan)):
                raise TrainingError(f"reward {name!r}: expected a finite number, found {value!r} for {outcome}")
            found |= {name if key == "value" else f"{name}_{key}": float(number) for key, number in numbers.items()}
        return found

    def total(self, parts: Mapping[str, float]) -> float:
        """Weighted sum of the parts."""
        return sum(weight * parts[name] for name, weight in self.weights.items())


def exact_match_reward(outcome: Outcome) -> float:
    """1 if the answer matches a gold answer exactly (the paper's reward, and the default)."""
    return float(exact_match(outcome.answer, outcome.golden_answers))


def f1_reward(outcome: Outcome) -> float:
    """F1 of the words of answer and gold answer."""
    return f1(outcome.answer, outcome.golden_answers)


def format_reward(outcome: Outcome) -> float:
    """Share of the model's turns that are not malformed: they hold a call (search, open) or an answer."""
    return 1 - outcome.malformed_turns / max(1, outcome.turns)


def retrieval_credit(outcome: Outcome) -> float:
    """1 if a passage that was shown contains a gold answer."""
    return float(any(contains_answer(text, outcome.golden_answers) for text in outcome.shown))


def search_penalty(outcome: Outcome, *, free: int = 0, none: float = 0.0) -> float:
    """Minus the number of searches above `free`, or minus `none` if there was no search."""
    return -none if not outcome.searches else -float(max(0, outcome.searches - free))


def judge(
    outcome: Outcome, *, llm: Mapping[str, Any], prompt: str = "", max_tokens: int = 16, max_retries: int = 2
) -> Value:
    """Correctness of the answer by a judge, from 0 to 1; exact match if its reply cannot be parsed (`failed`).

    Args:
        llm: the judge (`backends.LLMSpec`).
        prompt: a prompt file in place of `answer_judge.txt`.
        max_tokens: maximum length of a reply.
        max_retries: retries after a reply that is not a number from 0 to 100.

    Raises:
        BackendError: the judge's server failed after all retries.
    """
    if outcome.answer is None:
        return 0.0
    text = fill(
        load_prompt("answer_judge", prompt),
        question=outcome.question,
        golden_answers="; ".join(outcome.golden_answers),
        answer=outcome.answer,
    )
    # As text, because the cache needs a hashable key; rewards with equal settings share one judge.
    backend, lock = _opened(json.dumps(dict(llm), sort_keys=True, default=dict))
    with lock:
        cost = Cost()
        (score,) = ask(backend, [text], [parse_score], max_tokens=max_tokens, max_retries=max_retries, cost=cost)
    if isinstance(score, JudgeError):
        return {"value": exact_match_reward(outcome), "failed": 1.0}
    return {"value": score / 100, "failed": 0.0}


_OPEN = ExitStack()
"""The open judges; they are closed when the process exits."""
atexit.register(_OPEN.close)


@cache
def _opened(spec: str) -> tuple[Any, AbstractContextManager[Any]]:
    """The judge and its lock. A server needs no lock: it accepts requests from many threads."""
    settings = load_config(LLMSpec, values=json.loads(spec))
    return _OPEN.enter_context(open_llm(settings)), nullcontext() if settings.backend == "openai" else Lock()
