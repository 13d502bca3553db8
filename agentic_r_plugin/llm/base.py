"""The interface between the stages and a language model. Backends are components of kind `llm_backend`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from agentic_r_plugin.errors import ConfigError, RequestRefusedError
from agentic_r_plugin.llm.reply import Reply
from agentic_r_plugin.protocol import Codec

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; one value for a whole batch."""

    temperature: float = 0.0
    """0: greedy decoding."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Generation stops after any of these strings, which stays in the output."""


def check_sampling(temperature: float, top_p: float = 1.0, where: str = "") -> None:
    """Raise ConfigError if no token can be drawn with these settings."""
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"{where}temperature: expected 0 (greedy) or above, found {temperature}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"{where}top_p: expected a share above 0 and at most 1, found {top_p}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt and how many tokens may follow it."""

    prompt_ids: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What the model wrote: at least one id, at most the request's `max_tokens`."""

    token_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int | None = None
    """Prompt tokens read from the engine's prefix cache; None if the engine does not report them."""
    cut: bool = False
    """Whether the text is incomplete, such as at `max_tokens`, if the engine reports it."""


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A prompt and a text that may follow it, whose probability is asked for."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """At least one."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and continuation together."""
        return (*self.prompt_ids, *self.token_ids)


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How probable a continuation is."""

    logprobs: tuple[float, ...]
    """Natural logarithm of the probability of each of its tokens, given all before it, at temperature 1."""
    prompt_tokens: int
    """Prompt and continuation together."""
    cached_tokens: int | None = None
    """As in `Completion`."""


@dataclass
class Usage:
    """Running totals of a backend since it was opened."""

    requests: int = 0
    retried: int = 0
    """Number of times an answered request had been sent again after a transient failure."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens read from the engine's prefix cache, if the engine reports them."""
    cache_unknown_tokens: int = 0
    """Tokens of the prompts for which it does not report them."""
    generated_tokens: int = 0
    usd: float = 0.0
    """Cost at the configured prices; 0 without prices."""

    def count(self, done: Sequence[Completion | Likelihood]) -> None:
        """Add the requests of completions or likelihoods."""
        for one in done:
            self.requests += 1
            count_tokens(self, one)


class LLMBackend(Protocol):
    """A model that continues prompts. A backend that counts its usage exposes it as `usage` (`Usage`).

    A backend with a limited cache of earlier turns exposes its size in tokens as `kept_tokens`; callers then run no
    more conversations at once than fit. One that knows the probability of a given text has a method
    `likelihoods(continuations) -> Sequence[Likelihood | RequestRefusedError]`, with errors as of `generate`.
    """

    codec: Codec

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Sequence[Completion | RequestRefusedError]:
        """Continue every prompt; the i-th result is the completion, or the refusal, of the i-th request.

        Raises:
            BackendError: the model or its server failed after all retries. The list is never shorter.
            RequestRefusedError: one prompt is refused and the backend cannot process the rest of the batch.
        """

    def fingerprint(self) -> str:
        """Identifier that changes with the weights, the model's name or the tokenizer."""

    def close(self) -> None:
        """Release all resources; safe to call twice."""


class ChatBackend(Protocol):
    """A model that answers messages, as used by judges. Our backends implement both protocols."""

    def chat(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> Sequence[Reply | str | RequestRefusedError]:
        """Return the reply to each prompt, or its refusal; each prompt is the only user message of a conversation.

        A backend that knows whether a reply was cut at `max_tokens` returns a `Reply`; a plain string counts as a
        complete reply.

        Args:
            prompts: user messages.
            max_tokens: maximum length of a reply.
            temperature: 0 for greedy decoding.
            seed: sampling seed, used if the temperature is not 0.

        Raises:
            BackendError: the model or its server failed after all retries. The list is never shorter.
        """

    def fingerprint(self) -> str:
        """Identifier that changes with the weights or the model's name."""


def row_seed(seed: int, prompt_ids: Sequence[int]) -> int:
    """31-bit sampling seed of one prompt; it depends only on `seed` and the prompt, not on the rest of the batch."""
    # Not Python's `hash`, which differs between processes.
    digest = hashlib.blake2b(f"{seed} {list(prompt_ids)}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


class TokenMeter(Protocol):
    """Counts of tokens: `Usage`, or what a stage spent (`cost.Cost`)."""

    prompt_tokens: int
    cached_tokens: int
    cache_unknown_tokens: int
    generated_tokens: int


def count_tokens(meter: TokenMeter, done: Completion | Likelihood) -> None:
    """Add the tokens of one completion, or of one text whose likelihood was computed."""
    meter.prompt_tokens += done.prompt_tokens
    if done.cached_tokens is None:
        meter.cache_unknown_tokens += done.prompt_tokens
    else:
        meter.cached_tokens += done.cached_tokens
    meter.generated_tokens += len(done.token_ids) if isinstance(done, Completion) else 0


def answered(
    items: Sequence[Item],
    refusal: Callable[[Item], RequestRefusedError | None],
    answer: Callable[[Sequence[Item]], Sequence[Answer]],
) -> list[Answer | RequestRefusedError]:
    """The answer to each item, or its refusal. Refused items are not in the batch passed to `answer`."""
    refusals = [refusal(item) for item in items]
    accepted = [item for item, refused in zip(items, refusals, strict=True) if refused is None]
    answers = iter(answer(accepted) if accepted else [])
    return [next(answers) if refused is None else refused for refused in refusals]
