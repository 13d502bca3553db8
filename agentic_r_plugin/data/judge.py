"""Asks a judge model and takes only replies that hold exactly what was asked for (method section 4, steps 3 and 4)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any, TypeVar

from agentic_r_plugin.errors import JudgeError
from agentic_r_plugin.llm.base import ChatBackend
from agentic_r_plugin.rollout import RolloutCost

Parsed = TypeVar("Parsed")

_RETRY_TEMPERATURE = 0.7
"""The first attempt is greedy; asking again greedily would give the same reply."""


def load_prompt(name: str) -> str:
    """A prompt file of this package, `prompts/NAME.txt`."""
    return (files("agentic_r_plugin.data") / "prompts" / f"{name}.txt").read_text(encoding="utf-8")


def fill(prompt: str, **values: object) -> str:
    """Put values in place of `{name}`; braces inside a value stay as they are.

    >>> fill("{a} and {b}", a="{b}", b=1)
    '{b} and 1'
    """
    parts = prompt.split("{")
    filled = parts[0]
    for part in parts[1:]:
        name, brace, rest = part.partition("}")
        filled += f"{values[name]}{rest}" if brace and name in values else "{" + part
    return filled


def ask(
    judge: ChatBackend,
    prompts: Sequence[str],
    parsers: Sequence[Callable[[str], Parsed]],
    *,
    max_tokens: int,
    max_retries: int,
    cost: RolloutCost,
) -> list[Parsed | JudgeError]:
    """Send every prompt and parse its reply; replies that cannot be parsed are asked for again.

    Args:
        judge: the model.
        prompts: messages.
        parsers: one a prompt; raises JudgeError on a reply that does not hold what was asked for.
        max_tokens: longest reply.
        max_retries: further attempts, sampled.
        cost: added to.

    Returns:
        For each prompt what its parser gave, or the last attempt's JudgeError.

    Raises:
        BackendError: the judge's backend failed.
    """
    results: list[Parsed | JudgeError] = [JudgeError("not asked")] * len(prompts)
    waiting = list(range(len(prompts)))
    for attempt in range(max_retries + 1):
        cost.judge_requests += len(waiting)
        replies = judge.chat(
            [prompts[index] for index in waiting],
            max_tokens=max_tokens,
            temperature=_RETRY_TEMPERATURE if attempt else 0.0,
            seed=attempt,
        )
        for index, reply in zip(waiting, replies, strict=True):
            try:
                results[index] = parsers[index](reply)
            except JudgeError as error:
                results[index] = error
        waiting = [index for index in waiting if isinstance(results[index], JudgeError)]
        if not waiting:
            break
    return results


def parse_list(reply: str, length: int) -> list[Any]:
    """The one JSON list in a reply (fences and words around it are allowed), which must have exactly `length` items.

    Raises:
        JudgeError: no list, or one of another length.

    >>> parse_list("Scores: [3, 4]", 2)
    [3, 4]
    """
    start, end = reply.find("["), reply.rfind("]")
    try:
        found = json.loads(reply[start : end + 1]) if 0 <= start < end else None
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise JudgeError(f"expected a JSON list of {length} items, found {reply[:200]!r}")
    if len(found) != length:
        raise JudgeError(f"expected exactly {length} items, found {len(found)}: {reply[:200]!r}")
    return found


def parse_scores(reply: str, length: int) -> list[int]:
    """Exactly `length` whole numbers in 0..100; nothing is clamped, cut or filled up.

    Raises:
        JudgeError: anything else.
    """
    found = parse_list(reply, length)
    for item in found:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= 100:
            raise JudgeError(f"expected whole numbers in 0..100, found {item!r}: {reply[:200]!r}")
    return found
