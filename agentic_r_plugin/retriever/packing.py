"""Attention over texts laid end to end, so that no position is padding. Exact: a token sees its own text only.

Shapes: T tokens of all texts, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "agentic_r_packed"
"""The attention implementation registered here; without `cu_seq_lens_q` it is transformers' own `sdpa`."""

_PACKABLE = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "llama", "mistral", "qwen2", "qwen3"})
"""Model types whose layers hand unknown arguments down to the attention and take `position_ids`; each is tested or of
the same code as one that is."""


def is_packable(model: nn.Module) -> bool:
    """Whether texts of this model can be packed: a known architecture, and every layer attends to the whole text."""
    if not isinstance(model, PreTrainedModel):
        return False
    config: Any = model.config
    if config.model_type not in _PACKABLE:
        return False
    if getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        return False
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return layers == {"full_attention"} and sliding is None and config._attn_implementation in ("sdpa", NAME)


def pack(texts: Sequence[Sequence[int]], *, first_position: int, device: torch.device) -> dict[str, Any]:
    """The arguments of a model for texts laid end to end: ids and positions (1, T), and where texts begin and end.

    >>> packed = pack([[7, 8, 9], [5, 6]], first_position=0, device=torch.device("cpu"))
    >>> packed["input_ids"].tolist(), packed["position_ids"].tolist(), packed["cu_seq_lens_q"].tolist()
    ([[7, 8, 9, 5, 6]], [[0, 1, 2, 0, 1]], [0, 3, 5])
    """
    lengths = [len(text) for text in texts]
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    positions = [position for length in lengths for position in range(first_position, first_position + length)]
    return {
        "input_ids": torch.tensor([[token for text in texts for token in text]], device=device),
        "position_ids": torch.tensor([positions], device=device),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def first_position(model: nn.Module) -> int:
    """Position of a text's first token: RoBERTa and its kin count from behind their padding token."""
    for module in model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return padding + 1
    return 0


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
    """Attention of each text to itself, (1, T, H, K); transformers' interface of an attention function.

    On CUDA in half precision and without dropout torch's variable-length kernel does it; elsewhere, texts of equal
    length that stand next to each other are one call without a mask.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query_1HTK, key_1HTK, value_1HTK, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    causal = bool(getattr(module, "is_causal", False))
    groups = query_1HTK.shape[1] // key_1HTK.shape[1]
    if groups > 1:
        key_1HTK, value_1HTK = (item.repeat_interleave(groups, dim=1) for item in (key_1HTK, value_1HTK))
    if query_1HTK.is_cuda and dropout == 0 and query_1HTK.dtype in (torch.float16, torch.bfloat16):
        return _varlen(query_1HTK, key_1HTK, value_1HTK, cu_seq_lens_q, int(max_length_q or 0), scaling, causal), None
    parts = []
    for start, count, length in _runs(cu_seq_lens_q.tolist()):
        query, key, value = (
            item[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)
            for item in (query_1HTK, key_1HTK, value_1HTK)
        )
        seen = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scaling, is_causal=causal)
        parts.append(seen.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).unsqueeze(0), None


def _runs(ends: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first token, texts, tokens of each) of neighbouring texts of equal length.

    >>> list(_runs([0, 2, 4, 7]))
    [(0, 2, 2), (4, 1, 3)]
    """
    place = 0
    while place < len(ends) - 1:
        first, length = place, ends[place + 1] - ends[place]
        while place < len(ends) - 1 and ends[place + 1] - ends[place] == length:
            place += 1
        yield ends[first], place - first, length


def _varlen(
    query_1HTK: Tensor,
    key_1HTK: Tensor,
    value_1HTK: Tensor,
    ends: Tensor,
    longest: int,
    scale: float | None,
    causal: bool,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (item[0].transpose(0, 1).contiguous() for item in (query_1HTK, key_1HTK, value_1HTK))
    window = (-1, 0) if causal else (-1, -1)
    seen = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, window_size=window)
    assert isinstance(seen, Tensor), "no auxiliary output was asked for"
    return seen.unsqueeze(0)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
