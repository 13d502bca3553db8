"""The loss against its formula in double precision, and over several processes."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from agentic_r_plugin.retriever.loss import allowed_passages, gather_passages, info_nce, masked_scores

ROWS, POSITIVES = [4, 9, 2, 7, 5], [9, 4, 9]
CO_POSITIVES = [frozenset({9, 2}), frozenset({4}), frozenset({9})]
TEMPERATURE = 0.01


def unit(count, seed, dtype=torch.float64):
    vectors = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=1).to(dtype).requires_grad_()


def by_hand(queries, passages):
    """-log softmax, written out; query 0 leaves out row 2, another positive of the same query."""
    total = 0.0
    for query, positive, others in zip(queries, POSITIVES, CO_POSITIVES, strict=True):
        kept = [j for j, row in enumerate(ROWS) if row == positive or row not in others]
        scores = torch.stack([query @ passages[j] / TEMPERATURE for j in kept])
        top = scores.max()
        total += top + torch.log(torch.exp(scores - top).sum()) - query @ passages[ROWS.index(positive)] / TEMPERATURE
    return total / len(queries)


def ours(queries, passages, rows=ROWS):
    positives, allowed = allowed_passages(rows, POSITIVES, CO_POSITIVES)
    return info_nce(masked_scores(queries, passages, allowed, TEMPERATURE), positives)


def test_loss_and_gradients_are_those_of_the_formula():
    queries, passages = unit(3, 0), unit(5, 1)
    expected = by_hand(queries, passages)
    expected_gradients = torch.autograd.grad(expected, (queries, passages))
    queries32, passages32 = unit(3, 0), unit(5, 1)
    loss = ours(queries32, passages32)
    gradients = torch.autograd.grad(loss, (queries32, passages32))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert gradients[1].abs().sum() > 1


def test_a_perfect_and_an_even_batch_have_known_losses():
    vectors = torch.eye(4, dtype=torch.float64)
    positives, allowed = allowed_passages(range(4), [0, 1, 2, 3], [frozenset({i}) for i in range(4)])
    assert info_nce(masked_scores(vectors, vectors, allowed, 0.01), positives).item() == pytest.approx(0, abs=1e-12)
    same = torch.ones(4, 1, dtype=torch.float64)
    assert info_nce(masked_scores(same, same, allowed, 0.01), positives).item() == pytest.approx(math.log(4))


def test_a_passage_of_two_processes_counts_once_and_padding_never():
    positives, allowed = allowed_passages([3, 8, -1, 8, 5, -1], [8], [frozenset({8})])
    assert positives.tolist() == [1]
    assert allowed.tolist() == [[True, True, False, False, True, False]]


def in_one_process(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    save_loss_and_gradients(rank, folder)  # every use of the group is gone when it returns
    gc.collect()
    dist.barrier()  # neither process takes the group down while the other still sends
    dist.destroy_process_group()


def save_loss_and_gradients(rank, folder):
    queries, passages = unit(3, 0), unit(5, 1)
    mine = [[0, 2], [1]][rank]
    columns = [[1, 0, 2], [3, 4]][rank]
    gathered, rows = gather_passages(passages[columns], [ROWS[j] for j in columns])
    positives, allowed = allowed_passages(rows, [POSITIVES[i] for i in mine], [CO_POSITIVES[i] for i in mine])
    loss = info_nce(masked_scores(queries[mine], gathered, allowed, TEMPERATURE), positives)
    gradients = torch.autograd.grad(loss, (queries, passages))
    torch.save((rows, loss.detach(), gradients), f"{folder}/{rank}.pt")


def test_two_processes_see_each_others_passages_and_send_gradients_back(tmp_path):
    commands = [[sys.executable, __file__, str(rank), str(tmp_path)] for rank in (0, 1)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    (rows, loss0, gradients0), (_, loss1, gradients1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert rows == [9, 4, 2, 7, 5, -1]
    queries, passages = unit(3, 0), unit(5, 1)
    losses = [by_hand_one(queries, passages, i) for i in range(3)]
    expected = (losses[0] + losses[2]) / 2 + losses[1]
    assert (loss0 + loss1).item() == pytest.approx(expected.item(), abs=1e-6)
    for found0, found1, wanted in zip(
        gradients0, gradients1, torch.autograd.grad(expected, (queries, passages)), strict=True
    ):
        torch.testing.assert_close(found0 + found1, wanted, atol=1e-6, rtol=1e-6)


def by_hand_one(queries, passages, i):
    kept = [j for j, row in enumerate(ROWS) if row == POSITIVES[i] or row not in CO_POSITIVES[i]]
    scores = torch.stack([queries[i] @ passages[j] / TEMPERATURE for j in kept])
    return torch.logsumexp(scores, 0) - queries[i] @ passages[ROWS.index(POSITIVES[i])] / TEMPERATURE


if __name__ == "__main__":
    in_one_process(int(sys.argv[1]), sys.argv[2])
