"""Client of the retrieval service, or of any server with the same wire format, such as Search-R1's.

One object can be used from several threads, event loops and processes: connections are kept per event loop and per
process, and pickling carries only the settings.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import httpx

from agentic_r_plugin.credentials import authorization, redacted, refuse_secrets
from agentic_r_plugin.errors import ConfigError, SearchError, SearchRefusedError, SearchUnavailableError
from agentic_r_plugin.net import is_loopback, pause_s
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.base import OF_ONE_REQUEST, Hit, SearchRequest
from agentic_r_plugin.search.wire import MAX_PASSAGES, decode_documents, decode_hits, encode_requests
from agentic_r_plugin.storage.json_text import parse_json

_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_MAX_ANSWER_BYTES = 512 * 1024 * 1024


class RetrievalClient:
    """Sends searches to a retrieval service and retries transient failures.

    Connection errors, time-outs and the statuses 408, 425, 429 and 5xx are retried with jittered, doubling pauses (or
    after the time in `Retry-After`); then `SearchUnavailableError` is raised. Other error statuses and broken answers
    raise `SearchError` at once. A failure is never an empty result.

    Args:
        url: base address, such as `http://127.0.0.1:8000`; a trailing `/retrieve` is removed.
        timeout_s: limit of one attempt, from connecting to the last byte.
        retries: attempts after the first.
        max_connections: per event loop (or, for `search`, per process).
        token: sent as `Authorization: Bearer`, or unchanged if it begins with `Basic `.
        max_batch: larger batches of searches or documents are sent in several calls, one after another.

    Raises:
        ConfigError: not an http(s) address, or an invalid number.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 60.0,
        retries: int = 5,
        max_connections: int = 32,
        token: str | None = None,
        max_batch: int = 256,
    ) -> None:
        if timeout_s <= 0 or retries < 0 or max_connections < 1 or max_batch < 1:
            raise ConfigError("timeout_s must be above 0, retries at least 0, max_connections and max_batch at least 1")
        self.url = _base_url(url)
        self.timeout_s, self.retries, self.max_connections = timeout_s, retries, max_connections
        self.token, self.max_batch = token, max_batch
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._sync: httpx.Client | None = None
        self._async: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        names = ("timeout_s", "retries", "max_connections", "token", "max_batch")
        return partial(type(self), self.url, **{name: getattr(self, name) for name in names}), ()

    # --- searching ----------------------------------------------------------------------------------------------------

    async def asearch(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """Best `topk` passages of each request, in the order of the requests.

        Raises:
            SearchUnavailableError: no valid answer within the retries; names address, attempts and the last error.
            SearchError: the service refused the request, or its answer is malformed.
        """
        found: list[list[Hit]] = []
        for batch in self._batches(requests, topk):
            with _explained(batch):
                answer = await self._acall("POST", "/retrieve", encode_requests(batch, topk))
            found += self._decode(answer, len(batch), topk)
        return found

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """Blocking form of `asearch`; safe to call from several threads."""
        found: list[list[Hit]] = []
        for batch in self._batches(requests, topk):
            with _explained(batch):
                answer = self._call("POST", "/retrieve", encode_requests(batch, topk))
            found += self._decode(answer, len(batch), topk)
        return found

    async def adocuments(self, ids: Sequence[str]) -> list[Passage | None]:
        """The documents with these ids; None for an unknown id.

        Raises:
            SearchError: as for `asearch`; also if the service has no route `/documents`.
        """
        found: list[Passage | None] = []
        for part in self._parts(ids):
            found += self._documents(await self._acall("POST", "/documents", {"ids": part}), part)
        return found

    def documents(self, ids: Sequence[str]) -> list[Passage | None]:
        """Blocking form of `adocuments`."""
        found: list[Passage | None] = []
        for part in self._parts(ids):
            found += self._documents(self._call("POST", "/documents", {"ids": part}), part)
        return found

    def _parts(self, ids: Sequence[str]) -> list[list[str]]:
        return [list(ids[start : start + self.max_batch]) for start in range(0, len(ids), self.max_batch)]

    def _documents(self, answer: Any, ids: Sequence[str]) -> list[Passage | None]:
        try:
            return decode_documents(answer, ids)
        except SearchError as error:
            raise SearchError(f"{self.url}/documents: {_start(str(error), self.token, 300)}") from None

    def health(self) -> dict[str, Any]:
        """Answer of `GET /health`: at least `status` and `fingerprint` from our service.

        Raises:
            SearchError: as for `search`.
        """
        answer = self._call("GET", "/health", None)
        if not isinstance(answer, dict):
            raise SearchError(f"{self.url}/health: expected a JSON object, found {type(answer).__name__}")
        return answer

    def fingerprint(self) -> str:
        """Fingerprint of the served index, or the address if the service has no `/health` of ours (Search-R1's).

        Raises:
            SearchUnavailableError: no answer within the retries.
            SearchRefusedError: the service refuses the caller (401, 403).
        """
        try:
            return str(self.health().get("fingerprint") or self.url)
        except SearchUnavailableError:
            raise
        except SearchError as error:
            if isinstance(error, SearchRefusedError) and error.status in (401, 403):
                raise
            return self.url  # an error status, or an unrelated page

    def reload(self, index: str, *, retriever: str = "", corpus: str = "", timeout_s: float = 600.0) -> str:
        """Ask the service to switch to another index; returns the fingerprint of what it serves afterwards.

        Not retried: on failure the service reports the reason and keeps its current index.

        Args:
            index: folder, as seen by the service; likewise `retriever` and `corpus`, if they are not the index's own.

        Raises:
            SearchError: the service refused, could not open the index, or did not answer.
        """
        changes = {name: value for name, value in (("retriever", retriever), ("corpus", corpus)) if value}
        try:
            answer = self._sync_client().post(
                f"{self.url}/reload", json={"index": index} | changes, timeout=httpx.Timeout(timeout_s)
            )
        except httpx.TransportError as error:
            reason = redacted(_describe(error, timeout_s), self.token)
            raise SearchError(f"{self.url}/reload: {reason}") from None
        if answer.status_code != 200:
            reason = f"HTTP {answer.status_code}: {_error_message(answer.content, self.token)}"
            raise SearchRefusedError(
                f"{self.url}/reload: the service refused the request: {reason}", status=answer.status_code
            )
        reply = _Attempts(self, "/reload").parse(answer.content)
        if not isinstance(reply, dict) or not isinstance(reply.get("fingerprint"), str):
            found = _start(repr(reply), self.token)
            raise SearchError(
                f"{self.url}/reload: malformed answer: expected an object with 'fingerprint', found {found}"
            )
        return str(reply["fingerprint"])

    def close(self) -> None:
        """Close the blocking connections; those of event loops are closed by `aclose` or with their loop."""
        # After a fork the connections belong to the parent process.
        if self._sync is not None and self._pid == os.getpid():
            self._sync.close()
        self._sync = None

    async def aclose(self) -> None:
        """Close the running event loop's connections."""
        client = self._async.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    # --- one call with retries ----------------------------------------------------------------------------------------

    async def _acall(self, method: str, path: str, body: Any) -> Any:
        attempts = _Attempts(self, path)
        while True:
            pause: float | None
            try:
                # httpx limits each read, not the whole answer: a server that trickles bytes would hold the call.
                response = await asyncio.wait_for(self._afetch(method, path, body), self.timeout_s)
            except (httpx.RequestError, asyncio.TimeoutError, TimeoutError) as error:
                pause = attempts.fault(error, self.timeout_s)
            else:
                pause = attempts.judge(*response)
            if pause is None:
                return attempts.parse(response[2])
            await asyncio.sleep(pause)

    def _call(self, method: str, path: str, body: Any) -> Any:
        attempts = _Attempts(self, path)
        while True:
            pause: float | None
            try:
                response = self._fetch(method, path, body)
            except (httpx.RequestError, TimeoutError) as error:
                pause = attempts.fault(error, self.timeout_s)
            else:
                pause = attempts.judge(*response)
            if pause is None:
                return attempts.parse(response[2])
            time.sleep(pause)

    async def _afetch(self, method: str, path: str, body: Any) -> tuple[int, httpx.Headers, bytes]:
        content = bytearray()
        async with self._async_client().stream(method, self.url + path, json=body) as response:
            async for chunk in response.aiter_bytes():
                content += chunk
                self._check_size(content)
        return response.status_code, response.headers, bytes(content)

    def _fetch(self, method: str, path: str, body: Any) -> tuple[int, httpx.Headers, bytes]:
        # A deadline for the whole answer; httpx only limits each read.
        content, deadline = bytearray(), time.monotonic() + self.timeout_s
        with self._sync_client().stream(method, self.url + path, json=body) as response:
            for chunk in response.iter_bytes():
                content += chunk
                self._check_size(content)
                if time.monotonic() > deadline:
                    raise TimeoutError
        return response.status_code, response.headers, bytes(content)

    # --- pieces -------------------------------------------------------------------------------------------------------

    def _batches(self, requests: Sequence[SearchRequest], topk: int) -> list[Sequence[SearchRequest]]:
        if topk < 1:
            raise SearchError(f"expected topk of at least 1, found {topk}")
        # Deep searches go out in smaller requests: a service limits queries times topk.
        size = min(self.max_batch, max(1, MAX_PASSAGES // topk))
        return [requests[start : start + size] for start in range(0, len(requests), size)]

    def _decode(self, answer: Any, num_requests: int, topk: int) -> list[list[Hit]]:
        try:
            return decode_hits(answer, num_requests=num_requests, topk=topk)
        except SearchError as error:
            raise SearchError(f"{self.url}/retrieve: {_start(str(error), self.token, 300)}") from None

    def _check_size(self, content: bytearray) -> None:
        if len(content) > _MAX_ANSWER_BYTES:
            raise SearchError(f"{self.url}: answer larger than {_MAX_ANSWER_BYTES} bytes; ask for fewer passages")

    def _settings(self) -> dict[str, Any]:
        headers = {"Accept-Encoding": "identity"}
        headers |= authorization(self.token)
        limits = httpx.Limits(max_connections=self.max_connections, max_keepalive_connections=self.max_connections)
        # Proxies of the environment (`trust_env`) are not for services on this machine.
        local = is_loopback(httpx.URL(self.url).host)
        return {"headers": headers, "limits": limits, "timeout": self.timeout_s, "trust_env": not local}

    def _sync_client(self) -> httpx.Client:
        if self._pid != os.getpid():
            self._reset()
        if self._sync is None:
            self._sync = httpx.Client(**self._settings())
        return self._sync

    def _async_client(self) -> httpx.AsyncClient:
        if self._pid != os.getpid():
            self._reset()
        loop = asyncio.get_running_loop()
        if loop not in self._async:
            self._async[loop] = httpx.AsyncClient(**self._settings())
        return self._async[loop]


@contextmanager
def _explained(batch: Sequence[SearchRequest]) -> Iterator[None]:
    """If a service refuses a batch of several queries, add how to send smaller batches to the error."""
    try:
        yield
    except SearchRefusedError as error:
        if len(batch) == 1 or error.status not in OF_ONE_REQUEST:
            raise
        raise SearchRefusedError(
            f"{error} (the request held {len(batch)} queries; if the service accepts fewer, set "
            "search.options.max_batch)",
            status=error.status,
        ) from error


class _Attempts:
    """Counts the attempts of one call and computes the pause before the next."""

    def __init__(self, client: RetrievalClient, path: str) -> None:
        self.where, self.allowed, self.made = client.url + path, client.retries + 1, 0
        self.token = client.token

    def failed(self, reason: str, retry_after: str | None = None) -> float:
        """Pause before the next attempt, in seconds.

        Raises:
            SearchUnavailableError: no attempt is left.
        """
        self.made += 1
        if self.made >= self.allowed:
            attempts = f"{self.made} attempt{'s' if self.made > 1 else ''}"
            raise SearchUnavailableError(
                f"{self.where}: no answer after {attempts}; last fault: {reason}. "
                "Is the retrieval service running (agentic-r serve)?"
            )
        return pause_s(self.made, retry_after, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)

    def fault(self, error: Exception, timeout_s: float) -> float:
        """Pause before the next attempt, in seconds, after an attempt that got no answer.

        Raises:
            SearchUnavailableError: no attempt is left.
            SearchError: the request cannot be sent at all, or the answer cannot be decoded.
        """
        if isinstance(error, httpx.DecodingError):
            raise SearchError(f"{self.where}: malformed answer: {error}") from error
        if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
            raise SearchError(f"{self.where}: {redacted(str(error), self.token)}") from None
        return self.failed(redacted(_describe(error, timeout_s), self.token))

    def judge(self, status: int, headers: httpx.Headers, content: bytes) -> float | None:
        """None if the answer can be parsed, else the pause before the next attempt, in seconds.

        Raises:
            SearchUnavailableError: no attempt is left.
            SearchRefusedError: the service refuses this request permanently.
        """
        if status == 200:
            return None
        said = _error_message(content, self.token)
        if 300 <= status < 400 and "Location" in headers:
            said = f"it redirects to {headers['Location']}; give the address that answers itself"
        reason = redacted(f"HTTP {status}: {said}", self.token)
        if status in _RETRIED_STATUS:
            return self.failed(reason, headers.get("Retry-After"))
        raise SearchRefusedError(f"{self.where}: the service refused the request: {reason}", status=status)

    def parse(self, content: bytes) -> Any:
        """The JSON document of an answer."""
        try:
            return parse_json(content)
        except (ValueError, RecursionError) as error:
            found = _start(content.decode("utf-8", "replace"), self.token, 80)
            raise SearchError(f"{self.where}: malformed answer: expected JSON, found {found!r} ({error})") from None


def _base_url(url: str) -> str:
    refuse_secrets("the retrieval service's address", url, "give its token by the name of an environment variable")
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"retrieval service {url!r}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"retrieval service {url!r}: expected an address such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/retrieve")


def _describe(error: Exception, timeout_s: float) -> str:
    if isinstance(error, TimeoutError | asyncio.TimeoutError | httpx.TimeoutException):
        return f"no whole answer within {timeout_s:g} s"
    return f"{type(error).__name__}: {error}"


def _error_message(content: bytes, token: str | None) -> str:
    """The `message` of our error body, or the start of the body; without secrets."""
    try:
        error = json.loads(content)["error"]
        return redacted(f"{error['type']}: {error['message']}", token)
    except (ValueError, KeyError, TypeError, RecursionError):
        return _start(content.decode("utf-8", "replace"), token, 200) or "(empty body)"


def _start(text: str, token: str | None, length: int = 120) -> str:
    """The start of a text, without secrets; they are removed first, because a part of one is no longer recognised."""
    text = redacted(text, token)
    return text if len(text) <= length else f"{text[:length]}…"
