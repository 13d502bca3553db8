"""Causal attention over packed trajectories, for training without the package flash-attn.

verl removes padding by concatenating the trajectories of a micro-batch into one row, in which position ids restart at 0
for each trajectory, and relies on variable-length flash attention to keep them separate. This module does the same with
what torch provides: its variable-length kernel on CUDA, and calls without a mask on other devices
(`agentic_r_plugin.attention`).

Legend: H attention heads, G key-value heads, T tokens of all trajectories together, K head size, N trajectories.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from agentic_r_plugin.attention import attend

NAME = "packed_causal"
"""Value of `attn_implementation`."""
FLASH = "flash_attention_2"
_MODELS = ("actor_rollout_ref.model", "critic.model")


def overrides(attention: str | None) -> list[str]:
    """Overrides that set the attention of actor, reference and critic; empty when verl's default is used.

    Args:
        attention: an attention name of transformers; None: `flash_attention_2` if flash-attn is installed here, else
            `packed_causal`.
    """
    name = attention or (FLASH if importlib.util.find_spec("flash_attn") is not None else NAME)
    return [] if name == FLASH else [f"+{model}.override_config.attn_implementation={name}" for model in _MODELS]


def packed_causal(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers: `query [1, H, T, K]`, `key` and `value [1, G, T, K]` -> `[1, T, H, K]`.

    Raises:
        ValueError: several rows, a mask or a cache (only one packed row is supported); a sliding window shorter than a
            trajectory; soft-capped logits (Gemma 2) or attention sinks (gpt-oss).
    """
    if softcap is not None or s_aux is not None:
        raise ValueError(f"{NAME} attention has no soft-capped logits and no sinks; train this model with flash-attn")
    if attention_mask is not None or position_ids is None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{NAME} attention takes one packed row without mask or cache, found query {tuple(query.shape)}, "
            f"key {tuple(key.shape)}, mask {'no' if attention_mask is None else 'yes'}"
        )
    row = _row(position_ids)
    if sliding_window is not None and max(row.lengths) > sliding_window:
        raise ValueError(
            f"{NAME} attention has no windows: this model's sliding_window={sliding_window} is shorter than a "
            f"trajectory of {max(row.lengths)} tokens; lower limits.max_tokens, or train it with flash-attn"
        )
    seen = attend(
        query, key, value, ends=row.ends, longest=max(row.lengths), lengths=row.lengths, causal=True, dropout=dropout,
        scale=scaling,
    )  # fmt: skip
    return seen, None


@dataclass(frozen=True)
class _PackedRow:
    lengths: Sequence[int]
    ends: torch.Tensor
    """(N + 1,) int32 cumulative lengths, on the row's device."""


# By identity: all layers of a pass get the same tensor. Weak: a later tensor may get the id of a freed one.
_rows: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _row(position_ids_1T: torch.Tensor) -> _PackedRow:
    """Boundaries of the row, computed once per forward pass instead of in every layer: on CUDA it synchronises."""
    found = _rows.get(position_ids_1T)
    if found is None:
        lengths = trajectory_lengths(position_ids_1T[0])
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=position_ids_1T.device)
        found = _rows[position_ids_1T] = _PackedRow(lengths, ends)
    return found


def trajectory_lengths(position_ids_T: torch.Tensor) -> list[int]:
    """Number of tokens of each packed trajectory.

    >>> trajectory_lengths(torch.tensor([0, 1, 2, 0, 0, 1]))
    [3, 1, 2]

    Raises:
        ValueError: the row starts inside a trajectory, as when a row was split over devices.
    """
    starts = (position_ids_T == 0).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        raise ValueError(f"{NAME} attention: the row starts inside a trajectory")
    return [end - start for start, end in pairwise([*starts, len(position_ids_T)])]


def register() -> None:
    """Register the attention with transformers, which builds no mask for attentions without a mask function."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_causal)
