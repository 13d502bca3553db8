"""Weights between a trained retriever and the one that it was trained from.

Fine-tuning on one set can lose on others. On the line between the two sets of weights, most of the gain is often
reached before most of the loss (Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903).
"""

from __future__ import annotations

import torch
from sentence_transformers import SentenceTransformer

from agentic_r_plugin.errors import ConfigError


@torch.no_grad()
def interpolate(trained: SentenceTransformer, base: SentenceTransformer, share: float) -> None:
    """Set every weight of `trained` to `base + share * (trained - base)`, in place.

    Args:
        share: 0 gives the base's weights, 1 leaves the trained ones.

    Raises:
        ConfigError: the models do not have the same parameters.
    """
    own, start = dict(trained.named_parameters()), dict(base.named_parameters())
    if {name: item.shape for name, item in own.items()} != {name: item.shape for name, item in start.items()}:
        raise ConfigError("interpolation: the trained retriever and the base have other parameters or sizes")
    for name, item in own.items():
        item.copy_(torch.lerp(start[name].to(item), item, share))
