"""HTTP interface of the retrieval service: limits, validation of requests, typed errors.

| path | answers |
|---|---|
| `POST /retrieve` | the contract's wire format (`wire`) |
| `POST /documents` | `{"ids": [str]}` -> `{"result": [document or null]}`; limits and token as for `/retrieve` |
| `POST /reload` | `{"index", "retriever"?, "corpus"?}`: opens that index and switches to it, if reloading is allowed |
| `GET /health` | 200 while the process is alive, with what it serves |
| `GET /ready` | 200 while it accepts searches, else 503 |
| `GET /metrics` | Prometheus |
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from agentic_r_plugin import __version__
from agentic_r_plugin.credentials import authorization
from agentic_r_plugin.errors import AgenticRError, SearchError
from agentic_r_plugin.search.base import SearchRequest, reads_reasoning, rerank_depth
from agentic_r_plugin.search.service.search_service import OverloadedError, SearchService
from agentic_r_plugin.search.wire import encode_documents, encode_hits

log = logging.getLogger(__name__)

Reload = Callable[[dict[str, str]], Awaitable[str]]
"""Opens what the changed settings (`index`, `retriever`, `corpus`) name and switches to it; returns its fingerprint."""


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
    """A request that gets an error response."""

    def __init__(self, status: int, type: str, message: str) -> None:
        super().__init__(message)
        self.status, self.type, self.message = status, type, message

    def response(self) -> JSONResponse:
        """`{"error": {"type", "message"}}`."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else None
        return JSONResponse({"error": {"type": self.type, "message": self.message}}, self.status, headers=headers)


def build_app(
    service: SearchService, limits: RequestLimits, *, token: str | None, reload: Reload | None = None
) -> FastAPI:
    """Build the FastAPI application.

    Args:
        token: required from clients; None accepts every client.
        reload: implements `POST /reload`; None refuses it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(title="Agentic-R retrieval", version=__version__, lifespan=lifespan, openapi_url=None)

    def authorize(request: Request) -> None:
        expected = authorization(token).get("Authorization", "").encode()
        if token is not None and not hmac.compare_digest(request.headers.get("authorization", "").encode(), expected):
            raise RefusedError(401, "unauthorized", "expected the header 'Authorization: Bearer TOKEN'")

    async def answer(request: Request) -> Response:
        started, response = time.perf_counter(), None
        try:
            authorize(request)
            response = await _in_time(_ANSWERS[request.url.path](request, service, limits), limits)
        except RefusedError as error:
            response = error.response()
        finally:
            service.metrics.answered(response.status_code if response else 500, time.perf_counter() - started)
        return response

    for path in _ANSWERS:
        app.router.add_route(path, answer, methods=["POST"])

    @app.post("/reload")
    async def reload_index(request: Request) -> dict[str, Any]:
        authorize(request)
        if reload is None:
            raise RefusedError(403, "forbidden", "this service does not reload on request (allow_reload)")
        if "origin" in request.headers:
            raise RefusedError(403, "forbidden", "a page in a browser may not ask for a reload")
        try:
            body = await asyncio.wait_for(_read_body(request, limits.max_body_bytes), limits.timeout_s)
        except asyncio.TimeoutError:
            raise RefusedError(504, "timeout", f"no whole request within {limits.timeout_s:g} s") from None
        changes = _changes(body)
        try:
            return {"status": "reloaded", "fingerprint": await reload(changes)}
        except AgenticRError as error:
            raise RefusedError(400, "reload_failed", f"{error} (the index in use stays)") from error

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "fingerprint": service.fingerprint}

    @app.get("/ready")
    async def ready() -> dict[str, Any]:
        if not service.ready:
            raise RefusedError(503, "not_ready", "the service takes no searches")
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        authorize(request)
        text = service.metrics.render(service.fingerprint)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    _answer_errors(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Give every error response the same JSON form."""

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return RefusedError(error.status_code, kind, str(error.detail)).response()

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        log.error("unexpected fault", exc_info=error)
        return RefusedError(500, "internal", f"unexpected {type(error).__name__}").response()


def _changes(body: bytes) -> dict[str, str]:
    data = _object(body)
    if not isinstance(data.get("index"), str) or not data["index"]:
        raise _invalid("expected a string in 'index', an index folder as the service sees it")
    for name, value in data.items():
        if name not in ("index", "retriever", "corpus") or not isinstance(value, str):
            raise _invalid(f"field {name!r}: expected strings in index, retriever and corpus")
    return data


async def _in_time(answer: Awaitable[Response], limits: RequestLimits) -> Response:
    try:
        return await asyncio.wait_for(answer, limits.timeout_s)
    except asyncio.TimeoutError:
        raise RefusedError(504, "timeout", f"no answer within {limits.timeout_s:g} s") from None
    except OverloadedError as error:
        raise RefusedError(503, "overloaded", str(error)) from error
    except SearchError as error:
        log.error("%s", error)
        raise RefusedError(500, "search_failed", str(error)) from error


async def _retrieve(request: Request, service: SearchService, limits: RequestLimits) -> Response:
    body = await _read_body(request, limits.max_body_bytes)
    backend = service.backend
    requests, topk, depth, with_scores = parse_body(
        body, limits, with_reasoning=reads_reasoning(backend), rerank_depth=rerank_depth(backend)
    )
    return JSONResponse(encode_hits(await service.search(requests, topk, depth), with_scores=with_scores))


async def _documents(request: Request, service: SearchService, limits: RequestLimits) -> Response:
    ids = _object(await _read_body(request, limits.max_body_bytes)).get("ids")
    if not isinstance(ids, list):
        raise _invalid(f"expected a list of strings in 'ids', found {type(ids).__name__}")
    if len(ids) > limits.max_queries:
        raise RefusedError(413, "too_large", f"{len(ids)} ids; at most {limits.max_queries} are allowed")
    checked = [_text(identifier, f"ids[{i}]", limits) for i, identifier in enumerate(ids)]
    return JSONResponse(encode_documents(await service.documents(checked)))


_ANSWERS = {"/retrieve": _retrieve, "/documents": _documents}


async def _read_body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise RefusedError(413, "too_large", f"the body is larger than {max_bytes} bytes")
    return bytes(body)


def parse_body(
    body: bytes, limits: RequestLimits, *, with_reasoning: bool = True, rerank_depth: int = 0
) -> tuple[list[SearchRequest], int, int, bool]:
    """(searches, topk, depth, with scores) of a `/retrieve` body; fields that `wire` does not name are ignored.

    The depth is the number of passages to rank again if the request names it, else 0.

    Args:
        rerank_depth: passages that the backend ranks again unless the request names a number; 0: it has no reranker.
        with_reasoning: False leaves out the reasoning, for a backend that does not read it: equal searches then compare
            equal in the cache.

    Raises:
        RefusedError: not JSON, a field of the wrong type, or a limit is exceeded.
    """
    data = _object(body)
    queries = data.get("queries")
    if not isinstance(queries, list):
        raise _invalid(f"expected a list of strings in 'queries', found {type(queries).__name__}")
    if len(queries) > limits.max_queries:
        raise RefusedError(413, "too_large", f"{len(queries)} queries; at most {limits.max_queries} are allowed")
    questions = _parallel(data, "questions", len(queries), None)
    histories = _parallel(data, "histories", len(queries), [])
    reasonings = _parallel(data, "reasonings", len(queries), "")
    requests = [
        SearchRequest(
            query=_text(query, f"queries[{i}]", limits),
            question=None if question is None else _text(question, f"questions[{i}]", limits),
            history=_history(history, f"histories[{i}]", limits),
            reasoning=_reasoning(reasoning, f"reasonings[{i}]", limits) if with_reasoning else "",
        )
        for i, (query, question, history, reasoning) in enumerate(
            zip(queries, questions, histories, reasonings, strict=True)
        )
    ]
    topk, depth = _depths(data, limits, rerank_depth)
    if len(requests) * topk > limits.max_passages:
        raise RefusedError(
            413, "too_large", f"{len(requests)} queries of topk {topk}; at most {limits.max_passages} passages are sent"
        )
    if len(requests) * (ranked := depth or rerank_depth) > limits.max_passages:
        raise RefusedError(
            413,
            "too_large",
            f"{len(requests)} queries with {ranked} passages each to rank again; at most {limits.max_passages} are",
        )
    return requests, topk, depth, _flag(data.get("return_scores"))


def _object(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"expected a JSON object in UTF-8: {error}") from error
    if not isinstance(data, dict):
        raise _invalid(f"expected a JSON object, found {type(data).__name__}")
    return data


def _parallel(data: dict[str, Any], name: str, length: int, default: Any) -> list[Any]:
    """An optional list that must be as long as `queries`."""
    values = data.get(name)
    if values is None:
        return [default] * length
    if not isinstance(values, list) or len(values) != length:
        raise _invalid(f"expected a list as long as 'queries' ({length}) in {name!r}")
    return values


def _text(value: Any, where: str, limits: RequestLimits) -> str:
    if not isinstance(value, str):
        raise _invalid(f"{where}: expected a string, found {type(value).__name__}")
    if len(value) > limits.max_query_chars:
        raise RefusedError(
            413, "too_large", f"{where}: {len(value)} characters; at most {limits.max_query_chars} are allowed"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _invalid(f"{where}: not valid Unicode: {error.reason}") from error
    return value


def _reasoning(value: Any, where: str, limits: RequestLimits) -> str:
    return _text(value[-limits.max_query_chars :] if isinstance(value, str) else value, where, limits)


def _history(value: Any, where: str, limits: RequestLimits) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _invalid(f"{where}: expected a list of strings, found {type(value).__name__}")
    if len(value) > limits.max_history:
        raise RefusedError(413, "too_large", f"{where}: more than {limits.max_history} earlier queries")
    return tuple(_text(item, f"{where}[{i}]", limits) for i, item in enumerate(value))


def _depths(data: dict[str, Any], limits: RequestLimits, rerank_depth: int) -> tuple[int, int]:
    """(topk, passages to rank again, 0 if the request does not name it): from `topk`, or in Search-R1's form."""
    named = [name for name in ("topk_retrieval", "topk_rerank") if data.get(name) is not None]
    if not named:
        return _topk(data.get("topk"), "topk", limits, limits.default_topk), 0
    if not rerank_depth:
        raise _invalid(f"{named[0]!r}: this service has no reranker (rerank.model); send 'topk'")
    depth = _topk(data.get("topk_retrieval"), "topk_retrieval", limits, rerank_depth)
    return min(_topk(data.get("topk_rerank"), "topk_rerank", limits, limits.default_topk), depth), depth


def _topk(value: Any, name: str, limits: RequestLimits, default: int) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | None) or (value or 0) < 0:
        raise _invalid(f"expected a whole number in {name!r} (0 or null: the default), found {str(value)[:40]!r}")
    if not value:
        return default
    if value > limits.max_topk:
        raise RefusedError(413, "too_large", f"{name} {value if value < 10**9 else 'too large'}: max {limits.max_topk}")
    return value


def _flag(value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise _invalid("expected true or false in 'return_scores'")
    return bool(value)


def _invalid(message: str) -> RefusedError:
    return RefusedError(400, "invalid_request", message)
