"""Adapter from our language-model backends to FlashRAG's generator interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentic_r_plugin.errors import ConfigError, RequestRefusedError
from agentic_r_plugin.llm.base import LLMBackend, Request, Sampling

_IGNORED = frozenset({"do_sample", "return_dict", "return_scores", "return_raw_output", "batch_size"})
"""Parameters of FlashRAG's generators that are accepted while they are off, because they then change nothing."""


class AgenticGenerator:
    """Any language-model backend as FlashRAG's generator: pass it to a pipeline as `generator=`.

    The stop string stays at the end of the text, because FlashRAG's reasoning pipelines test for it. (FlashRAG's own
    Hugging Face generator strips it, so an agent that uses it never searches.)

    Args:
        llm: backend that continues the prompts.
        max_tokens: default number of tokens per call.
        sampling: default sampling parameters.
    """

    def __init__(self, llm: LLMBackend, *, max_tokens: int = 500, sampling: Sampling | None = None) -> None:
        self.llm = llm
        self.max_tokens = max_tokens
        self.sampling = sampling or Sampling()

    def generate(self, input_list: str | Sequence[str], batch_size: int | None = None, **params: Any) -> list[str]:
        """Continue each prompt (plain text, chat template already applied).

        Args:
            input_list: the prompts.
            batch_size: ignored; part of FlashRAG's interface. The backend forms its own batches.
            params: `stop`, `max_tokens` / `max_new_tokens`, `temperature`, `top_p`, `top_k`, `seed`.

        Raises:
            ConfigError: a parameter that would have no effect.
            BackendError: the model failed or refused a prompt; FlashRAG cannot represent a prompt without a text.
        """
        prompts = [input_list] if isinstance(input_list, str) else list(input_list)
        max_tokens, sampling = self._read(params)
        codec = self.llm.codec
        requests = [Request(prompt_ids=tuple(codec.encode(text)), max_tokens=max_tokens) for text in prompts]
        completions = self.llm.generate(requests, sampling) if requests else []
        texts = []
        for completion in completions:
            if isinstance(completion, RequestRefusedError):
                raise completion
            texts.append(codec.decode(self._without_end(completion.token_ids)))
        return texts

    def _read(self, params: dict[str, Any]) -> tuple[int, Sampling]:
        known = {"stop", "max_tokens", "max_new_tokens", "temperature", "top_p", "top_k", "seed"}
        for name, value in params.items():
            if name not in known and not (name in _IGNORED and not value):
                raise ConfigError(
                    f"generator parameter {name}={value!r}: this generator knows {', '.join(sorted(known))}"
                )
        stop = params.get("stop") or self.sampling.stop
        base = self.sampling
        return int(params.get("max_tokens") or params.get("max_new_tokens") or self.max_tokens), Sampling(
            temperature=float(params.get("temperature", base.temperature)),
            top_p=float(params.get("top_p", base.top_p)),
            top_k=int(params.get("top_k", base.top_k)),
            seed=params.get("seed", base.seed),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )

    def _without_end(self, ids: Sequence[int]) -> list[int]:
        """Drop trailing end-of-text tokens, as every FlashRAG generator does. Other special tokens stay."""
        tokenizer = getattr(self.llm.codec, "tokenizer", None)
        ends = {getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "pad_token_id", None)}
        kept = list(ids)
        while kept and kept[-1] in ends:
            kept.pop()
        return kept
