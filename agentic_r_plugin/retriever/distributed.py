"""Several processes, one batch: who encodes what, and how vectors and gradients travel.

Every process knows the whole batch, since all draw it from the same seed; each encodes its queries and every N-th of
the distinct passages. Legend: P distinct passages of the batch, p of them encoded here, D dimensions, N processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from agentic_r_plugin.errors import ConfigError

_BUCKET_BYTES = 64 << 20


@contextmanager
def process_group(device: str = "auto") -> Iterator[tuple[int, int]]:
    """(rank, number of processes): of the group that is there, or that `torchrun` asks for.

    Tensors on the CPU travel over gloo, those on a GPU over NCCL.

    Args:
        device: what the processes train on; on GPUs each takes the one of its local rank.

    Raises:
        ConfigError: more processes on this machine than it has GPUs.
    """
    ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if ours:
        there = torch.cuda.is_available()
        if there and (device == "auto" or torch.device(device).type == "cuda"):
            _take_gpu(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if there else "gloo")
    try:
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    finally:
        if ours:
            dist.destroy_process_group()


def _take_gpu(local_rank: int) -> None:
    if local_rank >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"processes: expected at most one for each of this machine's GPUs ({count}), found a process of local rank "
            f"{local_rank}; set processes={count}, or device=cpu"
        )
    torch.cuda.set_device(local_rank)


def from_first(value: Any) -> Any:
    """What process 0 holds, on every process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather_objects(value: Any) -> list[Any]:
    """What every process holds, in order of their ranks, on every process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def share(count: int, rank: int, world: int) -> range:
    """Columns whose passages process `rank` encodes, of `count`."""
    return range(rank, count, world)


def gather_columns(mine_pD: Tensor, count: int, world: int) -> Tensor:
    """(P, D) vectors of all columns from those of each process' `share`; no gradients."""
    if world == 1:
        return mine_pD
    longest = -(-count // world)
    padded = F.pad(mine_pD, (0, 0, 0, longest - len(mine_pD))).contiguous()
    every = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(every, padded)
    return torch.stack(every, dim=1).flatten(0, 1)[:count]


def sum_columns(gradient_PD: Tensor, rank: int, world: int) -> Tensor:
    """(p, D) gradients of this process' columns, summed over all processes' losses."""
    if world == 1:
        return gradient_PD
    gradient_PD = gradient_PD.contiguous()
    dist.all_reduce(gradient_PD)
    return gradient_PD[rank::world]


def average_gradients(parameters: Iterable[torch.nn.Parameter], world: int) -> None:
    """Mean of each gradient over the processes, in buckets. All processes must hold the same gradients."""
    if world == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if bucket and (size >= _BUCKET_BYTES or parameter.grad.dtype != bucket[0].dtype):
            _average(bucket, world)
            bucket, size = [], 0
        bucket.append(parameter.grad)
        size += parameter.grad.numel() * parameter.grad.element_size()
    if bucket:
        _average(bucket, world)


def _average(gradients: list[Tensor], world: int) -> None:
    flat = torch.cat([item.flatten() for item in gradients])
    dist.all_reduce(flat)
    flat /= world
    for item, part in zip(gradients, flat.split([item.numel() for item in gradients]), strict=True):
        item.copy_(part.view_as(item))
