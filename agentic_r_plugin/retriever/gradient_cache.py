"""Gradient caching: loss and gradients of a batch of any size in the memory of a few mini-batches.

All texts are encoded once without a graph, and the loss gives the gradient of every vector. Each mini-batch is then
encoded again with a graph, and the gradients of its vectors are backpropagated. Mini-batches whose graphs fit in memory
are encoded only once. The gradients are exact: both passes draw the same dropout.

Legend: N texts of this process, D dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from agentic_r_plugin.retriever.encoding import TextEncoder, Tokens

VectorLoss = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Vectors (N, D) -> (loss, gradients of the vectors (N, D))."""


def backward(
    encoder: TextEncoder,
    texts: Sequence[Tokens],
    loss: VectorLoss,
    *,
    seed: str,
    mini_batch_tokens: int,
    kept_tokens: int,
) -> Tensor:
    """Add the gradient of the loss to the model's parameters; returns the loss.

    Args:
        texts: in the order in which `loss` expects their vectors.
        seed: dropout seed; each mini-batch gets its own generator state.
        kept_tokens: number of tokens whose graphs are kept from the first pass.
    """
    plan = encoder.plan(texts, mini_batch_tokens)
    vectors: list[Tensor] = [torch.empty(0)] * len(plan)
    room, kept = kept_tokens, set()
    for number in reversed(range(len(plan))):  # longest texts first, because they cost most to encode again
        places = plan[number]
        size = sum(len(texts[i]) for i in places)
        with torch.set_grad_enabled(size <= room):
            vectors[number] = _encode(encoder, texts, places, seed, number)
        if size <= room:
            kept.add(number)
            room -= size
    # `order` maps plan order to text order; its argsort maps back to the order that `loss` expects.
    order = torch.tensor([place for places in plan for place in places], device=vectors[0].device)
    # Detached: the loss gives gradients of the vectors, which go through the encoder below.
    value, gradient_ND = loss(torch.cat([part.detach() for part in vectors])[order.argsort()])
    for number in sorted(range(len(plan)), key=lambda i: i not in kept):  # frees the kept graphs first
        part = vectors[number] if number in kept else _encode(encoder, texts, plan[number], seed, number)
        vectors[number] = torch.empty(0)  # so that the graph is freed with `part`
        part.backward(gradient_ND[torch.tensor(plan[number], device=part.device)])
    return value


def _encode(encoder: TextEncoder, texts: Sequence[Tokens], places: Sequence[int], seed: str, number: int) -> Tensor:
    # Seeded per mini-batch, so that the second pass repeats the dropout masks of the first.
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))
    return encoder([texts[i] for i in places])
