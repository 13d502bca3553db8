"""What each process does when `test_distributed.py` starts two of them by torchrun; results go to the folder given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from agentic_r_plugin.cli import main
from agentic_r_plugin.retriever import loss as losses
from agentic_r_plugin.retriever.batches import epoch_batches, read_examples
from agentic_r_plugin.retriever.distributed import average_gradients, process_group
from agentic_r_plugin.retriever.loop import Training
from agentic_r_plugin.retriever.settings import TrainRetrieverConfig
from agentic_r_plugin.retriever.start import initial_retriever
from agentic_r_plugin.search.corpus import Corpus


def gradients(settings: dict[str, Any], rank: int, world: int, *, cross_device: bool = True):
    """Loss and gradients of the first batch, 14 queries in all, with caching and packing."""
    config = TrainRetrieverConfig(
        **settings, out="unused", precision="float32", mini_batch_tokens=48, kept_tokens=48, cross_device=cross_device
    )
    with Corpus(config.corpus) as corpus:
        examples = read_examples(config.groups, corpus)
        batches = epoch_batches(
            examples,
            epoch=0,
            seed=0,
            batch_size=14 // world,
            group_size=4,
            cross_device=cross_device,
            rank=rank,
            world=world,
        )
        retriever = initial_retriever(config)
        retriever.model.eval()
        run = Training(config, corpus, retriever, losses.contrastive, rank, world)
        loss, _, _ = run.accumulate(next(batches))
    average_gradients(retriever.model.parameters(), world)
    return loss, {name: p.grad for name, p in retriever.model.named_parameters() if p.grad is not None}


def work(folder: Path, settings: dict[str, Any], arguments: list[str]) -> None:
    with process_group() as (rank, world):
        found = {
            "together": gradients(settings, rank, world),
            "alone": gradients(settings, rank, world, cross_device=False),
            "exit code of training": main(["train-retriever", *arguments]),
            "exit code where the output exists": main(["train-retriever", *arguments]),
        }
        torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    folder, base, groups, corpus, *arguments = sys.argv[1:]
    given = {"retriever": base, "groups": groups, "corpus": corpus, "temperature": 0.05}
    work(Path(folder), given, [*(f"{key}={given[key]}" for key in ("retriever", "groups", "corpus")), *arguments])
