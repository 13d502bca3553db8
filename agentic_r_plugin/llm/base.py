"""What the stages ask of a language model. Backends are registered components of kind `llm_backend`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from agentic_r_plugin.errors import RequestRefusedError
from agentic_r_plugin.llm.reply import Reply
from agentic_r_plugin.protocol import Codec


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; one value for a whole batch."""

    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Generation ends after any of these; the string stays in the output."""


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
    cached_tokens: int = 0
    """Prompt tokens the engine took from its prefix cache, where it says so."""
    cut: bool = False
    """Whether the model was stopped at `max_tokens`, where the engine says so."""


@dataclass
class Usage:
    """What a backend has been asked for since it was opened; added to as it works."""

    requests: int = 0
    retried: int = 0
    """Requests that failed in passing and were sent again."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt tokens, those the engine took from its prefix cache, where it says so."""
    generated_tokens: int = 0
    usd: float = 0.0
    """By the prices the backend was given; 0 without."""


class LLMBackend(Protocol):
    """A model that continues prompts. A backend that has a meter keeps it in `usage` (`Usage`).

    One whose cache of earlier turns is small says in `kept_tokens` how many tokens it keeps; it is then given no more
    conversations at once than fit.
    """

    codec: Codec

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Sequence[Completion | RequestRefusedError]:
        """Continue every prompt; the i-th completion, or why it is refused, belongs to the i-th request.

        Raises:
            BackendError: the model or its server failed after its retries. Never a shorter list.
            RequestRefusedError: a backend that cannot refuse one prompt alone refuses the batch for one of them.
        """

    def fingerprint(self) -> str:
        """Changes when the weights, the model's name or the tokenizer change."""

    def close(self) -> None:
        """Free what it holds; safe to call twice."""


class ChatBackend(Protocol):
    """A model that answers a message: what judges ask of it. Our backends do both."""

    def chat(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> Sequence[Reply | str | RequestRefusedError]:
        """The reply to each prompt, sent as the only user message of its own conversation, or why it is refused.

        A backend that can tell gives a `Reply`, which says whether the text was cut at `max_tokens`; a plain string is
        taken for a whole reply.

        Args:
            prompts: messages.
            max_tokens: longest reply.
            temperature: 0 is greedy.
            seed: of the draw, where the temperature is not 0.

        Raises:
            BackendError: the model or its server failed after its retries. Never a shorter list.
        """

    def fingerprint(self) -> str:
        """Changes when the weights or the model's name change."""


def row_seed(seed: int, prompt_ids: Sequence[int]) -> int:
    """Seed of one prompt's draw (31 bits): the same for the same prompt, whatever is drawn beside it."""
    digest = hashlib.blake2b(f"{seed} {list(prompt_ids)}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def count(usage: Usage, completions: Sequence[Completion]) -> None:
    """Add completions to a meter."""
    for done in completions:
        usage.requests += 1
        usage.prompt_tokens += done.prompt_tokens
        usage.cached_tokens += done.cached_tokens
        usage.generated_tokens += len(done.token_ids)
