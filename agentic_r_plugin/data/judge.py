"""Asks a judge model and takes only replies that hold exactly what was asked for (method section 4, steps 3 and 4)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from agentic_r_plugin.errors import ConfigError, JudgeError, JudgeRefusedError, RequestRefusedError
from agentic_r_plugin.llm.base import ChatBackend, Usage
from agentic_r_plugin.rollout import RolloutCost
from agentic_r_plugin.storage.table import Outcome
from agentic_r_plugin.store import parse_json

Parsed = TypeVar("Parsed")

_PLACEHOLDER = re.compile(r"\{[a-z_]+\}")
_RETRY_TEMPERATURE = 0.7
"""The first attempt is greedy; asking again greedily would give the same reply."""


def load_prompt(name: str, own: str = "") -> str:
    """A prompt: the file `own` where one is given, else this package's `prompts/NAME.txt`.

    Raises:
        ConfigError: no such file, or it lacks a `{placeholder}` of the package's prompt (`{reference}` may be missing).
    """
    built_in = (files("agentic_r_plugin.data") / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
    if not own:
        return built_in
    if not Path(own).is_file():
        raise ConfigError(f"prompt {own!r}: no such file; expected a text file with the placeholders of {name}.txt")
    text = Path(own).read_text(encoding="utf-8")
    wanted = sorted(set(_PLACEHOLDER.findall(built_in)) - {"{reference}"})
    missing = [placeholder for placeholder in wanted if placeholder not in text]
    if missing:
        raise ConfigError(f"prompt {own}: it lacks {', '.join(missing)}; expected {', '.join(wanted)}")
    return text


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

    A prompt that the judge refuses is not asked again: it would be refused again.

    Args:
        judge: the model.
        prompts: messages.
        parsers: one a prompt; raises JudgeError on a reply that does not hold what was asked for.
        max_tokens: longest reply.
        max_retries: further attempts, sampled.
        cost: added to.

    Returns:
        For each prompt what its parser gave, or a JudgeError: the last attempt's, or a JudgeRefusedError.

    Raises:
        BackendError: the judge's backend failed.
    """
    usage = getattr(judge, "usage", None) or Usage()
    before = replace(usage)
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
        asked, waiting = waiting, []
        for index, reply in zip(asked, replies, strict=True):
            if isinstance(reply, RequestRefusedError):
                results[index] = JudgeRefusedError(str(reply))
                continue
            try:
                results[index] = parsers[index](reply)
            except JudgeError as error:
                results[index] = error
                waiting.append(index)
        if not waiting:
            break
    cost.judge_prompt_tokens += usage.prompt_tokens - before.prompt_tokens
    cost.judge_cached_tokens += usage.cached_tokens - before.cached_tokens
    cost.judge_generated_tokens += usage.generated_tokens - before.generated_tokens
    cost.retried_requests += usage.retried - before.retried
    cost.usd += usage.usd - before.usd
    return results


def outcome_of(error: JudgeError) -> Outcome:
    """What becomes of a unit that a judge gave nothing for: refused units do not count as the judge's errors."""
    return Outcome.refused(error) if isinstance(error, JudgeRefusedError) else Outcome(error=str(error))


def parse_list(reply: str, length: int) -> list[Any]:
    """The one JSON list in a reply (fences and words around it are allowed), which must have exactly `length` items.

    Raises:
        JudgeError: no list, or one of another length.

    >>> parse_list("Scores: [3, 4]", 2)
    [3, 4]
    """
    start, end = reply.find("["), reply.rfind("]")
    try:
        found = parse_json(reply[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
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


def parse_score(reply: str) -> int:
    """The one whole number in 0..100 that a reply consists of, alone or in brackets.

    Raises:
        JudgeError: anything else.

    >>> parse_score(" [85].")
    85
    """
    match = _ONE_SCORE.fullmatch(reply)
    if match is None or int(match.group(1)) > 100:
        raise JudgeError(f"expected one whole number in 0..100 and nothing else, found {reply[:200]!r}")
    return int(match.group(1))


_ONE_SCORE = re.compile(r"\s*\[?\s*([0-9]{1,3})\s*\]?\s*\.?\s*")
