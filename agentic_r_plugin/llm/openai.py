"""Backend for OpenAI-compatible servers (vLLM, SGLang, hosted APIs): `/completions` and `/chat/completions`.

Not on the `openai` SDK: its retries leave no place for the pace between attempts, repeat requests that a server refuses
for good (429 above the limit of a minute, 501), and take an error sent with status 200 as an answer. With its retries
off, the loop in `_post` would remain, and the SDK would be a layer between it and httpx.
"""

from __future__ import annotations

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
from agentic_r_plugin.llm import openai_answers as answers
from agentic_r_plugin.llm.base import Completion, Continuation, Likelihood, Request, Sampling, Usage, row_seed
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.llm.refusals import Refusal, named_fields, refusal
from agentic_r_plugin.llm.reply import Reply
from agentic_r_plugin.net import Pace, is_loopback, pause_s

if TYPE_CHECKING:
    from agentic_r_plugin.backends import LLMSpec

Input = TypeVar("Input")
Output = TypeVar("Output")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0

_REFUSALS = (400, 401, 403, 404, 405, 413, 415, 422)
"""HTTP status codes of a permanent refusal, caused by the prompt or by the form of the request (`llm.refusals`)."""

_UNCLEAR = 8
"""If none was accepted, this many refusals without a clear reason are blamed on the form of the requests."""

# Timeout of the request for the model list (`_served_by`).
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
        "thinking_forced_open", "cache_prompt", "id_slot", "repeat_penalty",
        # hosted APIs
        "thinking", "enable_thinking", "thinking_budget", "reasoning", "provider", "models", "route", "transforms",
        "safe_prompt", "random_seed",
    }
)  # fmt: skip
"""Additional body fields that `llm.options` accepts by name; any other field must go into `extra_body`."""

_OF_OLLAMA = {
    "num_ctx": "start the server with OLLAMA_CONTEXT_LENGTH, or set `PARAMETER num_ctx` in a Modelfile",
    "keep_alive": "start the server with OLLAMA_KEEP_ALIVE",
    "think": "set llm.options.reasoning_effort",
}
"""Fields of Ollama's own API, which its `/v1` ignores, and what has their effect there."""

_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
"""Sampling parameters with no effect. vLLM and SGLang fill in omitted ones from the model's generation_config.json."""

_OWNERS = ("vllm", "sglang")
"""Values of `owned_by` in the model lists of the servers that support `_NEUTRAL`."""


class OpenAIBackend:
    """OpenAI-compatible server: vLLM or SGLang for agents, any for judges.

    Prompts are sent as token ids. Continuations are read as token ids if the server returns them (vLLM's
    `return_token_ids`). Otherwise the text is tokenised, which preserves the text but may give different ids: suitable
    for the data stages, but not for training. The server must keep stop strings in its output (vLLM's
    `include_stop_str_in_output`, SGLang's `no_stop_trim`) or report what ended it (vLLM's `stop_reason`, SGLang's
    `matched_stop`). Servers on this machine are reached without a proxy. Neutral values override the server's own
    sampling defaults; in chats only if the server identifies itself as vLLM or SGLang, because other servers reject
    unknown fields.

    Args:
        url: base URL, including `/v1`.
        model: name of the model on the server.
        tokenizer: directory or name of the model's tokenizer; not needed if only `chat` is used.
        api_key: sent as a bearer token if given, or unchanged if it starts with `Basic `.
        api_key_env: the variable that held the key, for error messages.
        concurrency: maximum number of concurrent requests; each worker of a stage has its own backend.
        timeout_s: timeout of one request.
        max_retries: further attempts after 429, 5xx, a timeout, a broken connection, or a malformed answer (no JSON,
            no choice, empty). Pauses double from 0.5 s to 30 s, or follow the server's `Retry-After`, up to 60 s.
        body: additional body fields, which override ours; None omits a field. `max_completion_tokens` replaces
            `max_tokens` in chats; if it is True, it takes the value of the stage's `max_tokens`.
        options: as in `Options`.

    Raises:
        ConfigError: no url, no model, or a url that is not the base URL of a server.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """What `LLMSpec.options` may hold."""

        requests_per_minute: float = field(default=0.0, metadata=FREE)
        """Limit on the requests started by this backend, retries included; 0: no limit."""
        usd_per_million_prompt_tokens: float = field(default=0.0, metadata=FREE)
        usd_per_million_cached_tokens: float | None = field(default=None, metadata=FREE)
        """None: the price of other prompt tokens."""
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
        body: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not url or not model:
            raise ConfigError(
                "llm: the openai backend needs llm.url (with /v1) and llm.model (the name the server knows)"
            )
        _check_url(url)
        self.model, self._tokenizer, self._max_retries = model, str(tokenizer), max_retries
        self._concurrency, self._timeout_s = max(1, concurrency), timeout_s
        self._api_key, self._api_key_env, self._body = api_key, api_key_env, dict(body or {})
        self._owner: str | None = None
        self._accepted: set[tuple[str, ...]] = set()  # forms of requests: path and names of the fields
        self._unclear = 0
        self._codec: TokenizerCodec | None = None
        given = self.Options(**options)
        prompt, cached = given.usd_per_million_prompt_tokens, given.usd_per_million_cached_tokens
        self._prices = (prompt, prompt if cached is None else cached, given.usd_per_million_generated_tokens)
        self._pace = Pace(given.requests_per_minute / 60)
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
        """Create the backend from a command's settings; the key is read from the environment variable they name.

        Options are `requests_per_minute` (per worker), the prices, and additional body fields: common ones (`_BODY`) by
        name, all others in `extra_body`.

        Raises:
            ConfigError: an unknown option, or a variable that does not hold a key.
        """
        known = {item.name for item in fields(cls.Options)}
        if ignored := sorted(_OF_OLLAMA.keys() & spec.options):
            raise ConfigError(f"llm.options.{ignored[0]}: Ollama ignores it under /v1; {_OF_OLLAMA[ignored[0]]}")
        if unknown := sorted(set(spec.options) - known - _BODY - {"extra_body"}):
            raise ConfigError(
                f"llm.options: openai has no option {unknown[0]!r}; it has {', '.join(sorted(known))}, usual fields of "
                f"a request's body, and extra_body for others (llm.options.extra_body.{unknown[0]}=...)"
            )
        body = {name: value for name, value in spec.options.items() if name in _BODY}
        body |= spec.options.get("extra_body") or {}
        if taken := sorted(_OURS.keys() & body):
            raise ConfigError(f"llm.options: {taken[0]!r} is no option; it is set by {_OURS[taken[0]]}")
        # The default variable may be unset, because self-hosted servers usually need no key.
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
        """The model's tokenizer, loaded on first use.

        Raises:
            ConfigError: no tokenizer is configured, or it cannot be loaded.
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
        """Continue every prompt; a refused prompt (for example, longer than the context) yields its refusal."""
        codec = self.codec  # loaded before the threads use it
        return self._all(lambda request: self._complete(request, sampling, codec), requests)

    def likelihoods(self, continuations: Sequence[Continuation]) -> list[Likelihood | RequestRefusedError]:
        """Likelihood of every continuation, from servers that echo the prompt with log-probabilities (vLLM, SGLang).

        Raises:
            BackendError: as `generate`, or the server sends no log-probabilities of the prompt.
        """
        return self._all(self._likelihood, continuations)

    def chat(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> list[Reply | RequestRefusedError]:
        """Return the reply to each message, or its refusal."""
        settings: dict[str, Any] = {"model": self.model, "max_tokens": max_tokens, "temperature": temperature}
        if seed is not None and temperature > 0:
            settings["seed"] = seed
        if self._served_by() in _OWNERS:
            settings |= _NEUTRAL | {"top_p": 1.0}
        settings = self._with_options(settings, chat=True)

        def reply(prompt: str) -> Reply:
            messages = [{"role": "user", "content": prompt}]
            return self._post("chat/completions", settings | {"messages": messages}, answers.message_of)

        return self._all(reply, prompts)

    def fingerprint(self) -> str:
        """Hash of the model's and tokenizer's names; servers do not identify their weights."""
        return fingerprint("openai", self.model, self._tokenizer)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _all(self, function: Callable[[Input], Output], inputs: Sequence[Input]) -> list[Output | RequestRefusedError]:
        """Apply `function` to each input, `concurrency` at a time; return refusals in place, stop at other errors."""
        failed: list[BackendError] = []

        def one(item: Input) -> Output | RequestRefusedError:
            if failed:  # queued inputs may start before they are cancelled
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
                # Cancels what has not started; the end of the `with` block waits for the requests under way.
                pool.shutdown(wait=False, cancel_futures=True)
        if results and not self._accepted and self._unclear >= _UNCLEAR:
            raise BackendConfigError(
                f"{results[0]}. None of the first {self._unclear} requests was taken, so their form is at fault, not "
                f"their prompts: {_HINT}"
            )
        return results

    def _served_by(self) -> str:
        """Owner of the server's models according to its model list: `vllm`, `sglang`, another name, or empty.

        After a transient failure, as of a server that still loads its model, the next call asks again.
        """
        with self._lock:
            if self._owner is None:
                try:
                    response = self._client.get("models", timeout=min(_DETECT_S, self._timeout_s))
                    if response.status_code in (408, 429) or response.is_server_error:
                        return ""  # if the server is faulty, the next request reports it
                    self._owner = str(response.json()["data"][0]["owned_by"]).lower()
                except httpx.HTTPError:
                    return ""
                except (ValueError, KeyError, IndexError, TypeError):
                    # Not a model list of this form: asking again would not help.
                    self._owner = ""
            return self._owner

    def _with_options(self, body: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
        """Add the body fields of `llm.options`; `max_completion_tokens` applies to chats only, not to agents."""
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
            # Stop strings end a search or an answer and may be special tokens: both must stay in the output.
            "include_stop_str_in_output": True,
            "no_stop_trim": True,
            "skip_special_tokens": False,
            "return_token_ids": True,
        }
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.seed is not None and sampling.temperature > 0:
            body["seed"] = row_seed(sampling.seed, request.prompt_ids)
        choice, text, cached = self._post("completions", self._with_options(body, chat=False), answers.text_choice)
        ids = choice.get("token_ids")
        if not ids:
            ids = codec.encode(self._with_stop(choice, text, sampling.stop))
        # An empty text is an end of sequence only if the model stopped by itself.
        if not ids and answers.is_cut(choice):
            raise RequestRefusedError(f"no continuation: finish_reason {str(choice['finish_reason'])[:80]}")
        ids = ids or self._end_of_sequence(codec)
        return Completion(
            # Text that was tokenised again may have more ids than the model generated.
            token_ids=tuple(ids[: request.max_tokens]),
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=cached,
            cut=answers.is_cut(choice),
        )

    def _likelihood(self, continuation: Continuation) -> Likelihood:
        ids = list(continuation.ids)
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
        choice, _, cached = self._post("completions", self._with_options(body, chat=False), answers.text_choice)
        logprobs = choice.get("logprobs")
        given = (logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None) or []
        # The echo also holds the one generated token, which is not scored.
        found = given[len(continuation.prompt_ids) : len(ids)]
        if len(found) < len(continuation.token_ids) or not all(isinstance(value, int | float) for value in found):
            raise BackendError(
                f"llm: expected log-probabilities of the {len(ids)} prompt tokens (echo and logprobs of /completions), "
                f"found {len(given)} in {self._brief(str(choice))}; use vLLM or SGLang"
            )
        return Likelihood(logprobs=tuple(map(float, found)), prompt_tokens=len(ids), cached_tokens=cached)

    def _with_stop(self, choice: dict[str, Any], text: str, stop: tuple[str, ...]) -> str:
        """Text of a choice, with the stop string that ended it restored if the server removed it.

        The reported reason is a stop string, a token id, or null (in vLLM for the end-of-sequence token, in SGLang for
        a cut text).

        Raises:
            BackendError: the model stopped, no stop string ends the text, and the server does not report why. A stop
                string, and with it a search or an answer, may be lost.
        """
        if text.endswith(stop):
            return text
        reported = [choice[name] for name in ("stop_reason", "matched_stop") if name in choice]
        if met := next((reason for reason in reported if reason in stop), None):
            return text + str(met)
        if stop and not reported and answers.finish_reason(choice) in ("stop", "stop_sequence"):
            raise BackendError(
                "llm: expected a server that keeps stop strings (include_stop_str_in_output, no_stop_trim) or says "
                "what ended a completion (stop_reason, matched_stop), found neither in "
                f"{self._brief(str(choice))}; use vLLM or SGLang"
            )
        return text

    def _end_of_sequence(self, codec: TokenizerCodec) -> list[int]:
        """Ids of an empty continuation: the end-of-sequence token."""
        if codec.tokenizer.eos_token_id is None:
            raise BackendError(f"{self.model}: an empty continuation, and its tokenizer has no end-of-sequence token")
        return [int(codec.tokenizer.eos_token_id)]

    def _post(self, path: str, body: dict[str, Any], parse: Callable[[dict[str, Any]], Output]) -> Output:
        """Send one request with retries; return its answer after `parse`.

        Raises:
            RequestRefusedError: the server refuses this request.
            BackendConfigError: the server refuses every request of this form.
            BackendError: the last retry failed, or the error is permanent.
        """
        form = (path, *sorted(body))
        for attempt in range(self._max_retries + 1):
            self._pace.wait()
            try:
                parsed = self._attempt(path, body, form, parse)
            except _TransientError as error:
                problem = error
            else:
                self._count(attempt, form)
                return parsed
            if attempt < self._max_retries:
                retry_after = problem.retry_after
                time.sleep(pause_s(attempt + 1, retry_after, first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S))
        # Some servers report a prompt that is too long as a failure of the server (500).
        failure = RequestRefusedError if problem.of_prompt else BackendError
        raise failure(f"{self._where(path)}: {problem} (tried {self._max_retries + 1} times)")

    def _attempt(
        self, path: str, body: dict[str, Any], form: tuple[str, ...], parse: Callable[[dict[str, Any]], Output]
    ) -> Output:
        """Send a request once; errors as of `_post`, and `_TransientError`."""
        try:
            response = self._client.post(path, json=body)
            status = response.status_code
            if status == 200:
                answer = answers.json_of(response)
                self._pay(answers.token_counts(answer))  # billed even if the answer cannot be parsed
                if (status := answers.status_of(answer)) == 200:
                    return parse(answer)
        except (httpx.LocalProtocolError, httpx.UnsupportedProtocol) as error:  # invalid request: no retry
            raise BackendError(f"{self._where(path)}: {redacted(str(error), self._api_key)}") from None
        except httpx.TransportError as error:
            raise _TransientError(f"{type(error).__name__}: {redacted(str(error), self._api_key)}") from None
        except answers.NotAsAskedError as error:
            raise _TransientError(self._brief(str(error))) from None
        except answers.DeclinedError as error:
            raise RequestRefusedError(f"no reply: {self._brief(str(error))}") from None
        raise self._failure(path, status, response, body, form)

    def _failure(
        self, path: str, status: int, response: httpx.Response, body: Mapping[str, Any], form: tuple[str, ...]
    ) -> Exception:
        """The error for a status other than 200."""
        problem, kind = f"HTTP {status}: {self._brief(response.text)}", refusal(status, response.text)
        # A form that was accepted before is right: the fault is the prompt's, or a router's.
        routed = False
        if kind is Refusal.FORM and form in self._accepted:
            kind, routed = Refusal.UNCLEAR if status in (400, 422) else kind, status == 404
        if status in _REFUSALS and not routed:
            return self._refused(status, kind, response, body, problem)
        of_prompt = kind is Refusal.PROMPT
        if status == 429 and of_prompt:  # larger than the limit of a whole minute
            return RequestRefusedError(f"{self._where(path)}: {problem}")
        # 501 and 505 are permanent, unlike other 5xx.
        if status in (501, 505) or not (status in (404, 408, 429) or status >= 500):
            return BackendError(f"{self._where(path)}: {problem}")
        return _TransientError(problem, of_prompt=of_prompt, retry_after=response.headers.get("Retry-After"))

    def _brief(self, text: str) -> str:
        """The start of a server's text, without secrets; removed first, because a part of one is not recognised."""
        return " ".join(redacted(text, self._api_key).split())[:400]

    def _where(self, path: str) -> str:
        return redacted(f"{self._client.base_url}{path}", self._api_key)

    def _refused(
        self, status: int, kind: Refusal, response: httpx.Response, body: Mapping[str, Any], problem: str
    ) -> BackendError:
        """Build the error for a refusal of this prompt, or of every request of this form (naming the setting)."""
        where = redacted(str(response.url), self._api_key)
        if kind is not Refusal.FORM:
            with self._lock:
                self._unclear += kind is Refusal.UNCLEAR
            return RequestRefusedError(f"{where}: {problem}")
        if status in (401, 403):
            state = "a key was sent" if self._api_key else "no key was sent"
            hint = f"{state}; llm.api_key_env names the variable that holds it ({shown(self._api_key_env)})"
        elif status in (404, 405):
            hint = f"llm.url (with /v1) or llm.model={self.model!r} is not what the server knows"
        else:
            hint = "; ".join(
                _WAYS_OUT.get(name, f"change llm.options.{name}, or leave it out")
                for name in named_fields(response.text, (*_WAYS_OUT, *self._body))
                if name in body
            )
        return BackendConfigError(f"{where}: {problem}. The server refuses every request of this form: {hint or _HINT}")

    def _count(self, attempt: int, form: tuple[str, ...]) -> None:
        with self._lock:
            self._accepted.add(form)
            self.usage.requests += 1
            self.usage.retried += attempt

    def _pay(self, usage: tuple[int, int | None, int]) -> None:
        prompt, reported, generated = usage
        cached = reported or 0
        with self._lock:
            self.usage.prompt_tokens += prompt
            self.usage.cache_unknown_tokens += prompt if reported is None else 0
            self.usage.cached_tokens += cached
            self.usage.generated_tokens += generated
            paid = (prompt - cached, cached, generated)
            self.usage.usd += sum(tokens * price for tokens, price in zip(paid, self._prices, strict=True)) / 1e6


_OURS = {
    "model": "llm.model",
    "messages": "the prompt files",
    "prompt": "the agent protocol",
    "stop": "the agent protocol",
    "max_tokens": "the stage's or the scorer's max_tokens, and by limits of an agent",
    "n": "the stages, which want one reply per prompt",
    "stream": "the stages, which want whole replies",
}
"""Body fields that options cannot change, and what sets them."""

_WAYS_OUT = {
    "temperature": "llm.options.temperature=null sends no temperature",
    "top_p": "llm.options.top_p=null sends no top_p",
    "seed": "llm.options.seed=null sends no seed",
    "max_tokens": "llm.options.max_completion_tokens=true sends max_completion_tokens in place of max_tokens",
}
_HINT = "check llm.model, llm.url and llm.options; fields in llm.options are sent unchanged, and null omits one of ours"


class _TransientError(Exception):
    """A failure after which another attempt may succeed; whether it is the prompt's, and the server's `Retry-After`."""

    def __init__(self, problem: str, *, of_prompt: bool = False, retry_after: str | None = None) -> None:
        super().__init__(problem)
        self.of_prompt, self.retry_after = of_prompt, retry_after


def _check_url(url: str) -> None:
    """Refuse an address that requests cannot be sent to.

    Raises:
        ConfigError: not a URL, no http(s), a query, or one deployment of Azure.
    """
    way_out = "expected a server's base URL without a query, such as http://127.0.0.1:8000/v1"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"llm.url={redacted(url)!r}: {error}; {way_out}") from None
    if "/openai/deployments/" in parsed.path:
        way_out = f"expected {parsed.scheme}://{parsed.netloc.decode()}/openai/v1, and the deployment as llm.model"
    elif parsed.scheme in ("http", "https") and parsed.host and not parsed.query:
        return
    raise ConfigError(f"llm.url={redacted(url)!r}: {way_out}")
