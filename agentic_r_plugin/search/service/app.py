"""HTTP interface of the retrieval service: routes, time limits, typed errors.

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
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from agentic_r_plugin import __version__
from agentic_r_plugin.credentials import authorization
from agentic_r_plugin.errors import AgenticRError, SearchError
from agentic_r_plugin.search.base import reads_reasoning, rerank_depth
from agentic_r_plugin.search.service.bodies import (
    RefusedError,
    ReloadBody,
    RequestLimits,
    documents_body,
    parse,
    parse_retrieve,
)
from agentic_r_plugin.search.service.search_service import OverloadedError, SearchService
from agentic_r_plugin.search.wire import encode_documents, encode_hits

log = logging.getLogger(__name__)

Reload = Callable[[dict[str, str]], Awaitable[str]]
"""Opens what the changed settings (`index`, `retriever`, `corpus`) name and switches to it; returns its fingerprint."""


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
        # Compared in constant time, so that the time of a refusal says nothing about the token.
        if token is not None and not hmac.compare_digest(request.headers.get("authorization", "").encode(), expected):
            raise RefusedError(401, "unauthorized", "expected the header 'Authorization: Bearer TOKEN'")

    async def answer(request: Request) -> Response:
        started, response = time.perf_counter(), None
        try:
            # Before the body is read: a client without the token cannot make the service read it.
            authorize(request)
            response = await _in_time(_ANSWERS[request.url.path](request, service, limits), limits)
        except RefusedError as error:
            response = _error_response(error)
        finally:
            service.metrics.answered(response.status_code if response else 500, time.perf_counter() - started)
        return response

    for path in _ANSWERS:
        app.router.add_route(path, answer, methods=["POST"])

    @app.post("/reload")
    async def reload_index(request: Request) -> dict[str, Any]:
        authorize(request)
        return await _reload(request, limits, reload)

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
        return _error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return _error_response(RefusedError(error.status_code, kind, str(error.detail)))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        log.error("unexpected fault", exc_info=error)
        return _error_response(RefusedError(500, "internal", f"unexpected {type(error).__name__}"))


def _error_response(error: RefusedError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse({"error": {"type": error.type, "message": error.message}}, error.status, headers=headers)


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
    requests, topk, depth, with_scores = parse_retrieve(
        body, limits, with_reasoning=reads_reasoning(backend), rerank_depth=rerank_depth(backend)
    )
    return JSONResponse(encode_hits(await service.search(requests, topk, depth), with_scores=with_scores))


async def _documents(request: Request, service: SearchService, limits: RequestLimits) -> Response:
    asked = parse(documents_body(limits), await _read_body(request, limits.max_body_bytes))
    return JSONResponse(encode_documents(await service.documents(asked.ids)))


_ANSWERS = {"/retrieve": _retrieve, "/documents": _documents}


async def _reload(request: Request, limits: RequestLimits, reload: Reload | None) -> dict[str, Any]:
    if reload is None:
        raise RefusedError(403, "forbidden", "this service does not reload on request (allow_reload)")
    # Browsers send this header with every POST; clients of the service do not.
    if "origin" in request.headers:
        raise RefusedError(403, "forbidden", "a page in a browser may not ask for a reload")
    try:
        body = await asyncio.wait_for(_read_body(request, limits.max_body_bytes), limits.timeout_s)
    except asyncio.TimeoutError:
        raise RefusedError(504, "timeout", f"no whole request within {limits.timeout_s:g} s") from None
    changes = parse(ReloadBody, body).model_dump(exclude_unset=True)
    try:
        return {"status": "reloaded", "fingerprint": await reload(changes)}
    except AgenticRError as error:
        raise RefusedError(400, "reload_failed", f"{error} (the index in use stays)") from error


async def _read_body(request: Request, max_bytes: int) -> bytes:
    # Not a parameter of the route: FastAPI would read a body of any size before it validates.
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise RefusedError(413, "too_large", f"the body is larger than {max_bytes} bytes")
    return bytes(body)
