"""Which models our attention masks and caches run exactly as transformers does, and up to what length.

Generation (`llm.hf_generate`) passes 4-D masks and its own cache to the model. transformers then builds no mask, so
everything that a model's masks do in addition to causality (sliding windows, chunks, ALiBi) must be done here or
rejected. The attention over packed trajectories (`agent.packed_attention`) has the same limits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from agentic_r_plugin.errors import BackendError

FULL, SLIDING = "full_attention", "sliding_attention"

TESTED = frozenset(
    {
        "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
        "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense",
        "llama", "ministral", "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "opt", "phi",
        "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
    }
)  # fmt: skip
"""Model types whose greedy continuations are tested against transformers; other types are compared when loaded."""

_WAY_OUT = "use another backend (vllm, openai with a server) for this model"


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention properties of a model's layers."""

    window: int | None
    """Number of keys visible to a token in a sliding layer, itself included; None without sliding layers."""
    kinds: tuple[str, ...]
    """`full_attention`, `sliding_attention`, or both."""
    max_length: int
    """Maximum sequence length, in tokens, at which results equal those of transformers."""
    bound: str
    """The setting that determines `max_length`, for error messages."""

    def masks(self, allowed: torch.Tensor, first_query: int, first_key: int) -> dict[str, torch.Tensor]:
        """Restrict a causal mask `[B, 1, Q, K]` to the window of each kind of layer.

        Args:
            allowed: True where a query may attend to a key if there is no window.
            first_query, first_key: positions of the first query and of the first key.
        """
        if self.window is None:
            return {FULL: allowed}
        query_Q = torch.arange(first_query, first_query + allowed.shape[2], device=allowed.device)
        key_K = torch.arange(first_key, first_key + allowed.shape[3], device=allowed.device)
        near = allowed & (query_Q[:, None] - key_K < self.window)
        return {kind: near if kind == SLIDING else allowed for kind in self.kinds}

    def require(self, max_tokens: int) -> None:
        """Raise `BackendError` if sequences of `max_tokens` tokens are longer than `max_length`."""
        if max_tokens > self.max_length:
            raise BackendError(
                f"sequences of {max_tokens} tokens: this model runs {self.max_length} at most ({self.bound}); lower "
                "limits.max_tokens or the request's own limit, or use another backend"
            )


def inspect(config: Any) -> Attention:
    """Read the attention properties from a model's configuration (`transformers.PreTrainedConfig`).

    Raises:
        BackendError: a layer uses neither full nor sliding-window attention, or the model uses ALiBi.
    """
    text = config.get_text_config()
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    if unknown := [kind for kind in kinds if kind not in (FULL, SLIDING)]:
        raise BackendError(
            f"models of type {text.model_type} have layers of kind {unknown}, expected {FULL} or {SLIDING}: {_WAY_OUT}"
        )
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "mpt"):
        raise BackendError(
            f"models of type {text.model_type} place tokens by ALiBi, which needs transformers' own mask: {_WAY_OUT}"
        )
    window = None
    if SLIDING in kinds or not kinds:
        # Some configurations name a window but switch it off (Qwen2).
        uses = getattr(text, "use_sliding_window", True) is not False
        window = getattr(text, "sliding_window", None) if uses else None
    # Without `layer_types`, all layers count as one kind.
    if not kinds:
        kinds = [FULL] if window is None else [SLIDING]
    length, bound = _longest(text)
    return Attention(window=window, kinds=tuple(kinds), max_length=length, bound=bound)


def cap_logits(model: Any) -> None:
    """Switch models that soft-cap attention logits (Gemma 2) to eager attention, because SDPA ignores the cap."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")


def _longest(text: Any) -> tuple[int, str]:
    """The length up to which position encodings do not depend on the sequence length, and what determines it."""
    positions = getattr(text, "max_position_embeddings", None)
    length, bound = 2**31, "no bound"
    if isinstance(positions, int) and positions > 0:
        length, bound = positions, f"max_position_embeddings={positions}"
    rope = getattr(text, "rope_parameters", None) or {}
    # One set of parameters, or one for each kind of layer (Gemma 3).
    for parameters in [value for value in rope.values() if isinstance(value, dict)] or [rope]:
        kind = parameters.get("rope_type")
        original = parameters.get("original_max_position_embeddings") or positions
        if kind in ("dynamic", "longrope") and original:
            # Beyond the original length these types rotate all keys differently, but cached keys keep their rotation.
            length = min(length, int(original))
            bound = f"rope_type {kind!r} rotates all keys differently beyond {length} tokens"
    return length, bound
