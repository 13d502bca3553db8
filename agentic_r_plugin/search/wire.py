"""The wire format of `POST /retrieve` (contract, section HTTP): what Search-R1's server speaks, and two optional lists.

Request `{"queries": [str], "topk": int, "return_scores": bool, "questions"?: [str | null], "histories"?: [[str]]}`,
answer `{"result": [[{"document": {"id", "title", "text", "contents"}, "score": float}]]}`; without scores each inner
list holds the documents themselves.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping, Sequence
from typing import Any

from agentic_r_plugin.errors import SearchError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.base import Hit, SearchRequest

MAX_PASSAGES = 65_536
"""Queries times topk of one request: what the client asks for at most, and the service's default limit."""


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def encode_requests(requests: Sequence[SearchRequest], topk: int) -> dict[str, Any]:
    """Body of a `/retrieve` request; the optional lists are sent only when they say something."""
    body: dict[str, Any] = {"queries": [item.query for item in requests], "topk": topk, "return_scores": True}
    if any(item.question is not None for item in requests):
        body["questions"] = [item.question for item in requests]
    if any(item.history for item in requests):
        body["histories"] = [list(item.history) for item in requests]
    return body


def encode_hits(results: Sequence[Sequence[Hit]], *, with_scores: bool) -> dict[str, Any]:
    """Body of a `/retrieve` answer."""
    if with_scores:
        return {"result": [[{"document": _document(h.passage), "score": h.score} for h in hits] for hits in results]}
    return {"result": [[_document(h.passage) for h in hits] for hits in results]}


def _document(passage: Passage) -> dict[str, str]:
    return {"id": passage.id, "title": passage.title, "text": passage.text, "contents": passage.contents}


def decode_hits(body: Any, *, num_requests: int, topk: int) -> list[list[Hit]]:
    """Hits of a parsed answer, best first.

    Raises:
        SearchError: not exactly one list per request, more hits than asked for, a passage twice, a document without
            text fields, or a score that is not a finite number. An answer that is not whole is never an empty result.
    """
    result = body.get("result") if isinstance(body, Mapping) else None
    if not isinstance(result, list):
        raise SearchError(f"malformed answer: expected an object with a list 'result', found {_short(body)}")
    if len(result) != num_requests:
        raise SearchError(f"malformed answer: expected {num_requests} results, one per query, found {len(result)}")
    return [_decode_one(hits, index, topk) for index, hits in enumerate(result)]


def _decode_one(hits: Any, index: int, topk: int) -> list[Hit]:
    where = f"malformed answer: result[{index}]"
    if not isinstance(hits, list):
        raise SearchError(f"{where}: expected a list, found {_short(hits)}")
    if len(hits) > topk:
        raise SearchError(f"{where}: expected at most {topk} hits, found {len(hits)}")
    found = [_decode_hit(hit, f"{where}[{rank}]") for rank, hit in enumerate(hits)]
    if len({hit.passage.id for hit in found}) != len(found):
        raise SearchError(f"{where}: the same passage id stands there twice")
    return found


def _decode_hit(hit: Any, where: str) -> Hit:
    document = hit.get("document") if isinstance(hit, Mapping) else None
    if not isinstance(document, Mapping):
        raise SearchError(f"{where}: expected an object with 'document' and 'score', found {_short(hit)}")
    score = hit.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise SearchError(f"{where}: expected a finite number as 'score', found {_short(score)}")
    return Hit(passage=_decode_document(document, where), score=float(score))


def _decode_document(document: Mapping[str, Any], where: str) -> Passage:
    """Title, text and contents as sent; servers may send only `contents`, or no `contents`."""
    identifier, title, text = document.get("id"), document.get("title"), document.get("text")
    contents = document.get("contents")
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    if isinstance(identifier, str) and isinstance(title, str) and isinstance(text, str):
        return Passage(id=identifier, title=title, text=text, contents=contents if isinstance(contents, str) else "")
    if isinstance(identifier, str) and isinstance(contents, str):
        return Passage.from_contents(identifier, contents)
    raise SearchError(f"{where}: expected a document with 'id', 'title' and 'text', found {_short(document)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"
