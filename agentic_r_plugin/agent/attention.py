"""Causal attention over packed trajectories, for training without the package flash-attn.

verl removes padding by laying the trajectories of a micro-batch end to end in one row, whose position ids begin at 0
again with each trajectory, and leaves it to variable-length flash attention to keep them apart. The same here, on what
torch itself brings: its variable-length kernel on CUDA, elsewhere calls without a mask (`agentic_r_plugin.attention`).

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
from agentic_r_plugin.errors import ConfigError

NAME = "packed_causal"
"""Value of `attn_implementation`."""
_FLASH = "flash_attention_2"
_MODELS = ("actor_rollout_ref.model", "critic.model")


def overrides(attention: str | None) -> list[str]:
    """verl's keys for the attention of actor, reference and critic; none, where verl's default can be had.

    Args:
        attention: a name that transformers knows; None: `flash_attention_2` where flash-attn is installed here, else
            ours.
    """
    name = attention or chosen()
    return [] if name == _FLASH else [f"+{model}.override_config.attn_implementation={name}" for model in _MODELS]


def chosen() -> str:
    """The attention that a training on accelerators uses by itself."""
    return _FLASH if importlib.util.find_spec("flash_attn") is not None else NAME


def check(composed: Any) -> str:
    """The attention of a composed configuration of verl.

    Raises:
        ConfigError: ours, with what only flash attention gives in verl: sequence parallelism, or rows with padding.
    """
    used = composed.actor_rollout_ref.model.override_config.get("attn_implementation", _FLASH)
    for role, engine in (("actor_rollout_ref.actor", "fsdp_config"), ("actor_rollout_ref.ref", "fsdp_config"),
                         ("critic", "fsdp")):  # fmt: skip
        settings = composed
        for key in role.split("."):
            settings = settings[key]
        sizes = (settings.get("ulysses_sequence_parallel_size", 1), settings[engine].ulysses_sequence_parallel_size)
        if used == NAME and max(sizes) > 1:
            raise ConfigError(
                f"{role}: ulysses_sequence_parallel_size={max(sizes)} needs flash-attn, which verl splits over "
                f"devices; the attention here is {NAME}. Install flash-attn, or leave the size at 1"
            )
    for model in (composed.actor_rollout_ref.model, composed.critic.model):
        if used == NAME and not model.use_remove_padding:
            raise ConfigError(f"use_remove_padding=false: {NAME} attention takes packed rows; expected true")
    return str(used)


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
    """Attention of transformers' interface: `query [1, H, T, K]`, `key` and `value [1, G, T, K]` -> `[1, T, H, K]`.

    Raises:
        ValueError: a batch of several rows, a mask, or a cache (only packed rows are served); a sliding window that is
            shorter than a trajectory, soft-capped logits (Gemma 2) or attention sinks (gpt-oss).
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
class _Row:
    lengths: Sequence[int]
    ends: torch.Tensor
    """(N + 1,) int32, on the row's device."""


_rows: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _row(position_ids_1T: torch.Tensor) -> _Row:
    """Found once a forward pass and not in every layer: on CUDA it waits for the device."""
    found = _rows.get(position_ids_1T)
    if found is None:
        lengths = trajectory_lengths(position_ids_1T[0])
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=position_ids_1T.device)
        found = _rows[position_ids_1T] = _Row(lengths, ends)
    return found


def trajectory_lengths(position_ids_T: torch.Tensor) -> list[int]:
    """Tokens of each packed trajectory.

    >>> trajectory_lengths(torch.tensor([0, 1, 2, 0, 0, 1]))
    [3, 1, 2]

    Raises:
        ValueError: the row does not begin with a trajectory, as a part of a row that was cut over devices.
    """
    starts = (position_ids_T == 0).nonzero().flatten().tolist()
    if not starts or starts[0] != 0:
        raise ValueError(f"{NAME} attention: the row begins in the midst of a trajectory")
    return [end - start for start, end in pairwise([*starts, len(position_ids_T)])]


def register() -> None:
    """Make the name known to transformers; it builds no mask for an attention it knows no mask of."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_causal)
