"""A model behind an OpenAI-compatible server (vLLM, SGLang, a hosted API): `/completions` and `/chat/completions`."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from agentic_r_plugin.config import FREE, fingerprint
from agentic_r_plugin.errors import BackendError, ConfigError, RequestRefusedError
from agentic_r_plugin.llm.base import Completion, Request, Sampling, Usage, row_seed
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.llm.rate import Pace
from agentic_r_plugin.search.wire import is_loopback

if TYPE_CHECKING:
    from agentic_r_plugin.backends import LLMSpec

Input = TypeVar("Input")
Output = TypeVar("Output")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0

_REFUSALS = (400, 413, 422)
"""Status of a request that is itself at fault: a prompt longer than the context, or one that a filter stops."""


class OpenAIBackend:
    """OpenAI-compatible server: vLLM or SGLang for agents, any for judges.

    Prompts are sent as token ids. Continuations are taken as token ids where the server gives them (vLLM's
    `return_token_ids`), else its text is tokenised, which is exact in text but may differ in ids: good for the data
    stages, not for training. The server must keep stop strings in its output (vLLM's `include_stop_str_in_output`,
    SGLang's `no_stop_trim`) or say what ended it (vLLM's `stop_reason`, SGLang's `matched_stop`). A server on this
    machine is reached without a proxy.

    Args:
        url: base URL, with `/v1`.
        model: the name the server knows.
        tokenizer: directory or name of the model's tokenizer; not needed for `chat` alone.
        api_key: sent as bearer token when given.
        concurrency: requests of this backend at the same time; each worker of a stage has a backend of its own.
        timeout_s: for one request.
        max_retries: further attempts after 429, 5xx, a timeout, a broken or cut connection, or an answer that is not
            what the protocol says (no JSON, no choice, nothing); waits double from 0.5 s to 30 s, or are as long as the
            server's `Retry-After`, 30 s at most.
        requests_per_minute: this backend begins no more; 0 is no limit. Repeated ones count too.
        usd_per_million_prompt_tokens, usd_per_million_cached_tokens, usd_per_million_generated_tokens: prices, for the
            cost report; cached prompt tokens cost as much as others unless their price is given.

    Raises:
        ConfigError: no url or no model.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What `LLMSpec.options` may hold."""

        requests_per_minute: float = field(default=0.0, metadata=FREE)
        usd_per_million_prompt_tokens: float = field(default=0.0, metadata=FREE)
        usd_per_million_cached_tokens: float | None = field(default=None, metadata=FREE)
        usd_per_million_generated_tokens: float = field(default=0.0, metadata=FREE)

    def __init__(
        self,
        url: str,
        model: str,
        *,
        tokenizer: str | Path = "",
        api_key: str | None = None,
        concurrency: int = 16,
        timeout_s: float = 120.0,
        max_retries: int = 5,
        requests_per_minute: float = 0.0,
        usd_per_million_prompt_tokens: float = 0.0,
        usd_per_million_cached_tokens: float | None = None,
        usd_per_million_generated_tokens: float = 0.0,
    ) -> None:
        if not url or not model:
            raise ConfigError(
                "llm: the openai backend needs llm.url (with /v1) and llm.model (the name the server knows)"
            )
        self.model, self._tokenizer, self._max_retries = model, str(tokenizer), max_retries
        self._concurrency = max(1, concurrency)
        self._codec: TokenizerCodec | None = None
        cached = usd_per_million_cached_tokens
        self._prices = (
            usd_per_million_prompt_tokens,
            usd_per_million_prompt_tokens if cached is None else cached,
            usd_per_million_generated_tokens,
        )
        self._pace = Pace(requests_per_minute / 60)
        self.usage, self._lock = Usage(), threading.Lock()
        self._client = httpx.Client(
            base_url=url.rstrip("/") + "/",
            timeout=timeout_s,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            limits=httpx.Limits(max_connections=self._concurrency),
            trust_env=not is_loopback(httpx.URL(url).host),
        )

    @classmethod
    def from_spec(cls, spec: LLMSpec) -> OpenAIBackend:
        """From the settings of a command; the key is read from the environment variable they name.

        Options: `requests_per_minute` (per worker) and the prices.

        Raises:
            ConfigError: another option.
        """
        known = {item.name for item in fields(cls.Options)}
        if unknown := sorted(set(spec.options) - known):
            raise ConfigError(f"llm.options: openai has no option {unknown[0]!r}; it has {', '.join(sorted(known))}")
        return cls(
            spec.url,
            spec.model,
            tokenizer=spec.tokenizer,
            api_key=os.environ.get(spec.api_key_env),
            concurrency=spec.concurrency,
            timeout_s=spec.timeout_s,
            max_retries=spec.max_retries,
            **spec.options,
        )

    @property
    def codec(self) -> TokenizerCodec:
        """The model's tokenizer, loaded when first needed.

        Raises:
            ConfigError: none was named, or it cannot be loaded.
        """
        if self._codec is None:
            from transformers import AutoTokenizer

            if not self._tokenizer:
                raise ConfigError("llm.tokenizer: the openai backend needs the agent's tokenizer directory")
            try:
                self._codec = TokenizerCodec(AutoTokenizer.from_pretrained(self._tokenizer))
            except (OSError, ValueError) as error:
                raise ConfigError(f"llm.tokenizer={self._tokenizer!r}: cannot be loaded: {error}") from error
        return self._codec

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion | RequestRefusedError]:
        """Continue every prompt; a refused one, such as one longer than the model's context, gives its refusal."""
        codec = self.codec  # loaded here, before the threads need it
        return self._all(lambda request: self._complete(request, sampling, codec), requests)

    def chat(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> list[str | RequestRefusedError]:
        """The reply to each message, or why the server refuses it."""
        settings = {"model": self.model, "max_tokens": max_tokens, "temperature": temperature}
        if seed is not None and temperature > 0:
            settings["seed"] = seed

        def reply(prompt: str) -> str:
            return self._post(
                "chat/completions", settings | {"messages": [{"role": "user", "content": prompt}]}, _message
            )

        return self._all(reply, prompts)

    def fingerprint(self) -> str:
        """Hash of the model's name; a server does not tell its weights."""
        return fingerprint("openai", self.model, self._tokenizer)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _all(self, function: Callable[[Input], Output], inputs: Sequence[Input]) -> list[Output | RequestRefusedError]:
        """`function` of each input, or its refusal, `concurrency` at a time; the first other error ends it all."""

        def one(item: Input) -> Output | RequestRefusedError:
            try:
                return function(item)
            except RequestRefusedError as error:
                return error

        with ThreadPoolExecutor(self._concurrency) as pool:
            futures = [pool.submit(one, item) for item in inputs]
            try:
                return [future.result() for future in futures]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _complete(self, request: Request, sampling: Sampling, codec: TokenizerCodec) -> Completion:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.seed is not None and sampling.temperature > 0:
            body["seed"] = row_seed(sampling.seed, request.prompt_ids)
        choice, text, cached = self._post("completions", body, _text_choice)
        ids = choice.get("token_ids")
        if not ids:
            ids = codec.encode(_with_stop(choice, text, sampling.stop)) or self._end_of_sequence(codec)
        return Completion(
            token_ids=tuple(ids[: request.max_tokens]),
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=cached,
        )

    def _end_of_sequence(self, codec: TokenizerCodec) -> list[int]:
        """What a model wrote that wrote nothing."""
        if codec.tokenizer.eos_token_id is None:
            raise BackendError(f"{self.model}: an empty continuation, and its tokenizer has no end-of-sequence token")
        return [int(codec.tokenizer.eos_token_id)]

    def _post(self, path: str, body: dict[str, Any], parse: Callable[[dict[str, Any]], Output]) -> Output:
        """One request with its retries; what `parse` makes of its answer.

        Raises:
            RequestRefusedError: the server does not take this request.
            BackendError: it takes none, or still fails after the last retry.
        """
        problem = ""
        for attempt in range(self._max_retries + 1):
            wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * random.uniform(0.75, 1.25)
            self._pace.wait()
            try:
                response = self._client.post(path, json=body)
                if response.status_code == 200:
                    answer = _json(response)
                    self._pay(_usage(answer))  # whatever it says, it was paid for
                    parsed = parse(answer)
                    self._count(attempt)
                    return parsed
                problem = f"HTTP {response.status_code}: {response.text[:300]}"
                if response.status_code in _REFUSALS:
                    raise RequestRefusedError(f"{response.url}: {problem}")
                if response.status_code not in (408, 429) and response.status_code < 500:
                    raise BackendError(f"{response.url}: {problem}")
                wait = _retry_after(response, wait)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
            except _NotAsAskedError as error:
                problem = str(error)
            if attempt < self._max_retries:
                time.sleep(wait)
        raise BackendError(f"{self._client.base_url}{path}: {problem} (tried {self._max_retries + 1} times)")

    def _count(self, attempt: int) -> None:
        with self._lock:
            self.usage.requests += 1
            self.usage.retried += attempt

    def _pay(self, usage: tuple[int, int, int]) -> None:
        prompt, cached, generated = usage
        with self._lock:
            self.usage.prompt_tokens += prompt
            self.usage.cached_tokens += cached
            self.usage.generated_tokens += generated
            paid = (prompt - cached, cached, generated)
            self.usage.usd += sum(tokens * price for tokens, price in zip(paid, self._prices, strict=True)) / 1e6


class _NotAsAskedError(Exception):
    """An answer with status 200 that is not what the protocol says; it may be right the next time."""


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError as error:
        raise _NotAsAskedError(f"expected JSON, found {response.text[:300]!r}") from error
    if not isinstance(answer, dict):
        raise _NotAsAskedError(f"expected a JSON object, found {response.text[:300]!r}")
    return answer


def _choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise _NotAsAskedError(f"expected one choice in the server's answer, found {str(answer)[:300]}")
    return choices[0]


def _message(answer: dict[str, Any]) -> str:
    """Text of a chat completion; none where the model was cut while it reasoned, or a filter took it: null."""
    match _choice(answer).get("message"):
        case {"content": None}:
            return ""
        case {"content": str(text)}:
            return _whole(text)
    raise _NotAsAskedError(f"expected a message with text, found {str(answer)[:300]}")


def _text_choice(answer: dict[str, Any]) -> tuple[dict[str, Any], str, int]:
    """The choice of a completion, its text, and the prompt tokens that were cached."""
    choice = _choice(answer)
    if not isinstance(choice.get("text"), str):
        raise _NotAsAskedError(f"expected a choice with text, found {str(answer)[:300]}")
    return choice, _whole(choice["text"]), _usage(answer)[1]


def _whole(text: str) -> str:
    """Text with U+FFFD for halves of surrogate pairs, as tokenizers decode half a character; no file can hold them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _with_stop(choice: dict[str, Any], text: str, stop: tuple[str, ...]) -> str:
    """The text of a choice with the stop string that ended it, which the server may have left out.

    What ended it is a stop string, a token's id, or null for the end-of-sequence token (vLLM, SGLang for a cut text).

    Raises:
        BackendError: the model stopped by itself, no stop string ends the text, and the server does not say why: a
            stop string may be lost, and with it a search or an answer.
    """
    if text.endswith(stop):
        return text
    told = [choice[name] for name in ("stop_reason", "matched_stop") if name in choice]
    if met := next((reason for reason in told if reason in stop), None):
        return text + str(met)
    if stop and not told and choice.get("finish_reason") == "stop":
        raise BackendError(
            "llm: expected a server that keeps stop strings (include_stop_str_in_output, no_stop_trim) or says what "
            f"ended a completion (stop_reason, matched_stop), found neither in {str(choice)[:300]}; use vLLM or SGLang"
        )
    return text


def _usage(answer: dict[str, Any]) -> tuple[int, int, int]:
    """(prompt, cached, generated) tokens, 0 where the server does not tell."""
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    return tuple(  # type: ignore[return-value]
        value if isinstance(value, int) else 0
        for value in (usage.get("prompt_tokens"), cached, usage.get("completion_tokens"))
    )


def _retry_after(response: httpx.Response, otherwise: float) -> float:
    text = response.headers.get("Retry-After", "")
    return min(_LONGEST_WAIT_S, float(text)) if text.isdigit() else otherwise
