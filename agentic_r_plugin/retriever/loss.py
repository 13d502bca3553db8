"""The losses, over the distinct passages of a batch (method section 5 and the two trainers it is compared with).

Legend: B queries of this process, P distinct passages of the batch, G passages of a group, D dimensions.

A batch has B*G*N passage slots on N processes; a passage that stands in several slots is one column that counts as
often as it stands there, so every loss is that of the slots. With vectors q and d, s_ij = q_i . d_j / t, positive p(i),
and w_ij the number of slots of query i's softmax that hold passage j:

    contrastive_i  = log( sum_j w_ij exp(s_ij) ) - s_ip(i)

In the paper w_ij counts every slot of the whole batch, all devices taken together. With known false negatives masked,
a query's known positives are left out, but for its own positive, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from agentic_r_plugin.retriever.batches import Batch


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a loss knows of a batch beside the scores."""

    weights_BP: Tensor
    """w_ij: slots of query i's softmax that hold passage j."""
    own_BG: Tensor
    """Columns of the query's group, its positive first; 0 where `present_BG` is off."""
    present_BG: Tensor
    """Off where a group is shorter than the longest."""
    teacher_BG: Tensor | None
    """Scores of the group's passages; None for losses that need none."""

    def to(self, like: Tensor) -> Targets:
        """On the device, and with the numbers' type, of `like`."""
        return Targets(
            weights_BP=self.weights_BP.to(like),
            own_BG=self.own_BG.to(like.device),
            present_BG=self.present_BG.to(like.device),
            teacher_BG=None if self.teacher_BG is None else self.teacher_BG.to(like),
        )


_NOTHING = -1e30
"""Logarithm of no slot where a softmax may be empty; minus infinity would give gradients that are not numbers."""

Loss = Callable[[Tensor, Targets], Tensor]
"""(scores (B, P), targets) -> mean loss of the queries."""


def targets(batch: Batch, *, mask_false_negatives: bool) -> Targets:
    """Slots, groups and scores of a batch's own queries."""
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
            weights[i, column[item.positive]] = 1
        if teacher is not None and item.scores is not None:
            teacher[i, : len(columns)] = torch.tensor(item.scores, dtype=torch.float64)
    return Targets(weights_BP=weights, own_BG=own, present_BG=present, teacher_BG=teacher)


def similarities(queries_BD: Tensor, passages_PD: Tensor, temperature: float) -> Tensor:
    """(B, P) inner products over temperature."""
    return queries_BD @ passages_PD.T / temperature


def contrastive(scores_BP: Tensor, batch: Targets) -> Tensor:
    """InfoNCE over all slots of the batch (the paper's loss)."""
    positive_B = scores_BP.gather(1, batch.own_BG[:, :1]).squeeze(1)
    return (torch.logsumexp(scores_BP + batch.weights_BP.log(), dim=1) - positive_B).mean()


def distillation(scores_BP: Tensor, batch: Targets, *, teacher_temperature: float) -> Tensor:
    """REPLUG: KL divergence from the retriever's distribution over the group to the teacher's.

        loss_i = sum over g of P_ig (log P_ig - log T_ig),  P = softmax_g(s), T = softmax_g(teacher / temperature)

    The group alone counts; other passages of the batch do not.
    """
    ours_BG = F.log_softmax(_own_scores(scores_BP, batch), dim=1)
    teacher_BG = F.log_softmax(_teacher(batch, teacher_temperature), dim=1)
    difference_BG = (ours_BG - teacher_BG).masked_fill(~batch.present_BG, 0.0)
    return (ours_BG.exp() * difference_BG).sum(dim=1).mean()


def reward_weighted(scores_BP: Tensor, batch: Targets, *, teacher_temperature: float) -> Tensor:
    """LLM-Embedder: each passage of the group is a positive against those of lower score and the other groups' slots.

        loss_i = sum over g of T_ig (log( exp(s_ig) + sum over h with lower score of exp(s_ih)
                                          + sum over j of the other groups of u_ij exp(s_ij) ) - s_ig)

    T = softmax_g(teacher / temperature), u_ij the slots of the other groups that hold passage j.
    """
    own_BG = _own_scores(scores_BP, batch)
    teacher_BG = _teacher(batch, teacher_temperature)
    slots_BP = torch.zeros_like(batch.weights_BP).scatter_add_(1, batch.own_BG, batch.present_BG.to(batch.weights_BP))
    others_BP = (batch.weights_BP - slots_BP).clamp(min=0).log().clamp(min=_NOTHING)
    others_B = torch.logsumexp(scores_BP + others_BP, dim=1)
    lower_BGG = teacher_BG[:, None, :] < teacher_BG[:, :, None]
    rivals_BGG = own_BG[:, None, :].expand_as(lower_BGG).masked_fill(~lower_BGG, -torch.inf)
    parts = torch.cat((own_BG[:, :, None], rivals_BGG, others_B[:, None, None].expand(*own_BG.shape, 1)), dim=2)
    gap_BG = (torch.logsumexp(parts, dim=2) - own_BG)[batch.present_BG]
    return (F.softmax(teacher_BG, dim=1)[batch.present_BG] * gap_BG).sum() / len(own_BG)


def _own_scores(scores_BP: Tensor, batch: Targets) -> Tensor:
    return scores_BP.gather(1, batch.own_BG).masked_fill(~batch.present_BG, -torch.inf)


def _teacher(batch: Targets, temperature: float) -> Tensor:
    assert batch.teacher_BG is not None, "the trainer reads scores before it trains"
    return (batch.teacher_BG / temperature).masked_fill(~batch.present_BG, -torch.inf)


def accuracy(scores_BP: Tensor, batch: Targets) -> float:
    """Share of the queries whose positive scores highest among all passages of their softmax."""
    best_B = scores_BP.masked_fill(batch.weights_BP == 0, -torch.inf).max(dim=1).values
    return (scores_BP.gather(1, batch.own_BG[:, :1]).squeeze(1) >= best_B).double().mean().item()
