"""Bodies of the retrieval service's requests as pydantic models, whose bounds are the limits of the service."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from agentic_r_plugin.search.base import SearchRequest


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Limits of one HTTP request."""

    max_queries: int
    max_topk: int = 1000
    max_passages: int
    """Number of queries times topk."""
    max_query_chars: int = 20_000
    """Characters of a query, a question or an earlier query; of a longer reasoning, only the end is read."""
    max_history: int = 64
    max_body_bytes: int
    timeout_s: float
    default_topk: int


class RefusedError(Exception):
    """A request that gets an error response with this HTTP status, and with this `type` and `message` in its body."""

    def __init__(self, status: int, type: str, message: str) -> None:
        super().__init__(message)
        self.status, self.type, self.message = status, type, message


_TOO_LARGE = ("too_long", "string_too_long", "less_than_equal")
"""pydantic's errors for a value above a limit."""

_STRICT = ConfigDict(strict=True)


class ReloadBody(BaseModel, strict=True, extra="forbid"):
    """Body of `POST /reload`: paths as the service sees them."""

    index: str = Field(min_length=1)
    retriever: str = ""
    corpus: str = ""


@cache
def retrieve_body(limits: RequestLimits) -> Any:
    """Model of the body of `POST /retrieve` (see `wire`); fields that it does not name are ignored."""
    text = Annotated[str, Field(max_length=limits.max_query_chars)]
    # Without a bound, pydantic takes a string with lone surrogates, which no tokenizer takes.
    end = Annotated[text, BeforeValidator(partial(_last, limits.max_query_chars))]
    number = Annotated[int, Field(ge=0, le=limits.max_topk), BeforeValidator(_whole)]
    return create_model(
        "RetrieveBody",
        __config__=_STRICT,
        queries=_many(text, limits.max_queries),
        questions=(_many(text | None) | None, None),
        histories=(_many(_many(text, limits.max_history)) | None, None),
        reasonings=(_many(end) | None, None),
        topk=(number | None, None),
        topk_retrieval=(number | None, None),
        topk_rerank=(number | None, None),
        return_scores=(bool | None, None),
    )


@cache
def documents_body(limits: RequestLimits) -> Any:
    """Model of the body of `POST /documents`."""
    text = Annotated[str, Field(max_length=limits.max_query_chars)]
    return create_model("DocumentsBody", __config__=_STRICT, ids=_many(text, limits.max_queries))


def _many(item: Any, most: int | None = None) -> Any:
    """A list; the first fault ends its validation, since a body has room for a million of them."""
    return Annotated[list[item], Field(max_length=most, fail_fast=True)]  # type: ignore[valid-type]


def _last(most: int, value: Any) -> Any:
    return value[-most:] if isinstance(value, str) else value


def _whole(value: Any) -> Any:
    """Some clients send 3.0 for 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def parse(model: Any, body: bytes) -> Any:
    """A body as an instance of its model.

    Raises:
        RefusedError: not JSON, a field of the wrong type, or a limit is exceeded.
    """
    try:
        # `model_validate_json` would also judge ignored fields: their depth, and surrogates in their text.
        return model.model_validate(json.loads(body))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else part for part in first["loc"]) or "body"
        found = f", found {type(first['input']).__name__}" if first["type"].endswith("_type") else ""
        message = f"{where}: {first['msg']}{found}"
        if first["type"] in _TOO_LARGE:
            raise RefusedError(413, "too_large", message) from None
        raise invalid(message) from None
    except (ValueError, RecursionError) as error:
        raise invalid(f"expected a JSON object in UTF-8: {error}") from error


def parse_retrieve(
    body: bytes, limits: RequestLimits, *, with_reasoning: bool = True, rerank_depth: int = 0
) -> tuple[list[SearchRequest], int, int, bool]:
    """(searches, topk, depth, with scores) of a `/retrieve` body.

    The depth is the number of passages to rank again if the request names it, else 0.

    Args:
        rerank_depth: passages that the backend ranks again unless the request names a number; 0: it has no reranker.
        with_reasoning: False leaves out the reasoning, for a backend that does not read it: equal searches then compare
            equal in the cache.

    Raises:
        RefusedError: as `parse`; also lists of different lengths, or too many passages.
    """
    asked = parse(retrieve_body(limits), body)
    size = len(asked.queries)
    lists: dict[str, Any] = {"questions": None, "histories": [], "reasonings": ""}
    for name, default in lists.items():
        values = getattr(asked, name)
        if values is not None and len(values) != size:
            raise invalid(f"{name}: expected a list as long as 'queries' ({size}), found {len(values)} items")
        lists[name] = [default] * size if values is None else values
    requests = [
        SearchRequest(
            query=query, question=question, history=tuple(history), reasoning=reasoning if with_reasoning else ""
        )
        for query, question, history, reasoning in zip(asked.queries, *lists.values(), strict=True)
    ]
    topk, depth = asked.topk or limits.default_topk, 0
    if asked.topk_retrieval is not None or asked.topk_rerank is not None:  # Search-R1's form
        if not rerank_depth:
            raise invalid("topk_retrieval, topk_rerank: this service has no reranker (rerank.model); send 'topk'")
        depth = asked.topk_retrieval or rerank_depth
        topk = min(asked.topk_rerank or limits.default_topk, depth)
    # Passages that are ranked again are fetched, too, and count against the limit.
    for number in (topk, depth or rerank_depth):
        if size * number > limits.max_passages:
            message = f"{size} queries of {number} passages; at most {limits.max_passages} passages are allowed"
            raise RefusedError(413, "too_large", message)
    return requests, topk, depth, bool(asked.return_scores)


def invalid(message: str) -> RefusedError:
    """A refusal of a body that is not what the service takes."""
    return RefusedError(400, "invalid_request", message)
