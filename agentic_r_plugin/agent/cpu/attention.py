"""Attention for training on the CPU: computed in float32, whatever the model computes in.

PyTorch's CPU kernel for masked attention takes about twice as long in bfloat16 as in float32, forward and backward
(`tests/benchmarks/attention.py`), and it is more than half of a small model's time; everything else is faster in
bfloat16. A Hugging Face attention function of its own name, registered through the public interfaces.
"""

from __future__ import annotations

from typing import Any

import torch

NAME = "sdpa_float32"
"""What `attn_implementation` is set to (`cpu.overrides`)."""


def sdpa_float32(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Hugging Face's `sdpa` in float32; tensors are [batch, heads, tokens, head size], the mask boolean or None."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output, weights = sdpa_attention_forward(
        module, query.float(), key.float(), value.float(), attention_mask, **kwargs
    )
    return output.to(query.dtype), weights


def register() -> None:
    """Make the name known to Hugging Face models of this process; registering again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, sdpa_float32)
    AttentionMaskInterface.register(NAME, sdpa_mask)
