"""Attention over texts packed end to end in one row: each token attends to its own text only; there is no padding.

Shapes: T tokens of all texts, H heads, G key-value heads, K head size, N texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_KERNEL_SIZE = 256
"""Largest head size of the kernel, which requires a multiple of 8."""
_KERNEL_CAPABILITY = (8, 0)
"""NVIDIA's Ampere, the oldest architecture that torch's flash attention supports."""


def attend(
    query_1HTK: Tensor,
    key_1GTK: Tensor,
    value_1GTK: Tensor,
    *,
    ends: Tensor,
    longest: int,
    lengths: Sequence[int] | None = None,
    causal: bool,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attention of each text to itself, (1, T, H, K).

    One call of torch's variable-length flash attention where it is supported (`has_kernel`; it has no dropout).
    Elsewhere, neighbouring texts of equal length share one call without a mask.

    Args:
        ends: (N + 1,) int32 text boundaries, starting at 0.
        longest: tokens of the longest text.
        lengths: tokens of each text, if known on the host; otherwise read from `ends`.
    """
    size = query_1HTK.shape[-1]
    if dropout == 0 and size % 8 == 0 and size <= _KERNEL_SIZE and has_kernel(query_1HTK.device, query_1HTK.dtype):
        return _varlen(query_1HTK, key_1GTK, value_1GTK, ends, longest, scale, causal)
    parts = []
    for start, count, length in _runs(ends.diff().tolist() if lengths is None else lengths):
        # (H, count * length, K) -> (count, H, length, K): texts of equal length form a batch without padding.
        query, key, value = (
            item[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)
            for item in (query_1HTK, key_1GTK, value_1GTK)
        )
        seen = scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=dropout,
            scale=scale,
            is_causal=causal,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        parts.append(seen.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).unsqueeze(0)


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's variable-length attention is supported: CUDA, half precision, Ampere or newer."""
    return (
        device.type == "cuda"
        and dtype in _KERNEL_DTYPES
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= _KERNEL_CAPABILITY
    )


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first token, number of texts, tokens per text) of runs of neighbouring texts of equal length.

    >>> list(_runs([2, 2, 3]))
    [(0, 2, 2), (4, 1, 3)]
    """
    start = place = 0
    while place < len(lengths):
        first, length = place, lengths[place]
        while place < len(lengths) and lengths[place] == length:
            place += 1
        yield start, place - first, length
        start += (place - first) * length


def _varlen(
    query_1HTK: Tensor,
    key_1GTK: Tensor,
    value_1GTK: Tensor,
    ends: Tensor,
    longest: int,
    scale: float | None,
    causal: bool,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query_1HTK.shape[1] // key_1GTK.shape[1]
    if groups > 1:  # torch 2.11's function has no enable_gqa
        key_1GTK, value_1GTK = (item.repeat_interleave(groups, dim=1) for item in (key_1GTK, value_1GTK))
    query, key, value = (item[0].transpose(0, 1).contiguous() for item in (query_1HTK, key_1GTK, value_1GTK))
    # Number of keys that a query sees to its left and right; -1: all.
    window = (-1, 0) if causal else (-1, -1)
    seen = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, window_size=window)
    assert isinstance(seen, Tensor), "no auxiliary output was asked for"
    return seen.unsqueeze(0)
