"""Recall, MRR and nDCG of a retriever on held-out groups, before, during and after training.

The search runs over the passages of the held-out groups (`dev_...`) and, if requested, over the whole corpus
(`corpus_...`). Groups of another set are measured in the same way (`elsewhere_...`). Shapes: Q queries, P passages, K
ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from agentic_r_plugin.retriever.batches import Example
from agentic_r_plugin.retriever.distributed import gather_objects
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever

RECALL_AT = (1, 3, 10, 20)
_TOP, _CHUNK = max(RECALL_AT), 512
_NAMES = (*(f"recall_at_{k}" for k in RECALL_AT), "mrr_at_10", "ndcg_at_10")

METRICS = tuple(f"{pool}_{name}" for pool in ("dev", "corpus", "elsewhere") for name in _NAMES)
"""All metric names that the training log may hold."""


def ranking_metrics(found: Sequence[Sequence[int]], relevant: Sequence[frozenset[int]]) -> dict[str, float]:
    """Mean of each metric over the queries.

    Args:
        found: results of each query, best first.
        relevant: relevant items of each query; never empty.

    >>> metrics = ranking_metrics([[4, 7, 9]], [frozenset({7, 8})])
    >>> metrics["recall_at_1"], metrics["recall_at_3"], metrics["mrr_at_10"], round(metrics["ndcg_at_10"], 4)
    (0.0, 0.5, 0.5, 0.3869)
    """
    sums = dict.fromkeys(_NAMES, 0.0)
    for ranking, wanted in zip(found, relevant, strict=True):
        places = [place for place, item in enumerate(ranking) if item in wanted]
        for k in RECALL_AT:
            sums[f"recall_at_{k}"] += sum(place < k for place in places) / len(wanted)
        if places and places[0] < 10:
            sums["mrr_at_10"] += 1 / (1 + places[0])
        # nDCG with a gain of 1 per relevant item: the ideal ranking begins with all of them.
        ideal = sum(1 / math.log2(2 + place) for place in range(min(10, len(wanted))))
        sums["ndcg_at_10"] += sum(1 / math.log2(2 + place) for place in places if place < 10) / ideal
    return {name: total / len(found) for name, total in sums.items()}


def measure(
    retriever: Retriever,
    corpus: Corpus,
    dev: Sequence[Example],
    *,
    pools: Sequence[str] = ("dev",),
    rank: int = 0,
    world: int = 1,
) -> dict[str, float]:
    """Metrics of the held-out groups; every process returns the same values. The processes split the passages.

    Groups of the same query count as one query with several relevant passages.

    Args:
        pools: pools to search: `dev`, `corpus` or both.
    """
    queries = list({item.key: item for item in dev}.values())
    relevant = [item.known_positives for item in queries]
    vectors_QD = torch.from_numpy(retriever.encode_queries([item.request for item in queries]))
    rows = list(dict.fromkeys(row for item in dev for row in (item.positive, *item.negatives)))
    members: dict[str, Sequence[int]] = {"dev": rows, "corpus": range(len(corpus))}
    found: dict[str, float] = {}
    for pool in pools:
        metrics = ranking_metrics(_search(retriever, corpus, vectors_QD, members[pool], rank, world), relevant)
        found |= {f"{pool}_{name}": value for name, value in metrics.items()}
    return found


def _search(
    retriever: Retriever, corpus: Corpus, vectors_QD: torch.Tensor, rows: Sequence[int], rank: int, world: int
) -> list[list[int]]:
    """The best rows of each query, best first. Memory does not grow with the number of rows."""
    scores_QK, rows_QK = torch.zeros(len(vectors_QD), 0), torch.zeros(len(vectors_QD), 0, dtype=torch.long)
    for start in range(rank * _CHUNK, len(rows), world * _CHUNK):
        chunk = rows[start : start + _CHUNK]
        passages_PD = torch.from_numpy(retriever.encode_passages([corpus[row] for row in chunk]))
        scores_QK, rows_QK = _best(
            torch.cat((scores_QK, vectors_QD @ passages_PD.T), dim=1),
            torch.cat((rows_QK, torch.tensor(chunk).expand(len(vectors_QD), -1)), dim=1),
        )
    # The best rows overall are among the best rows of the processes, so only those are exchanged.
    parts = gather_objects((scores_QK.numpy(), rows_QK.numpy()))
    scores_QK, rows_QK = (torch.from_numpy(np.concatenate([part[i] for part in parts], axis=1)) for i in (0, 1))
    found: list[list[int]] = _best(scores_QK, rows_QK)[1].tolist()
    return found


def _best(scores_QP: torch.Tensor, rows_QP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    best = scores_QP.topk(min(_TOP, scores_QP.shape[1]), dim=1)
    return best.values, rows_QP.gather(1, best.indices)
