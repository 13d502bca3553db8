"""The contrastive loss of the retriever (method section 5), over the distinct passages of a batch.

Legend: B queries of this process, P distinct passages of the batch, D dimensions, N processes.

For query i with positive p(i), vectors q and d of length 1, and temperature t:

    loss_i = -log( exp(q_i . d_p(i) / t) / sum over j in S_i of exp(q_i . d_j / t) )

S_i holds every distinct passage of the whole batch, all processes taken together: the query's own negatives, the other
groups' passages, and the positive once. Left out are passages that another group of the same query has as its positive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def info_nce(scores_BP: Tensor, positives_B: Tensor) -> Tensor:
    """Mean of loss_i over the queries; scores from `masked_scores`, positives as columns."""
    return F.cross_entropy(scores_BP, positives_B)


def masked_scores(queries_BD: Tensor, passages_PD: Tensor, allowed_BP: Tensor, temperature: float) -> Tensor:
    """(B, P) inner products over temperature; minus infinity outside S_i."""
    return (queries_BD @ passages_PD.T / temperature).masked_fill(~allowed_BP, -torch.inf)


def allowed_passages(
    rows: Sequence[int], positive_rows: Sequence[int], co_positive_rows: Sequence[frozenset[int]]
) -> tuple[Tensor, Tensor]:
    """Columns of the positives (B) and S_i (B, P).

    Args:
        rows: corpus row of each of the P columns; a row may come twice when processes share a passage, and then only
            its first column counts. A negative row is padding.
        positive_rows: corpus row of each query's positive.
        co_positive_rows: rows that are positives of the same query in any group.
    """
    first: dict[int, int] = {}
    for column, row in enumerate(rows):
        if row >= 0:
            first.setdefault(row, column)
    allowed = torch.zeros(len(positive_rows), len(rows), dtype=torch.bool)
    allowed[:, list(first.values())] = True
    for query, (positive, others) in enumerate(zip(positive_rows, co_positive_rows, strict=True)):
        for row in others - {positive}:
            if row in first:
                allowed[query, first[row]] = False
    return torch.tensor([first[row] for row in positive_rows]), allowed


def gather_passages(passages_PD: Tensor, rows: Sequence[int]) -> tuple[Tensor, list[int]]:
    """The passages of all processes, with gradients, and their corpus rows (-1: padding).

    Without `torch.distributed` they are returned as they are.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return passages_PD, list(rows)
    from torch.distributed.nn.functional import all_gather

    every: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, list(rows))
    longest = max(map(len, every))
    padded = F.pad(passages_PD, (0, 0, 0, longest - len(rows)))
    gathered = torch.cat(tuple(all_gather(padded.contiguous())))
    return gathered, [row for part in every for row in [*part, *[-1] * (longest - len(part))]]
