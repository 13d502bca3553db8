"""Loss and gradients of a batch of any size in the memory of a few mini-batches (gradient caching).

All texts are encoded once without a graph; the loss gives the gradient of every vector; then each mini-batch is encoded
again, with a graph, and its vectors' gradients go back through it. Mini-batches whose graphs fit in memory are encoded
once. Nothing is approximated: dropout draws the same in both passes.

Legend: N texts of this process, D dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from agentic_r_plugin.retriever.encoding import TextEncoder, Tokens

VectorLoss = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Vectors (N, D) -> (the loss, gradient of each vector (N, D))."""


def backward(
    encoder: TextEncoder,
    texts: Sequence[Tokens],
    loss: VectorLoss,
    *,
    seed: str,
    mini_batch_tokens: int,
    kept_tokens: int | None,
) -> Tensor:
    """Add the loss' gradient to the model's parameters; returns the loss.

    Args:
        texts: in the order in which `loss` wants their vectors.
        seed: of dropout; each mini-batch draws from its own generator state.
        kept_tokens: tokens whose graphs are kept from the first pass; None means all of them.
    """
    plan = encoder.plan(texts, mini_batch_tokens)
    vectors: list[Tensor] = [torch.empty(0)] * len(plan)
    room = float("inf") if kept_tokens is None else kept_tokens
    kept = set()
    for number in reversed(range(len(plan))):  # the longest texts first: they are the dearest to encode again
        places = plan[number]
        size = sum(len(texts[i]) for i in places)
        with torch.set_grad_enabled(size <= room):
            vectors[number] = _encode(encoder, texts, places, seed, number)
        if size <= room:
            kept.add(number)
            room -= size
    order = torch.tensor([place for places in plan for place in places], device=vectors[0].device)
    value, gradient_ND = loss(torch.cat([part.detach() for part in vectors])[order.argsort()])
    for number in sorted(range(len(plan)), key=lambda i: i not in kept):  # frees the kept graphs first
        part = vectors[number] if number in kept else _encode(encoder, texts, plan[number], seed, number)
        vectors[number] = torch.empty(0)
        part.backward(gradient_ND[torch.tensor(plan[number], device=part.device)])
    return value


def _encode(encoder: TextEncoder, texts: Sequence[Tokens], places: Sequence[int], seed: str, number: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))
    return encoder([texts[i] for i in places])
