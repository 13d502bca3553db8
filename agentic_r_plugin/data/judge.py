"""Queries a judge model; accepts only replies that hold exactly what was asked for (method section 4, steps 3, 4)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from agentic_r_plugin.cost import Cost
from agentic_r_plugin.errors import ConfigError, JudgeError, JudgeRefusedError, RequestRefusedError
from agentic_r_plugin.llm.base import ChatBackend, Usage
from agentic_r_plugin.llm.reply import Reply, after_thoughts
from agentic_r_plugin.storage.json_text import parse_json
from agentic_r_plugin.storage.table import UnitResult

Parsed = TypeVar("Parsed")

_PLACEHOLDER = re.compile(r"\{[a-z_]+\}")
_RETRY_TEMPERATURE = 0.7
"""The first attempt is greedy; a greedy retry would give the same reply."""


def load_prompt(name: str, own: str = "") -> str:
    """Load a prompt: the file `own` if given, else the package's `prompts/NAME.txt`.

    Raises:
        ConfigError: no such file, or it lacks a `{placeholder}` of the package's prompt (`{reference}` is optional).
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
    """Substitute values for `{name}`; braces inside a value stay as they are.

    >>> fill("{a} and {b}", a="{b}", b=1)
    '{b} and 1'
    """
    return _PLACEHOLDER.sub(lambda found: str(values.get(found[0][1:-1], found[0])), prompt)


def ask(
    judge: ChatBackend,
    prompts: Sequence[str],
    parsers: Sequence[Callable[[str], Parsed]],
    *,
    max_tokens: int,
    max_retries: int,
    cost: Cost,
) -> list[Parsed | JudgeError]:
    """Send every prompt and parse its reply; truncated or unparsable replies are requested again.

    A prompt that the judge refuses is not retried, since it would be refused again.

    Args:
        parsers: one per prompt; raises JudgeError if the reply does not hold what was asked for.
        max_retries: attempts after the first; these are sampled.
        cost: updated in place.

    Returns:
        For each prompt the parsed value, or a JudgeError: that of the last attempt, or a JudgeRefusedError.

    Raises:
        BackendError: the judge's backend failed.
    """
    usage = getattr(judge, "usage", None) or Usage()
    # The backend's counts grow with every call; the differences below belong to this one.
    before = replace(usage)
    results: list[Parsed | JudgeError] = [JudgeError("not asked")] * len(prompts)
    waiting = list(range(len(prompts)))
    for attempt in range(max_retries + 1):
        if not waiting:
            break
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
                # Not parsed: what precedes the cut may be a draft.
                if isinstance(reply, Reply) and reply.cut:
                    raise _cut(reply, max_tokens)
                results[index] = parsers[index](reply)
            except JudgeError as error:
                results[index] = error
                waiting.append(index)
    cost.judge_prompt_tokens += usage.prompt_tokens - before.prompt_tokens
    cost.judge_cached_tokens += usage.cached_tokens - before.cached_tokens
    cost.judge_cache_unknown_tokens += usage.cache_unknown_tokens - before.cache_unknown_tokens
    cost.judge_generated_tokens += usage.generated_tokens - before.generated_tokens
    cost.retried_requests += usage.retried - before.retried
    cost.usd += usage.usd - before.usd
    return results


def unit_result(error: JudgeError) -> UnitResult:
    """Result of a unit without a judgement; a refused unit does not count as a judge error."""
    return UnitResult.refused(error) if isinstance(error, JudgeRefusedError) else UnitResult(error=str(error))


def parse_list(reply: str, length: int) -> list[Any]:
    """The one JSON list in a reply, which must have exactly `length` items.

    Text in think tags is ignored. Code fences and words around the list are allowed, and so are references to single
    passages, such as `[2]`, before a list of several items.

    Raises:
        JudgeError: no list, or one of another length.

    >>> parse_list("Scores: [3, 4]", 2)
    [3, 4]
    >>> parse_list("Not [5, 6]? Passage [1] is a draft.</think>Passage [2] is better: [3, 4]", 2)
    [3, 4]
    """
    reply = _spoken(reply)
    start, end = reply.find("["), reply.rfind("]")
    # `[2]` in front of another list is a reference to a passage. If one item is asked for, it may be the list itself.
    while length != 1 and (reference := _REFERENCE.match(reply, start)) and "[" in reply[reference.end() :]:
        start = reply.find("[", reference.end())
    try:
        # Up to the last bracket: a reply with two lists is not JSON, so neither of them is taken by guess.
        found = parse_json(reply[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise JudgeError(f"expected a JSON list of {length} items, found {reply[:200]!r}")
    if len(found) != length:
        raise JudgeError(f"expected exactly {length} items, found {len(found)}: {reply[:200]!r}")
    return found


def parse_scores(reply: str, length: int) -> list[int]:
    """Exactly `length` integers in 0..100, also written as `90.0` or `"90"`; nothing is clamped, cut or padded.

    Raises:
        JudgeError: anything else.

    >>> parse_scores('[90.0, "15"]', 2)
    [90, 15]
    """
    return [_score(item, reply) for item in parse_list(reply, length)]


def _score(item: Any, reply: str) -> int:
    if isinstance(item, str) and (match := _NUMBER.fullmatch(item)):
        item = int(match.group(1))
    if isinstance(item, float) and item.is_integer():
        item = int(item)
    # To Python, `true` is an int.
    if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item <= 100:
        raise JudgeError(f"expected whole numbers in 0..100, found {item!r}: {reply[:200]!r}")
    return item


def parse_score(reply: str) -> int:
    """The one integer in 0..100 that is the whole reply: bare, in brackets or quotes, or in a code fence.

    Raises:
        JudgeError: anything else.

    >>> parse_score(" [85]."), parse_score("<think>90?</think> 85.0")
    (85, 85)
    """
    match = _ONE_SCORE.fullmatch(_spoken(reply))
    if match is None or int(match.group(1)) > 100:
        raise JudgeError(f"expected one whole number in 0..100 and nothing else, found {reply[:200]!r}")
    return int(match.group(1))


def parse_verdict(reply: str) -> tuple[bool, str]:
    """(whether the judge finds an answer correct, its reason), from `{"reason": "...", "correct": true}`.

    Code fences and words around the object are allowed. `yes` or `no` as the whole reply is a verdict without a reason.

    Raises:
        JudgeError: anything else.

    >>> parse_verdict('Checked: {"reason": "Same town.", "correct": true}'), parse_verdict("<think>Yes?</think> No.")
    ((True, 'Same town.'), (False, ''))
    """
    text = _spoken(reply)
    if word := _VERDICT.fullmatch(text):
        return word.group(1).lower() == "yes", ""
    try:
        found = parse_json(text[text.find("{") : text.rfind("}") + 1])
    except (ValueError, RecursionError):
        found = None
    correct = found.get("correct") if isinstance(found, dict) else None
    if not isinstance(correct, bool):
        raise JudgeError(f'expected a JSON object with "correct": true or false, found {reply[:200]!r}')
    return correct, str(found.get("reason") or "")


def _spoken(reply: str) -> str:
    """The reply without the thoughts before it.

    Raises:
        JudgeError: the reply ends inside a thought; drafts in thoughts do not count.
    """
    text, within_thought = after_thoughts(reply)
    if within_thought:
        raise JudgeError(f"the reply ends within a thought, so it was cut; {_LARGER}: {reply[-200:]!r}")
    return text


def _cut(reply: Reply, max_tokens: int) -> JudgeError:
    return JudgeError(f"the reply was cut at max_tokens={max_tokens}, so it is not whole; {_LARGER}: {reply[-200:]!r}")


_LARGER = (
    "give a larger max_tokens (options.max_tokens of relevance scorers), or switch the model's thinking off "
    "(llm.options.chat_template_kwargs.enable_thinking=false, for models that know it)"
)
_REFERENCE = re.compile(r"\[\s*[0-9]{1,3}\s*\][^\[\]]*")
_NUMBER = re.compile(r"\s*([0-9]{1,3})(?:\.0*)?\s*")
_ONE_SCORE = re.compile(r"\s*(?:```[a-z]*\s)?\s*\[?\s*\"?([0-9]{1,3})(?:\.0+)?\"?\s*\]?\s*\.?\s*(?:```)?\s*")
_VERDICT = re.compile(r"\W*(yes|no)\W*", re.IGNORECASE)
