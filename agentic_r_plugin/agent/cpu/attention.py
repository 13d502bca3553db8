"""Causal attention over packed trajectories, for training without flash attention.

verl removes padding by laying the trajectories of a micro-batch end to end in one row, whose position ids begin at 0
again with each trajectory, and leaves it to variable-length flash attention to keep them apart. The same here, with one
causal SDPA call a trajectory: nothing is computed for padding, and no mask is read.

Legend: H attention heads, K key-value heads, T tokens of all trajectories together, D head size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

NAME = "packed_causal"
"""Value of `attn_implementation`."""


def packed_causal(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface: `query [1, H, T, D]`, `key` and `value [1, K, T, D]` -> `[1, T, H, D]`.

    Raises:
        ValueError: a batch of several rows, a mask, or a cache: only packed rows are served.
    """
    if attention_mask is not None or position_ids is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{NAME} attention takes one packed row without mask or cache, found query {tuple(query.shape)}, "
            f"key {tuple(key.shape)}, mask {'no' if attention_mask is None else 'yes'}"
        )
    lengths = trajectory_lengths(position_ids[0])
    parts = [
        scaled_dot_product_attention(
            query_t, key_t, value_t, dropout_p=dropout, scale=scaling, is_causal=True,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for query_t, key_t, value_t in zip(
            query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
        )
    ]  # fmt: skip
    return torch.cat(parts, 2).transpose(1, 2), None


def trajectory_lengths(position_ids_T: torch.Tensor) -> list[int]:
    """Tokens of each packed trajectory.

    >>> trajectory_lengths(torch.tensor([0, 1, 2, 0, 0, 1]))
    [3, 1, 2]
    """
    starts = [*(position_ids_T == 0).nonzero().flatten().tolist(), len(position_ids_T)]
    return [end - start for start, end in pairwise(starts)]


def register() -> None:
    """Make the name known to transformers; it builds no mask for an attention it knows no mask of."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_causal)
