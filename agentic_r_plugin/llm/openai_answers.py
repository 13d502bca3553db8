"""What a server answers with status 200: its text and its token counts, or why it is no answer."""

from __future__ import annotations

import json
from typing import Any

import httpx

from agentic_r_plugin.llm.refusals import Refusal, refusal
from agentic_r_plugin.llm.reply import Reply

_THOUGHTS = ("reasoning_content", "reasoning")
_WHOLE = frozenset(
    {"stop", "eos", "eos_token", "stop_sequence", "end_turn", "complete", "tool_calls", "function_call", "tool_use"}
)
"""Finish reasons of a complete text, as is null; any other means that it was cut."""
_FAILED = frozenset({"error", "abort", "aborted", "cancelled"})
"""Finish reasons of a failed generation."""


class NotAsAskedError(Exception):
    """An answer with status 200 that violates the protocol, or a failed generation; a retry may succeed."""


class DeclinedError(Exception):
    """The model or a content filter declines to answer."""


def status_of(answer: dict[str, Any]) -> int:
    """HTTP status of an answer; some gateways send an error with 200, and its status or nothing in `error.code`."""
    error = answer.get("error")
    if not error or answer.get("choices"):
        return 200
    code = str(error.get("code")) if isinstance(error, dict) else ""
    if code.isdigit() and 400 <= int(code) < 600:
        return int(code)
    # Without a usable code: an error that gives no reason counts as the server's (500), which is retried.
    return 500 if refusal(400, json.dumps(answer)) is Refusal.UNCLEAR else 400


def json_of(response: httpx.Response) -> dict[str, Any]:
    """The answer of a response.

    Raises:
        NotAsAskedError: it is no JSON object.
    """
    try:
        answer = response.json()
    except ValueError as error:
        raise NotAsAskedError(f"expected JSON, found {response.text!r}") from error
    if not isinstance(answer, dict):
        raise NotAsAskedError(f"expected a JSON object, found {response.text!r}")
    return answer


def _choice(answer: dict[str, Any]) -> dict[str, Any]:
    """The only choice of an answer.

    Raises:
        DeclinedError: a content filter stopped it.
        NotAsAskedError: there is none, or its generation failed.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise NotAsAskedError(f"expected one choice in the server's answer, found {answer}")
    reason = finish_reason(choices[0])
    if reason == "content_filter":
        raise DeclinedError("finish_reason content_filter")
    if reason in _FAILED:
        raise NotAsAskedError(f"expected a whole generation, found {answer}")
    return choices[0]


def finish_reason(choice: dict[str, Any]) -> str:
    return str(choice.get("finish_reason") or "").lower()


def is_cut(choice: dict[str, Any]) -> bool:
    """Whether a text is incomplete: its finish reason is neither null nor one of a complete text."""
    return bool(finish_reason(choice)) and finish_reason(choice) not in _WHOLE


def message_of(answer: dict[str, Any]) -> Reply:
    """Text of a chat completion; empty if the message contains only a thought, or was cut within it.

    Raises:
        DeclinedError: the model or a content filter declines to answer.
    """
    choice = _choice(answer)
    message = choice.get("message")
    # A message may lack `content` if it holds a thought or a refusal, or was cut.
    if not isinstance(message, dict) or not (
        "content" in message or any(message.get(name) for name in (*_THOUGHTS, "refusal")) or is_cut(choice)
    ):
        raise NotAsAskedError(f"expected a message with text, found {answer}")
    if message.get("refusal"):
        raise DeclinedError(str(message["refusal"]))
    text = _text(message.get("content"))
    if text is None:
        raise NotAsAskedError(f"expected a message with text, found {answer}")
    return Reply(_whole(text), cut=is_cut(choice))


def _text(content: Any) -> str | None:
    """Text of a message's content: a string, or a list of parts without its thoughts; None for anything else."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        parts = [part.get("text") for part in content if part.get("type", "text") in ("text", "output_text")]
        return "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
    return content if isinstance(content, str) else None


def text_choice(answer: dict[str, Any]) -> tuple[dict[str, Any], str, int | None]:
    """The choice of a completion, its text, and its number of cached prompt tokens if reported."""
    choice = _choice(answer)
    if not isinstance(choice.get("text"), str):
        raise NotAsAskedError(f"expected a choice with text, found {answer}")
    return choice, _whole(choice["text"]), token_counts(answer)[1]


def _whole(text: str) -> str:
    """Replace lone surrogates by U+FFFD, as tokenizers decode partial characters; UTF-8 files cannot hold them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def token_counts(answer: dict[str, Any]) -> tuple[int, int | None, int]:
    """(prompt, cached, generated) tokens; 0 where the server reports no number, for cached tokens None."""
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    prompt, generated = (
        value if isinstance(value, int) else 0 for value in (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    )
    return prompt, cached if isinstance(cached, int) else None, generated
