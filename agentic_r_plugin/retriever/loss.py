"""Losses over the distinct passages of a batch: the paper's (method section 5) and those of two baselines.

Legend: B queries of this process, P distinct passages of the batch, G passages per group, D dimensions.

A batch has B*G*N passage slots on N processes. A passage that fills several slots is one column, encoded once and
weighted by its number of slots, so every loss equals the loss over all slots. With vectors q and d, temperature t,
s_ij = q_i . d_j / t, positive p(i) of query i, and w_ij the number of slots in query i's softmax that hold passage j:

    contrastive_i  = log( sum_j w_ij exp(s_ij) ) - s_ip(i)

In the paper, w_ij counts the slots of the whole batch on all devices. With `mask_false_negatives`, w_ij is 0 for the
known positives of query i and 1 for its own positive. A group's weight multiplies the loss of its query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from agentic_r_plugin.retriever.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The inputs of a loss other than the scores."""

    weights_BP: Tensor
    """w_ij: number of slots in query i's softmax that hold passage j."""
    own_BG: Tensor
    """Columns of the query's group, its positive first; 0 where `present_BG` is false."""
    present_BG: Tensor
    """False at the padding of groups that are shorter than the longest."""
    teacher_BG: Tensor | None
    """Teacher scores of the group's passages; None for losses that need none."""
    factor_B: Tensor | None = None
    """Factor of each query's loss; None if all are 1."""

    def to(self, like: Tensor) -> Targets:
        """Move to the device and floating-point type of `like`."""
        moved = {
            name: item.to(like if item.is_floating_point() else like.device)
            for name, item in vars(self).items()
            if item is not None
        }
        return replace(self, **moved)


_NOTHING = -1e30
"""log(0) in a softmax that may be empty. Minus infinity would give NaN gradients there."""

Loss = Callable[[Tensor, Targets], Tensor]
"""(scores (B, P), targets) -> mean loss over the queries."""


def targets(batch: Batch, *, mask_false_negatives: bool) -> Targets:
    """Build the targets for this process' queries."""
    column = {row: place for place, row in enumerate(batch.rows)}
    size = max(1 + len(item.negatives) for item in batch.examples)
    weights = torch.tensor(batch.counts, dtype=torch.float64).repeat(len(batch.examples), 1)
    own = torch.zeros(len(batch.examples), size, dtype=torch.long)
    present = torch.zeros(len(batch.examples), size, dtype=torch.bool)
    scored = all(item.scores is not None for item in batch.examples)
    teacher = torch.zeros(len(batch.examples), size, dtype=torch.float64) if scored else None
    for i, item in enumerate(batch.examples):
        columns = [column[row] for row in (item.positive, *item.negatives)]
        own[i, : len(columns)], present[i, : len(columns)] = torch.tensor(columns), True
        if mask_false_negatives:
            for row in item.known_positives:
                if row in column:
                    weights[i, column[row]] = 0
            # The softmax must contain its own numerator, and other slots of the positive are false negatives too.
            weights[i, column[item.positive]] = 1
        if teacher is not None and item.scores is not None:
            teacher[i, : len(columns)] = torch.tensor(item.scores, dtype=torch.float64)
    factors = [item.weight for item in batch.examples]
    factor = torch.tensor(factors, dtype=torch.float64) if any(value != 1 for value in factors) else None
    return Targets(weights_BP=weights, own_BG=own, present_BG=present, teacher_BG=teacher, factor_B=factor)


def similarities(queries_BD: Tensor, passages_PD: Tensor, temperature: float) -> Tensor:
    """(B, P) inner products divided by the temperature."""
    return queries_BD @ passages_PD.T / temperature


def contrastive(scores_BP: Tensor, batch: Targets) -> Tensor:
    """InfoNCE over all slots of the batch (the paper's loss)."""
    positive_B = scores_BP.gather(1, batch.own_BG[:, :1]).squeeze(1)
    # log(w exp(s)) = s + log w, so the multiplicity of a passage is an offset of its logit; log 0 drops masked ones.
    # No softmax is empty: the weight of a query's own positive is at least 1.
    return _mean(torch.logsumexp(scores_BP + batch.weights_BP.log(), dim=1) - positive_B, batch)


def distillation(scores_BP: Tensor, batch: Targets, *, teacher_temperature: float) -> Tensor:
    """REPLUG: KL divergence from the retriever's distribution over the group to the teacher's.

        loss_i = sum over g of P_ig (log P_ig - log T_ig),  P = softmax_g(s), T = softmax_g(teacher / temperature)

    Only the passages of the query's own group enter the loss.
    """
    ours_BG = F.log_softmax(_own_scores(scores_BP, batch), dim=1)
    teacher_BG = F.log_softmax(_teacher(batch, teacher_temperature), dim=1)
    difference_BG = (ours_BG - teacher_BG).masked_fill(~batch.present_BG, 0.0)  # padding: -inf - -inf is NaN
    return _mean((ours_BG.exp() * difference_BG).sum(dim=1), batch)


def reward_weighted(scores_BP: Tensor, batch: Targets, *, teacher_temperature: float) -> Tensor:
    """LLM-Embedder: each passage of the group is a positive against lower-scored ones and the slots of other groups.

        loss_i = sum over g of T_ig (log( exp(s_ig) + sum over h with lower score of exp(s_ih)
                                          + sum over j of the other groups of u_ij exp(s_ij) ) - s_ig)

    T = softmax_g(teacher / temperature), u_ij is the number of slots of other groups that hold passage j.
    """
    own_BG = _own_scores(scores_BP, batch)
    teacher_BG = _teacher(batch, teacher_temperature)
    slots_BP = torch.zeros_like(batch.weights_BP).scatter_add_(1, batch.own_BG, batch.present_BG.to(batch.weights_BP))
    # Masking can leave a group more slots than weight, hence the clamp at 0. A lone group has no others at all.
    others_BP = (batch.weights_BP - slots_BP).clamp(min=0).log().clamp(min=_NOTHING)
    others_B = torch.logsumexp(scores_BP + others_BP, dim=1)
    # [i, g, h]: passage h is a negative of passage g. Padding (-inf) is masked in `own_BG`, so it adds nothing.
    # Passages with equal scores are no negatives of each other.
    lower_BGG = teacher_BG[:, None, :] < teacher_BG[:, :, None]
    rivals_BGG = own_BG[:, None, :].expand_as(lower_BGG).masked_fill(~lower_BGG, -torch.inf)
    # (B, G, 1 + G + 1): the passage itself, its negatives in the group, all slots of other groups.
    parts = torch.cat((own_BG[:, :, None], rivals_BGG, others_B[:, None, None].expand(*own_BG.shape, 1)), dim=2)
    # Padding is dropped before the product with the shares, where infinity times 0 would be NaN.
    gap_BG = (torch.logsumexp(parts, dim=2) - own_BG)[batch.present_BG]
    share_BG = F.softmax(teacher_BG, dim=1)
    share_BG = share_BG if batch.factor_B is None else share_BG * batch.factor_B[:, None]
    return (share_BG[batch.present_BG] * gap_BG).sum() / len(own_BG)


def _mean(loss_B: Tensor, batch: Targets) -> Tensor:
    """Mean over the queries, each times its factor."""
    return loss_B.mean() if batch.factor_B is None else (loss_B * batch.factor_B).mean()


def _own_scores(scores_BP: Tensor, batch: Targets) -> Tensor:
    return scores_BP.gather(1, batch.own_BG).masked_fill(~batch.present_BG, -torch.inf)


def _teacher(batch: Targets, temperature: float) -> Tensor:
    assert batch.teacher_BG is not None, "the trainer reads scores before it trains"
    return (batch.teacher_BG / temperature).masked_fill(~batch.present_BG, -torch.inf)


def accuracy(scores_BP: Tensor, batch: Targets) -> float:
    """Share of queries whose positive scores highest among all passages in their softmax."""
    best_B = scores_BP.masked_fill(batch.weights_BP == 0, -torch.inf).max(dim=1).values
    return (scores_BP.gather(1, batch.own_BG[:, :1]).squeeze(1) >= best_B).double().mean().item()
