"""A model behind an OpenAI-compatible server (vLLM, SGLang, a hosted API): `/completions` and `/chat/completions`."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx

from agentic_r_plugin.config import FREE, fingerprint
from agentic_r_plugin.credentials import authorization, read_secret, redacted, shown
from agentic_r_plugin.errors import BackendConfigError, BackendError, ConfigError, RequestRefusedError
from agentic_r_plugin.llm.base import Completion, Request, Sampling, Usage, row_seed
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.llm.rate import Pace
from agentic_r_plugin.llm.refusals import Refusal, named_fields, refusal
from agentic_r_plugin.llm.reply import Reply
from agentic_r_plugin.search.wire import is_loopback

if TYPE_CHECKING:
    from agentic_r_plugin.backends import LLMSpec

Input = TypeVar("Input")
Output = TypeVar("Output")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0

_REFUSALS = (400, 401, 403, 404, 405, 413, 415, 422)
"""Status of a request that is refused for good: for its prompt, or for its form (`llm.refusals`)."""

_UNCLEAR = 8
"""Requests refused without a clear reason, none taken before, after which their form is taken to be at fault."""

_DETECT_S = 5.0

_BODY = frozenset(
    {
        # OpenAI
        "temperature", "top_p", "seed", "frequency_penalty", "presence_penalty", "logit_bias", "max_completion_tokens",
        "metadata", "prompt_cache_key", "reasoning_effort", "response_format", "safety_identifier", "service_tier",
        "store", "user", "verbosity",
        # vLLM, SGLang, llama.cpp, Ollama
        "chat_template", "chat_template_kwargs", "min_p", "top_k", "typical_p", "min_tokens", "repetition_penalty",
        "length_penalty", "bad_words", "ignore_eos", "stop_token_ids", "include_reasoning", "separate_reasoning",
        "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
        "guided_decoding_backend", "grammar", "json_schema", "regex", "ebnf", "logits_processors", "priority",
        "cache_salt", "truncate_prompt_tokens",
        "skip_special_tokens", "spaces_between_special_tokens", "thinking_token_budget", "reasoning_format",
        "thinking_forced_open", "cache_prompt", "id_slot", "repeat_penalty", "think", "keep_alive", "num_ctx",
        # hosted ones
        "thinking", "enable_thinking", "thinking_budget", "reasoning", "provider", "models", "route", "transforms",
        "safe_prompt", "random_seed",
    }
)  # fmt: skip
"""Further fields of a request's body that `llm.options` may name directly; any other goes into `extra_body`."""

_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Sampling that changes nothing. What is not sent, vLLM and SGLang fill in from the model's generation_config.json."""

_OWNERS = ("vllm", "sglang")
"""What the servers that know `_NEUTRAL` call the owner of their models."""


class OpenAIBackend:
    """OpenAI-compatible server: vLLM or SGLang for agents, any for judges.

    Prompts are sent as token ids. Continuations are taken as token ids where the server gives them (vLLM's
    `return_token_ids`), else its text is tokenised, which is exact in text but may differ in ids: good for the data
    stages, not for training. The server must keep stop strings in its output (vLLM's `include_stop_str_in_output`,
    SGLang's `no_stop_trim`) or say what ended it (vLLM's `stop_reason`, SGLang's `matched_stop`). A server on this
    machine is reached without a proxy. The server's own sampling defaults are overruled by neutral values, in chats
    only where the server says that it is vLLM or SGLang: others refuse fields that they do not know.

    Args:
        url: base URL, with `/v1`.
        model: the name the server knows.
        tokenizer: directory or name of the model's tokenizer; not needed for `chat` alone.
        api_key: sent as bearer token when given, or as it is where it begins with `Basic `.
        api_key_env: the variable it was read from, for errors.
        concurrency: requests of this backend at the same time; each worker of a stage has a backend of its own.
        timeout_s: for one request.
        max_retries: further attempts after 429, 5xx, a timeout, a broken or cut connection, or an answer that is not
            what the protocol says (no JSON, no choice, nothing); waits double from 0.5 s to 30 s, or are as long as the
            server's `Retry-After`, 30 s at most.
        requests_per_minute: this backend begins no more; 0 is no limit. Repeated ones count too.
        body: further fields of every request's body, which win over ours; None leaves a field out.
            `max_completion_tokens` takes the place of `max_tokens` in chats, with the stage's number where it is True.
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
        api_key_env: str = "",
        concurrency: int = 16,
        timeout_s: float = 120.0,
        max_retries: int = 5,
        requests_per_minute: float = 0.0,
        body: Mapping[str, Any] | None = None,
        usd_per_million_prompt_tokens: float = 0.0,
        usd_per_million_cached_tokens: float | None = None,
        usd_per_million_generated_tokens: float = 0.0,
    ) -> None:
        if not url or not model:
            raise ConfigError(
                "llm: the openai backend needs llm.url (with /v1) and llm.model (the name the server knows)"
            )
        self.model, self._tokenizer, self._max_retries = model, str(tokenizer), max_retries
        self._concurrency, self._timeout_s = max(1, concurrency), timeout_s
        self._api_key, self._api_key_env, self._body = api_key, api_key_env, dict(body or {})
        self._owner: str | None = None
        self._accepted, self._unclear = False, 0
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
            headers=authorization(api_key),
            limits=httpx.Limits(max_connections=self._concurrency),
            trust_env=not is_loopback(httpx.URL(url).host),
        )

    @classmethod
    def from_spec(cls, spec: LLMSpec) -> OpenAIBackend:
        """From the settings of a command; the key is read from the environment variable they name.

        Options: `requests_per_minute` (per worker), the prices, and further fields of the request's body: those that
        servers are known to take by their own name (`_BODY`), any others in `extra_body`.

        Raises:
            ConfigError: another option; a variable that does not hold a key.
        """
        known = {item.name for item in fields(cls.Options)}
        if unknown := sorted(set(spec.options) - known - _BODY - {"extra_body"}):
            raise ConfigError(
                f"llm.options: openai has no option {unknown[0]!r}; it has {', '.join(sorted(known))}, usual fields of "
                f"a request's body, and extra_body for others (llm.options.extra_body.{unknown[0]}=...)"
            )
        body = {name: value for name, value in spec.options.items() if name in _BODY}
        body |= spec.options.get("extra_body") or {}
        if taken := sorted(_OURS.keys() & body):
            raise ConfigError(f"llm.options: {taken[0]!r} is no option; it is set by {_OURS[taken[0]]}")
        # By default the variable may be missing: a server of one's own wants no key.
        required = spec.api_key_env != "OPENAI_API_KEY"
        return cls(
            spec.url,
            spec.model,
            tokenizer=spec.tokenizer,
            api_key=read_secret(spec.api_key_env, "llm.api_key_env", required=required),
            api_key_env=spec.api_key_env,
            concurrency=spec.concurrency,
            timeout_s=spec.timeout_s,
            max_retries=spec.max_retries,
            body=body,
            **{name: value for name, value in spec.options.items() if name in known},
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
    ) -> list[Reply | RequestRefusedError]:
        """The reply to each message, or why the server refuses it."""
        settings: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "temperature": temperature}
        if seed is not None and temperature > 0:
            settings["seed"] = seed
        if self._served_by() in _OWNERS:
            settings |= _NEUTRAL | {"top_p": 1.0}
        settings = self._with_options(settings, chat=True)

        def reply(prompt: str) -> Reply:
            messages = [{"role": "user", "content": prompt}]
            return self._post("chat/completions", settings | {"messages": messages}, _message)

        return self._all(reply, prompts)

    def fingerprint(self) -> str:
        """Hash of the model's name; a server does not tell its weights."""
        return fingerprint("openai", self.model, self._tokenizer)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _all(self, function: Callable[[Input], Output], inputs: Sequence[Input]) -> list[Output | RequestRefusedError]:
        """`function` of each input, or its refusal, `concurrency` at a time; the first other error ends it all."""
        failed: list[BackendError] = []

        def one(item: Input) -> Output | RequestRefusedError:
            if failed:  # what waited in the pool begins before it can be cancelled
                raise failed[0]
            try:
                return function(item)
            except RequestRefusedError as error:
                return error
            except BackendError as error:
                failed.append(error)
                raise

        with ThreadPoolExecutor(self._concurrency) as pool:
            futures = [pool.submit(one, item) for item in inputs]
            try:
                results = [future.result() for future in futures]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if results and not self._accepted and self._unclear >= _UNCLEAR:
            raise BackendConfigError(
                f"{results[0]}. None of the first {self._unclear} requests was taken, so the fault is their form, not "
                f"their prompts: {_HINT}"
            )
        return results

    def _served_by(self) -> str:
        """Who owns the server's models, by its own list of them: `vllm`, `sglang`, another name, or nothing."""
        with self._lock:
            if self._owner is None:
                try:
                    models = self._client.get("models", timeout=min(_DETECT_S, self._timeout_s)).json()["data"]
                    self._owner = str(models[0]["owned_by"]).lower()
                except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
                    self._owner = ""  # where the server is at fault, the request that follows says so
            return self._owner

    def _with_options(self, body: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
        """A request's body with the further fields of `llm.options`; an agent's continuation keeps its own length."""
        given = dict(self._body)
        most = given.pop("max_completion_tokens", None)
        if chat and most:
            given |= {"max_tokens": None, "max_completion_tokens": body["max_tokens"] if most is True else most}
        return {name: value for name, value in {**body, **given}.items() if given.get(name, value) is not None}

    def _complete(self, request: Request, sampling: Sampling, codec: TokenizerCodec) -> Completion:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(request.prompt_ids),
            "max_tokens": request.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **_NEUTRAL,
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
        choice, text, cached = self._post("completions", self._with_options(body, chat=False), _text_choice)
        ids = choice.get("token_ids")
        if not ids:
            ids = codec.encode(_with_stop(choice, text, sampling.stop)) or self._end_of_sequence(codec)
        return Completion(
            token_ids=tuple(ids[: request.max_tokens]),
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=cached,
            cut=choice.get("finish_reason") in _CUT,
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
            BackendConfigError: it takes no request of this form.
            BackendError: it still fails after the last retry, or in a way that no retry mends.
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
                said = " ".join(redacted(response.text, self._api_key).split())
                problem = f"HTTP {response.status_code}: {said[:300]}"
                if response.status_code in _REFUSALS:
                    raise self._refused(response, body, problem)
                if response.status_code in (501, 505) or not (
                    response.status_code in (408, 429) or response.is_server_error
                ):
                    raise BackendError(f"{self._where(path)}: {problem}")
                wait = _retry_after(response, wait)
            except (httpx.LocalProtocolError, httpx.UnsupportedProtocol) as error:  # no retry mends our own request
                raise BackendError(f"{self._where(path)}: {redacted(str(error), self._api_key)}") from None
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {redacted(str(error), self._api_key)}"
            except _NotAsAskedError as error:
                problem = str(error)
            if attempt < self._max_retries:
                time.sleep(wait)
        raise BackendError(f"{self._where(path)}: {problem} (tried {self._max_retries + 1} times)")

    def _where(self, path: str) -> str:
        return redacted(f"{self._client.base_url}{path}", self._api_key)

    def _refused(self, response: httpx.Response, body: Mapping[str, Any], problem: str) -> BackendError:
        """What a refusal is: of this prompt, or of all requests of this form, with the setting to change."""
        where = redacted(str(response.url), self._api_key)
        kind = refusal(response.status_code, response.text)
        if kind is not Refusal.FORM:
            with self._lock:
                self._unclear += kind is Refusal.UNCLEAR
            return RequestRefusedError(f"{where}: {problem}")
        if response.status_code in (401, 403):
            state = "a key was sent" if self._api_key else "no key was sent"
            hint = f"{state}; llm.api_key_env names the variable that holds it ({shown(self._api_key_env)})"
        elif response.status_code in (404, 405):
            hint = f"llm.url (with /v1) or llm.model={self.model!r} is not what the server knows"
        else:
            hint = "; ".join(
                _WAYS_OUT.get(name, f"change llm.options.{name}, or leave it out")
                for name in named_fields(response.text, (*_WAYS_OUT, *self._body))
                if name in body
            )
        return BackendConfigError(f"{where}: {problem}. The server takes no request of this form: {hint or _HINT}")

    def _count(self, attempt: int) -> None:
        with self._lock:
            self._accepted = True
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


_THOUGHTS = ("reasoning_content", "reasoning")
_CUT = ("length", "max_tokens")
"""Finish reasons of a text that is not whole."""

_OURS = {
    "model": "llm.model",
    "messages": "the prompt files",
    "prompt": "the agent protocol",
    "stop": "the agent protocol",
    "max_tokens": "the stage's or the scorer's max_tokens, and by limits of an agent",
    "n": "the stages, which want one reply per prompt",
    "stream": "the stages, which want whole replies",
}
"""Fields of a request's body that no option may change, and what sets them."""

_WAYS_OUT = {
    "temperature": "llm.options.temperature=null sends no temperature",
    "top_p": "llm.options.top_p=null sends no top_p",
    "seed": "llm.options.seed=null sends no seed",
    "max_tokens": "llm.options.max_completion_tokens=true sends max_completion_tokens in place of max_tokens",
}
_HINT = (
    "look at llm.model, llm.url and llm.options; fields given there are sent as they are, null leaves one of ours out"
)


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


def _message(answer: dict[str, Any]) -> Reply:
    """Text of a chat completion; nothing where there is a thought only.

    Raises:
        RequestRefusedError: the model, or a filter behind it, declines to answer.
    """
    choice = _choice(answer)
    message = choice.get("message")
    if not isinstance(message, dict) or not ("content" in message or any(message.get(name) for name in _THOUGHTS)):
        raise _NotAsAskedError(f"expected a message with text, found {str(answer)[:300]}")
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        raise RequestRefusedError(f"no reply: {message.get('refusal') or 'finish_reason content_filter'}"[:300])
    text = _text(message.get("content"))
    if text is None:
        raise _NotAsAskedError(f"expected a message with text, found {str(answer)[:300]}")
    return Reply(_whole(text), cut=choice.get("finish_reason") in _CUT)


def _text(content: Any) -> str | None:
    """Text of a message's content, a string or a list of parts, those that are thoughts left out; None: neither."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        parts = [part.get("text") for part in content if part.get("type", "text") in ("text", "output_text")]
        return "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else None
    return content if isinstance(content, str) else None


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
