"""Classify a server's refusal: caused by one prompt, or by the form of the request and thus common to all requests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from enum import Enum
from typing import Any


class Refusal(Enum):
    """Cause of a refusal."""

    PROMPT = "prompt"
    """The prompt is too long or blocked by a filter; other prompts may be accepted."""
    FORM = "form"
    """A field, value or model name is wrong; every request is refused."""
    UNCLEAR = "unclear"
    """The server gives no clear reason; blamed on the prompt unless no request is accepted."""


_PROMPT_CODES = frozenset(
    {
        "context_length_exceeded", "exceed_context_size_error", "string_above_max_length", "tokens_limit_reached",
        "model_max_prompt_tokens_exceeded", "request_too_large", "content_filter", "content_policy_violation",
        "responsibleaipolicyviolation", "data_inspection_failed", "invalid_prompt", "moderation_blocked",
    }
)  # fmt: skip
_FORM_CODES = frozenset(
    {
        "unsupported_parameter", "unknown_parameter", "unrecognized_parameter", "unsupported_value", "invalid_type",
        "missing_required_parameter", "model_not_found", "deploymentnotfound", "invalid_api_key", "extra_forbidden",
        "not_found_error", "authentication_error", "permission_error",
    }
)  # fmt: skip

_SURELY_OF_PROMPT = re.compile(
    r"(?:maximum|exceed)[^.]{0,80} context (?:size|length|window)|context (?:size|length|window)[^.]{0,80} exceed"
    r"|request (?:is )?too large|(?:input|prompt)s? (?:is |are )?too (?:long|large)"
    r"|support[^.]{0,40} (?:input|prompt) length|input text contains"  # e.g. unsupported characters
    r"|`inputs`(?: tokens \+ `max_new_tokens`)? must (?:be <|have less)",  # Text Generation Inference, Together
    re.IGNORECASE,
)
"""Texts that no refusal of a form contains, though some also match a pattern of `_OF_FORM`."""

_OF_FORM = re.compile(
    r"(?:un|not |n't )support|unrecogni[sz]ed|unknown (?:field|parameter|argument|name|option|variant|key)"
    r"|unexpected (?:keyword|field|argument|property|value)|extra (?:inputs|fields|keys)|not permitted|no such model"
    r"|model .{0,80}(?:not found|does not exist|not exist)|supports? at most \d+ completion tokens",
    re.IGNORECASE,
)
_OF_PROMPT = re.compile(
    r"context|too long|too large|too many (?:input )?tokens|longer than|exceed|at least 1, got -"
    r"|max(?:imum)?[ _](?:model|input|prompt|seq\w*|total|allowed)|prompt length|input length|number of tokens"
    r"|filter|content polic|usage polic|moderat|flagged|inappropriate|sensitive|violat",
    re.IGNORECASE,
)
_OF_VALUE = re.compile(
    r"must be|must have|should be|invalid (?:parameter|field|value|type|schema|request body)|missing|required|"
    r"only .{0,40}(?:allowed|supported)|not allowed|not a valid|is invalid",
    re.IGNORECASE,
)
_OF_THE_PROMPT = frozenset({"messages", "prompt", "input", "input_tokens", "body"})


def refusal(status: int, content: str) -> Refusal:
    """Classify a refusal by the status and body of the response.

    Supports the error bodies of OpenAI, Azure, vLLM, SGLang, llama.cpp, Ollama, LiteLLM, TGI and FastAPI. Statuses of
    transient failures (408, 429, 5xx) are a refusal of the prompt if they clearly say so, else unclear.

    >>> refusal(400, '{"error": {"code": "context_length_exceeded", "message": "..."}}').value
    'prompt'
    >>> refusal(400, '{"error": {"message": "Unsupported parameter: max_tokens", "param": "max_tokens"}}').value
    'form'
    """
    said = _said(content)
    codes = {str(said.get(name)).lower() for name in ("code", "type")} | {said["inner"]}
    message, named = said["message"], said["param"]
    # From specific to vague: a message about the prompt's length may also match a pattern for a wrong value.
    if status == 413 or codes & _PROMPT_CODES or _SURELY_OF_PROMPT.search(message):
        return Refusal.PROMPT
    if status in (408, 429) or status >= 500:  # "rate limit exceeded" is not about the prompt
        return Refusal.UNCLEAR
    if status in (401, 404, 405):
        return Refusal.FORM
    if codes & _FORM_CODES or _OF_FORM.search(message):
        return Refusal.FORM
    if _OF_PROMPT.search(message):
        return Refusal.PROMPT
    if status == 403 or _OF_VALUE.search(message) or (named and named not in _OF_THE_PROMPT):
        return Refusal.FORM
    return Refusal.UNCLEAR


def named_fields(content: str, fields: Iterable[str]) -> list[str]:
    """The body fields that a refusal mentions."""
    return [name for name in dict.fromkeys(fields) if re.search(rf"\b{re.escape(name)}\b", content)]


def _said(content: str) -> dict[str, Any]:
    """Extract `code`, `type`, the `inner` code, `param` and `message` from an error body."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = {}
    error = body.get("error", body) if isinstance(body, dict) else {}
    error = error if isinstance(error, dict) else {"message": str(error)}
    detail = body.get("detail") if isinstance(body, dict) else None
    # FastAPI lists faults in `detail`, each with its place in the body (`loc`).
    first = detail[0] if isinstance(detail, list) and detail and isinstance(detail[0], dict) else {}
    inner = error.get("innererror")
    place = [str(part) for part in first.get("loc", ()) if part != "body"] if isinstance(first.get("loc"), list) else []
    return {
        "code": error.get("code") or first.get("type"),
        "type": error.get("type"),
        "inner": str(inner.get("code")).lower() if isinstance(inner, dict) else "",
        # `messages[0].content` is a fault of the field `messages`.
        "param": str(error.get("param") or (place[0] if place else "")).partition("[")[0].partition(".")[0],
        "message": str(error.get("message") or first.get("msg") or content[:2000]),
    }
