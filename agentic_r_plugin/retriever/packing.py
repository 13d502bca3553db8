"""Attention over concatenated texts without padding. It is exact: a token attends to its own text only.

Shapes: T tokens of all texts together, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from agentic_r_plugin.attention import attend

NAME = "agentic_r_packed"
"""Name of the attention implementation registered below. Without `cu_seq_lens_q` it is transformers' `sdpa`."""

_PACKABLE = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "llama", "mistral", "qwen2", "qwen3"})
"""Model types whose layers take `position_ids` and pass unknown arguments on to the attention function. Each type is
tested, or shares its code with one that is."""


def is_packable(model: nn.Module) -> bool:
    """Whether the model supports packed texts: a known architecture whose layers all attend to the whole text."""
    if not isinstance(model, PreTrainedModel):
        return False
    config: Any = model.config
    if config.model_type not in _PACKABLE:
        return False
    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        return False
    # A sliding window would be ignored by the packed attention, which changes the result.
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return layers == {"full_attention"} and sliding is None and config._attn_implementation in ("sdpa", NAME)


def pack(texts: Sequence[Sequence[int]], *, first_position: int, device: torch.device) -> dict[str, Any]:
    """Model inputs for concatenated texts: ids and positions (1, T), and the boundaries of the texts.

    >>> packed = pack([[7, 8, 9], [5, 6]], first_position=0, device=torch.device("cpu"))
    >>> packed["input_ids"].tolist(), packed["position_ids"].tolist(), packed["cu_seq_lens_q"].tolist()
    ([[7, 8, 9, 5, 6]], [[0, 1, 2, 0, 1]], [0, 3, 5])
    """
    lengths = [len(text) for text in texts]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    # Positions restart in each text, so that every text has the embeddings it would have alone.
    positions = [position for length in lengths for position in range(first_position, first_position + length)]
    return {
        "input_ids": torch.tensor([[token for text in texts for token in text]], device=device),
        "position_ids": torch.tensor([positions], device=device),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def set_attention_dropout(model: nn.Module, share: float | None) -> float:
    """Set the attention dropout of every layer if `share` is given; returns the value in use.

    It is the layer's `attention_dropout` (Llama-like models) or the `dropout` module next to query and key (BERT-like).
    """
    found = 0.0
    for module in model.modules():
        layer: Any = module
        own = getattr(layer, "dropout", None)
        if isinstance(getattr(layer, "attention_dropout", None), int | float):
            layer.attention_dropout = found = float(layer.attention_dropout if share is None else share)
        elif isinstance(own, nn.Dropout) and hasattr(layer, "query") and hasattr(layer, "key"):
            own.p = found = own.p if share is None else share
    return found


def packed_attention(
    module: nn.Module,
    query_1HTK: Tensor,
    key_1HTK: Tensor,
    value_1HTK: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each text to itself, (1, T, H, K), with the signature of a transformers attention function."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query_1HTK, key_1HTK, value_1HTK, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    causal = bool(getattr(module, "is_causal", False))
    seen = attend(
        query_1HTK, key_1HTK, value_1HTK, ends=cu_seq_lens_q, longest=int(max_length_q or 0), causal=causal,
        dropout=dropout, scale=scaling,
    )  # fmt: skip
    return seen, None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
