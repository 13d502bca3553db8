"""Backend for a Hugging Face causal language model in this process, used by the data stages and by evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentic_r_plugin import compute
from agentic_r_plugin.config import fingerprint
from agentic_r_plugin.errors import ConfigError, RequestRefusedError
from agentic_r_plugin.llm.base import Completion, Continuation, Likelihood, Request, Sampling, Usage, answered, row_seed
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.llm.reply import Reply
from agentic_r_plugin.store import file_fingerprint

if TYPE_CHECKING:
    from agentic_r_plugin.backends import LLMSpec

_DTYPES = ("auto", *compute.TYPES, "fast")
_WEIGHTS = ("*.safetensors", "*.bin")
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "chat_template*", "*.model")


class HFBackend:
    """Hugging Face model in this process, batched; made for small models.

    Args:
        model: directory of a checkpoint with its tokenizer.
        tokenizer: directory of the tokenizer, if different from the model's.
        dtype: compute type: `auto` (as saved, or float32 if the device would emulate that type), `fast`
            (`compute.fast_type`), `float32`, `bfloat16` or `float16`.
        device: `auto` (cuda if available) or a torch device.
        max_batch_tokens: upper bound on the rows of a batch times their maximum length.
        prefix_cache_tokens: number of tokens whose keys and values are kept between calls.
        chat_template_kwargs: arguments of the chat template, such as `enable_thinking`.

    Raises:
        ConfigError: the directory does not exist, or holds no model or tokenizer.
        BackendError: the generator does not support the architecture.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path = "",
        dtype: str = "auto",
        device: str = "auto",
        max_batch_tokens: int = 32_768,
        prefix_cache_tokens: int = 65_536,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from agentic_r_plugin.llm.hf_generate import HFGenerator

        if not str(model):
            raise ConfigError(
                "llm.model: expected a model, found nothing; give llm.model=FOLDER, or a server: llm.backend=openai "
                "llm.url=http://HOST/v1 llm.model=NAME"
            )
        self.path, tokenizer_path = Path(model), Path(tokenizer or model)
        for name, path in (("model", self.path), ("tokenizer", tokenizer_path)):
            if not path.is_dir():
                raise ConfigError(f"llm.{name}={str(path)!r}: expected the directory of a Hugging Face checkpoint")
        if dtype not in _DTYPES:
            raise ConfigError(f"llm.dtype={dtype!r}: expected one of {', '.join(_DTYPES)}")
        device = compute.device_name(device)
        asked = compute.fast_type(device) if dtype == "fast" else dtype
        try:
            loaded: Any = AutoTokenizer.from_pretrained(tokenizer_path)
            weights: Any = AutoModelForCausalLM.from_pretrained(self.path, dtype=asked)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path}: not a checkpoint that transformers can load: {error}") from error
        # The type of the saved weights is known only after loading.
        if asked == "auto":
            asked = compute.type_for(str(weights.dtype).removeprefix("torch."), device)
        self.dtype = asked
        self.codec = TokenizerCodec(loaded, chat_template_kwargs)
        self._generator = HFGenerator(
            weights.to(device, getattr(torch, asked)),
            loaded,
            max_batch_tokens=max_batch_tokens,
            prefix_cache_tokens=prefix_cache_tokens,
        )
        self.max_length = self._generator.attention.max_length
        self._fingerprint = checkpoint_fingerprint(self.path, tokenizer_path)
        self.usage = Usage()
        # Without a cache nothing is evicted, so callers need not limit their conversations.
        self.kept_tokens = prefix_cache_tokens or None

    @classmethod
    def from_spec(cls, spec: LLMSpec) -> HFBackend:
        """Create the backend from a command's settings."""
        return cls(
            spec.model,
            tokenizer=spec.tokenizer,
            dtype=spec.dtype,
            device=spec.device,
            max_batch_tokens=spec.max_batch_tokens,
            prefix_cache_tokens=spec.prefix_cache_tokens,
            **spec.options,
        )

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Continue every prompt.

        Sampling depends on the seed and the request's own prompt, not on the other requests: the same prompt and seed
        give the same text in any batch.
        """
        prompts = [request.prompt_ids for request in requests]
        rows = self._generator.generate(
            prompts,
            max_tokens=[request.max_tokens for request in requests],
            stop=sampling.stop,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            seed=None if sampling.seed is None else [row_seed(sampling.seed, prompt) for prompt in prompts],
        )
        completions = [
            Completion(
                token_ids=row.token_ids,
                prompt_tokens=len(prompt),
                cached_tokens=row.cached_tokens,
                cut=row.finish_reason == "length",
            )
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        self.usage.count(completions)
        return completions

    def likelihoods(self, continuations: Sequence[Continuation]) -> list[Likelihood | RequestRefusedError]:
        """Likelihood of every continuation; one prefill each, with shared prefixes computed once."""

        def refusal(one: Continuation) -> RequestRefusedError | None:
            return self._refusal(len(one.ids), f"a text of {len(one.ids)} tokens")

        return answered(continuations, refusal, self._likelihoods)

    def _likelihoods(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        texts = [one.ids for one in continuations]
        found = self._generator.likelihoods(texts, [len(one.token_ids) for one in continuations])
        results = [
            Likelihood(logprobs=logprobs, prompt_tokens=len(text), cached_tokens=cached)
            for text, (logprobs, cached) in zip(texts, found, strict=True)
        ]
        self.usage.count(results)
        return results

    def chat(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> list[Reply | RequestRefusedError]:
        """Return the reply to each message without special tokens; see `ChatBackend.chat`."""

        def refusal(request: Request) -> RequestRefusedError | None:
            length = len(request.prompt_ids)
            return self._refusal(length + max_tokens, f"a prompt of {length} tokens and a reply of {max_tokens}")

        sampling = Sampling(temperature=temperature, seed=seed)
        requests = self.codec.message_requests(prompts, max_tokens)
        return self.codec.replies(answered(requests, refusal, lambda fit: self.generate(fit, sampling)))

    def _refusal(self, length: int, what: str) -> RequestRefusedError | None:
        if length <= self.max_length:
            return None
        return RequestRefusedError(f"{what}: {self.path} runs {self.max_length} at most")

    def fingerprint(self) -> str:
        """Hash of weights, configuration and tokenizer files, followed by the compute type.

        Including the type prevents results from different kinds of processors from being mixed in one output.
        """
        return f"{self._fingerprint} {self.dtype}"

    def close(self) -> None:
        """Free the model."""
        self._generator = None  # type: ignore[assignment]


def checkpoint_fingerprint(model: Path, tokenizer: Path) -> str:
    """Hash of the weights, configuration and tokenizer files of a checkpoint."""
    files = [path for pattern in (*_WEIGHTS, "config.json") for path in sorted(model.glob(pattern))]
    files += [path for pattern in _TOKENIZER for path in sorted(tokenizer.glob(pattern))]
    return fingerprint([(path.name, file_fingerprint(path)) for path in files if path.is_file()])
