"""The wire format of `POST /retrieve` (contract, section HTTP): Search-R1's format with three optional lists.

Request `{"queries": [str], "topk": int, "return_scores": bool, "questions"?: [str | null], "histories"?: [[str]],
"reasonings"?: [str]}`, answer `{"result": [[{"document": {"id", "title", "text", "contents"}, "score": float}]]}`;
without scores each inner list holds the documents themselves. A document has `metadata` if its corpus line has some.
Further fields are ignored in both; a `topk` of 0 or null means the service's default.

A service with a reranker also takes the request of Search-R1's `retrieval_rerank_server.py`: `topk_retrieval` passages
are found and ranked again, and the best `topk_rerank` are returned. The documents are those of other answers, because
Search-R1's agents read `document.contents`; Search-R1's server sends the text alone as `document`.

Answers of other services can be read too: documents with `contents`, with `text` and perhaps `title`, or with all of
them, or as plain text; the id (`id`, `docid`, `_id`, a string or an integer) in the document or next to it; answers
without scores (0 is recorded); fewer passages than requested, or more (the first are taken). A document without an id
gets a hash of its text (`records.text_id`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from agentic_r_plugin.errors import RecordError, SearchError
from agentic_r_plugin.field_values import name_of
from agentic_r_plugin.forms import passage_metadata
from agentic_r_plugin.query import MAX_REASONING
from agentic_r_plugin.records import Passage, text_id
from agentic_r_plugin.search.base import Hit, SearchRequest

MAX_PASSAGES = 65_536
"""Queries times topk of one request: the client's maximum, and the service's default limit."""


def encode_requests(requests: Sequence[SearchRequest], topk: int) -> dict[str, Any]:
    """Body of a `/retrieve` request; the optional lists are sent only if they hold a value."""
    body: dict[str, Any] = {"queries": [item.query for item in requests], "topk": topk, "return_scores": True}
    if any(item.question is not None for item in requests):
        body["questions"] = [item.question for item in requests]
    if any(item.history for item in requests):
        body["histories"] = [list(item.history) for item in requests]
    if any(item.reasoning for item in requests):
        body["reasonings"] = [item.reasoning[-MAX_REASONING:] for item in requests]
    return body


def encode_hits(results: Sequence[Sequence[Hit]], *, with_scores: bool) -> dict[str, Any]:
    """Body of a `/retrieve` answer."""
    if with_scores:
        return {"result": [[{"document": _document(h.passage), "score": h.score} for h in hits] for hits in results]}
    return {"result": [[_document(h.passage) for h in hits] for hits in results]}


def encode_documents(documents: Sequence[Passage | None]) -> dict[str, Any]:
    """Body of a `/documents` answer; an unknown id gives null."""
    return {"result": [None if passage is None else _document(passage) for passage in documents]}


def decode_documents(body: Any, ids: Sequence[str]) -> list[Passage | None]:
    """Documents of a parsed `/documents` answer.

    Raises:
        SearchError: the answer does not hold one document with its id, or null, for each id.
    """
    result = body.get("result") if isinstance(body, Mapping) else None
    if not isinstance(result, list) or len(result) != len(ids):
        raise SearchError(f"malformed answer: expected a list 'result' of {len(ids)} documents, found {body!r}")
    found: list[Passage | None] = []
    for place, (document, identifier) in enumerate(zip(result, ids, strict=True)):
        passage = None if document is None else decode_hit(document, f"malformed answer: result[{place}]").passage
        if passage is not None and passage.id != identifier:
            raise SearchError(f"malformed answer: expected document {identifier!r}, found {passage.id!r}")
        found.append(passage)
    return found


def _document(passage: Passage) -> dict[str, Any]:
    document = {"id": passage.id, "title": passage.title, "text": passage.text, "contents": passage.contents}
    return document | ({"metadata": dict(passage.metadata)} if passage.metadata else {})


def decode_hits(body: Any, *, num_requests: int, topk: int) -> list[list[Hit]]:
    """Hits of a parsed answer, best first.

    Errors end with the faulty value, whole: the caller removes secrets from it and shortens it.

    Raises:
        SearchError: the answer reports an error, does not hold one list per request, or holds one id with different
            contents, a document without text, or a score that is not a finite number. An incomplete answer is never an
            empty result.
    """
    result = body.get("result") if isinstance(body, Mapping) else None
    # Some services report an error in an answer of status 200; it is not an empty result.
    if isinstance(body, Mapping) and body.get("error"):
        raise SearchError(f"the service answered with an error: {body['error']!r}")
    if not isinstance(result, list):
        raise SearchError(f"malformed answer: expected an object with a list 'result', found {body!r}")
    if len(result) != num_requests:
        raise SearchError(
            f"malformed answer: expected {num_requests} results, one per query, found {len(result)}; if the service "
            "takes one query per request, set search.options.max_batch=1"
        )
    return [_decode_one(hits, index, topk) for index, hits in enumerate(result)]


def _decode_one(hits: Any, index: int, topk: int) -> list[Hit]:
    where = f"malformed answer: result[{index}]"
    if not isinstance(hits, list):
        raise SearchError(f"{where}: expected a list, found {hits!r}")
    found: dict[str, Hit] = {}
    for rank, hit in enumerate(hits):
        if len(found) == topk:  # some services always return the same number
            break
        decoded = decode_hit(hit, f"{where}[{rank}]")
        # Some services return a passage twice; it counts once, at its first rank.
        first = found.setdefault(decoded.passage.id, decoded)
        if first.passage.contents != decoded.passage.contents:
            raise SearchError(f"{where}: passage id {first.passage.id!r} occurs twice with different contents")
    return list(found.values())


def decode_hit(hit: Any, where: str) -> Hit:
    """A document with a score next to it, or (without scores) the document itself, perhaps as plain text.

    Raises:
        SearchError: as `decode_hits`; `where` begins the message.
    """
    if isinstance(hit, str):
        hit = {"document": hit}
    if not isinstance(hit, Mapping):
        raise SearchError(f"{where}: expected an object with 'document' or the document itself, found {hit!r}")
    document = hit.get("document", hit)
    if isinstance(document, str):
        document = {"contents": document}
    if not isinstance(document, Mapping):
        raise SearchError(f"{where}: expected an object as 'document', found {document!r}")
    passage = _decode_document(document, _identifier(document) or _identifier(hit), where)
    return Hit(passage=passage, score=_score(hit.get("score"), where))


def _score(value: Any, where: str) -> float:
    """A score, perhaps written as text; 0 if there is none."""
    if value is None:
        return 0.0
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            if math.isfinite(score := float(value)):
                return score
    raise SearchError(f"{where}: expected a finite number as 'score', found {value!r}")


def _identifier(fields: Mapping[str, Any]) -> str:
    """The id from one of its fields; empty if there is none."""
    for name in ("id", "docid", "_id"):
        value = fields.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
    return ""


def _decode_document(document: Mapping[str, Any], identifier: str, where: str) -> Passage:
    """Title, text and contents as sent; services may send only `contents`, or no `contents`."""
    text, contents = document.get("text"), document.get("contents")
    try:
        title = name_of(document.get("title"), "title")
    except RecordError as error:
        found = document["title"]
        raise SearchError(f"{where}: field 'title': expected text or a whole number, found {found!r}") from error
    # Without a title, `contents` is preferred to `text`: its first line may hold the title.
    if isinstance(text, str) and (title is not None or not isinstance(contents, str)):
        contents = contents if isinstance(contents, str) else ""
        passage = Passage(id=identifier, title=title or "", text=text, contents=contents)
    elif isinstance(contents, str):
        passage = Passage.from_contents(identifier, contents)
    else:
        raise SearchError(f"{where}: expected a document with 'contents' or 'text', found {document!r}")
    if metadata := passage_metadata(document):
        passage = replace(passage, metadata=metadata)
    return passage if identifier else replace(passage, id=text_id(passage.contents))
