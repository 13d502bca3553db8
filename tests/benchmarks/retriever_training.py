"""Our trainer against sentence-transformers on the same batches: samples per second and peak memory.

    OMP_NUM_THREADS=2 python tests/benchmarks/retriever_training.py --groups runs/groups.jsonl --corpus corpus.jsonl

Variants, all with the same model, batches, precision, optimizer and clipping: `ours`; `ours, nothing kept` (every text
encoded twice); `cached` (CachedMultipleNegativesRankingLoss with mini-batches of 32 texts, its default); `cached,
tokens` (the same with mini-batches of as many tokens as ours); `plain` (MultipleNegativesRankingLoss).

One process; the variants take turns step by step, the first turn warms up and is not counted. A sample is a query with
its group. Peak memory is what a step adds to the resident memory before it (on CUDA: to the allocated memory). Dropout
is off, so all variants compute the same: first, one step in float32 at the smallest batch size, and where the losses do
not agree, the command fails. (In bfloat16 they do not: sentence-transformers takes the scores in bfloat16 then, ours
are float32.)
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

from agentic_r_plugin.retriever import loss as losses
from agentic_r_plugin.retriever.batches import Batch, epoch_batches, read_examples
from agentic_r_plugin.retriever.loop import Training
from agentic_r_plugin.retriever.settings import TrainRetrieverConfig
from agentic_r_plugin.retriever.start import initial_retriever
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever, autocast

_CHECK_TEMPERATURE = 0.2
"""High enough that the loss of an easy batch is far from 0."""
VARIANTS = ("ours", "ours, nothing kept", "cached", "cached, tokens", "plain")


@dataclass
class Measured:
    """One variant at one batch size."""

    step: Callable[[Batch], float]
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def settings(args: argparse.Namespace, **changes: object) -> TrainRetrieverConfig:
    """Ours, for a variant."""
    return TrainRetrieverConfig(
        groups=str(args.groups), corpus=str(args.corpus), out="unused", retriever=args.retriever, preset=args.preset,
        group_size=args.group_size, temperature=args.temperature, query_max_length=args.max_length,
        passage_max_length=args.max_length, precision=args.precision, mini_batch_tokens=args.mini_batch_tokens,
        device=args.device, **changes,
    )  # fmt: skip


def our_step(args: argparse.Namespace, corpus: Corpus, kept_tokens: int | None) -> Callable[[Batch], float]:
    """The step of the trainer itself."""
    config = settings(args, kept_tokens=kept_tokens)
    run = Training(config, corpus, initial_retriever(config), losses.contrastive, rank=0, world=1)
    without_dropout(run.model)
    return lambda batch: run._train_step(batch, total=10**6)["loss"]


def their_step(args: argparse.Namespace, corpus: Corpus, variant: str) -> Callable[[Batch], float]:
    """A step as their trainer makes it: a column of texts for the query, the positive and each negative."""
    retriever = initial_retriever(settings(args))
    model = retriever.model
    without_dropout(model)
    scale = 1 / args.temperature
    if variant == "plain":
        loss_module: torch.nn.Module = MultipleNegativesRankingLoss(model, scale=scale)
    else:
        tokens = args.mini_batch_tokens if variant == "cached, tokens" else None
        loss_module = CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_num_tokens=tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
    labels = torch.empty(0)

    def step(batch: Batch) -> float:
        optimizer.zero_grad(set_to_none=True)
        features = [move(item, model.device) for item in columns(retriever, corpus, batch)]
        with autocast(model.device, args.precision):
            loss = loss_module(features, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def columns(retriever: Retriever, corpus: Corpus, batch: Batch) -> list[dict[str, torch.Tensor]]:
    """Padded features of each column."""
    record = retriever.record
    texts = [[retriever.query_text(item.request) for item in batch.examples]]
    groups = [(item.positive, *item.negatives) for item in batch.examples]
    texts += [[corpus[row].contents for row in column] for column in zip(*groups, strict=True)]
    prompts = [record.query_prompt, *[record.passage_prompt] * (len(texts) - 1)]
    return [
        retriever.model.preprocess(column, prompt=prompt or None) for column, prompt in zip(texts, prompts, strict=True)
    ]


def move(features: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {key: item.to(device) if isinstance(item, torch.Tensor) else item for key, item in features.items()}


def without_dropout(model: torch.nn.Module) -> None:
    """Training mode without dropout, so that every variant computes the same numbers."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


# --- measuring


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {name} in /proc/self/status: peak memory needs Linux, or CUDA")


def timed(measured: Measured, batch: Batch, device: str) -> None:
    """One step, with its time and its peak over what was there before."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
        before = resident("VmRSS")
    started = time.perf_counter()
    measured.losses.append(measured.step(batch))
    if device == "cuda":
        torch.cuda.synchronize()
    measured.seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    measured.peaks.append(peak - before)


def measure(args: argparse.Namespace, corpus: Corpus, batch_size: int) -> dict[str, Measured]:
    """All variants at one batch size, taking turns."""
    examples = read_examples(args.groups, corpus)
    batches = list(epoch_batches(examples, epoch=0, seed=0, batch_size=batch_size, group_size=args.group_size))
    if len(batches) < args.steps + 1:
        raise SystemExit(f"{len(examples)} groups are too few for {args.steps + 1} batches of {batch_size}")
    names = [name for name in args.variants if not skipped(args, name, batch_size)]
    found = {name: Measured(step=make_step(args, corpus, name)) for name in names}
    for batch in batches[: args.steps + 1]:
        for measured in found.values():
            timed(measured, batch, args.device)
    slots = [sum(batch.counts) for batch in batches[1 : args.steps + 1]]
    distinct = [len(batch.rows) for batch in batches[1 : args.steps + 1]]
    print(f"batch {batch_size}: {sum(slots)} passage slots hold {sum(distinct)} distinct passages", flush=True)
    return found


def make_step(args: argparse.Namespace, corpus: Corpus, name: str) -> Callable[[Batch], float]:
    """A variant with a fresh model."""
    if name in VARIANTS[2:]:
        return their_step(args, corpus, name)
    return our_step(args, corpus, None if name == "ours" else 0)


def check_agreement(args: argparse.Namespace, corpus: Corpus) -> None:
    """All variants give the same loss for one batch in float32."""
    exact = argparse.Namespace(**vars(args) | {"precision": "float32", "temperature": _CHECK_TEMPERATURE})
    examples, size = read_examples(args.groups, corpus), min(args.batch_sizes)
    batch = next(epoch_batches(examples, epoch=0, seed=0, batch_size=size, group_size=args.group_size))
    found = {name: make_step(exact, corpus, name)(batch) for name in args.variants}
    if max(found.values()) - min(found.values()) > args.tolerance:
        raise SystemExit(f"the variants compute different things: {found}")
    print(f"losses of the first batch in float32: {found}", flush=True)


def skipped(args: argparse.Namespace, name: str, batch_size: int) -> bool:
    """The plain loop holds the graph of the whole batch; it is left out where that would not fit."""
    return name == "plain" and batch_size > args.plain_up_to


def main() -> None:
    """Print a table and, with --out, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", required=True, type=Path)
    parser.add_argument("--corpus", required=True, type=Path)
    parser.add_argument("--retriever", default="builtin:minilm")
    parser.add_argument("--preset", default="auto")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256, help="tokens of queries and passages")
    parser.add_argument("--temperature", type=float, default=0.02)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--mini-batch-tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each variant and batch size")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--plain-up-to", type=int, default=16, help="largest batch of the plain loop")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="between the variants' losses in float32")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    lines = []
    with Corpus(args.corpus) as corpus:
        check_agreement(args, corpus)
        for batch_size in args.batch_sizes:
            found = measure(args, corpus, batch_size)
            ours = statistics.median(found["ours"].seconds[1:]) if "ours" in found else float("nan")
            for name, measured in found.items():
                seconds = statistics.median(measured.seconds[1:])
                lines.append(
                    {
                        "batch": batch_size,
                        "variant": name,
                        "samples_per_s": batch_size / seconds,
                        "ours_is_faster_by": seconds / ours,
                        "peak_mib": max(measured.peaks[1:]) / 2**20,
                        "seconds": measured.seconds,
                        "losses": measured.losses,
                    }
                )
            del found
    print(f"{torch.get_num_threads()} threads, {args.device}, {args.retriever}, groups of {args.group_size}\n")
    print("| batch | variant | samples/s | ours is faster by | peak of a step, MiB |\n|---|---|---|---|---|")
    for line in lines:
        print(
            f"| {line['batch']} | {line['variant']} | {line['samples_per_s']:.2f} | {line['ours_is_faster_by']:.2f} | "
            f"{line['peak_mib']:.0f} |"
        )
    if args.out:
        args.out.write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
