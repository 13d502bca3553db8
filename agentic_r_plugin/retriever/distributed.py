"""One batch over several processes: how the encoding is split, and how vectors and gradients are exchanged.

Every process draws the whole batch from the same seed. It encodes its own queries and every N-th of the distinct
passages. Legend: P distinct passages of the batch, p of them encoded here, D dimensions, N processes.
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
    """Yield (rank, number of processes) of the existing process group, or of a new one under `torchrun`.

    CPU tensors use gloo, GPU tensors NCCL.

    Args:
        device: training device; on GPUs each process takes the GPU of its local rank.

    Raises:
        ConfigError: there are more processes on this machine than GPUs.
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
    """Broadcast the value of process 0 to every process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def barrier() -> None:
    """Wait until every process has reached this call."""
    from_first(None)  # over gloo; `dist.barrier` would need a device for NCCL


def gather_objects(value: Any) -> list[Any]:
    """Gather the values of all processes, in rank order, on every process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def share(count: int, rank: int, world: int) -> range:
    """The columns out of `count` whose passages process `rank` encodes."""
    return range(rank, count, world)


def gather_columns(mine_pD: Tensor, count: int, world: int) -> Tensor:
    """(P, D) vectors of all columns, assembled from the `share` of each process; without gradients."""
    if world == 1:
        return mine_pD
    longest = -(-count // world)  # all_gather needs equal shapes, so shorter shares are padded
    padded = F.pad(mine_pD, (0, 0, 0, longest - len(mine_pD))).contiguous()
    every = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(every, padded)
    return torch.stack(every, dim=1).flatten(0, 1)[:count]  # interleaves the shares, which cuts off the padding


def sum_columns(gradient_PD: Tensor, rank: int, world: int) -> Tensor:
    """(p, D) gradients of this process' columns, summed over all processes' losses."""
    if world == 1:
        return gradient_PD
    gradient_PD = gradient_PD.contiguous()
    dist.all_reduce(gradient_PD)
    return gradient_PD[rank::world]


def average_gradients(parameters: Iterable[torch.nn.Parameter], world: int) -> None:
    """Average each gradient over the processes, in buckets. The same parameters must have gradients everywhere."""
    if world == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if parameter.grad is None:  # frozen (LoRA) or unused
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
