"""Export a checkpoint of verl's FSDP engine to a plain Hugging Face folder, bit for bit.

verl's own merger converts every weight to bfloat16, which would lose the small updates of float32 training.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from agentic_r_plugin.errors import TrainingError
from agentic_r_plugin.store import read_json

_PEFT = "base_model.model."
"""Prefix that PEFT adds to every parameter name."""


def export_model(checkpoint: Path, folder: Path) -> None:
    """Write `folder` (weights, configuration, tokenizer) from a checkpoint's `actor` or `critic` folder.

    The folder is written under a temporary name and then renamed, so it is never partial.

    Raises:
        TrainingError: the checkpoint is incomplete, or its weights do not fit its model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    source = checkpoint / "huggingface"
    if not source.is_dir():
        raise TrainingError(f"{checkpoint}: expected verl's checkpoint with a folder 'huggingface', found none")
    model_config = AutoConfig.from_pretrained(source)
    weights = with_adapters_merged(checkpoint, merged_weights(checkpoint))
    # A critic's checkpoint names the architecture of the agent it was made from, so it is recognised by its value head.
    is_critic = "score.weight" in weights
    auto = AutoModelForTokenClassification if is_critic else AutoModelForCausalLM
    if is_critic:
        model_config.num_labels = weights["score.weight"].shape[0]
    model_config.dtype = next(iter(weights.values())).dtype
    with torch.device("meta"):  # allocates nothing; the loaded tensors are assigned below
        model = auto.from_config(model_config)
    # Not strict: tied weights may be absent. `tie_weights` fills them; what stays on the meta device is missing.
    outcome = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    unfilled = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if unfilled or outcome.unexpected_keys:
        raise TrainingError(
            f"{checkpoint}: weights do not fit {type(model).__name__}: missing {unfilled[:5]}, "
            f"unknown {outcome.unexpected_keys[:5]}"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    model.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)  # an earlier export, if the run was extended
    partial.rename(folder)


def shard_files(checkpoint: Path) -> list[Path]:
    """Weight files of a checkpoint's `actor` or `critic` folder, in order of rank.

    Raises:
        TrainingError: a file is missing.
    """
    record = checkpoint / "fsdp_config.json"
    world_size = int(read_json(record)["world_size"]) if record.is_file() else 1
    files = [checkpoint / f"model_world_size_{world_size}_rank_{rank}.pt" for rank in range(world_size)]
    for file in (record, *files):
        if not file.is_file():
            raise TrainingError(
                f"{checkpoint}: {file.name} is missing, so the checkpoint is incomplete. With several machines, out "
                "must be on a shared disk"
            )
    return files


def merged_weights(checkpoint: Path) -> dict[str, Any]:
    """Load a sharded checkpoint and join its shards, keeping the precision of each weight.

    Raises:
        TrainingError: a shard is missing, or `join_shards` cannot join the shards.
    """
    import torch

    shards = [torch.load(file, map_location="cpu", weights_only=False) for file in shard_files(checkpoint)]
    return {name: join_shards(name, [shard[name] for shard in shards]) for name in shards[0]}


def with_adapters_merged(checkpoint: Path, weights: dict[str, Any]) -> dict[str, Any]:
    """Merge LoRA adapters into the base weights and restore the plain model's names; no adapters: no change.

    Raises:
        TrainingError: adapters without verl's record of their scale.
    """
    adapters = [name for name in weights if ".lora_A." in name]
    if not adapters:
        return weights
    record = checkpoint / "lora_train_meta.json"
    if not record.is_file():
        raise TrainingError(f"{checkpoint}: has LoRA adapters but no {record.name}, which gives their scale")
    meta = read_json(record)
    scale = meta["lora_alpha"] / meta["r"]
    # In PEFT's names a trained LAYER has LAYER.base_layer, LAYER.lora_A.NAME and LAYER.lora_B.NAME.
    merged = {
        name.removeprefix(_PEFT).replace(".base_layer.", "."): tensor
        for name, tensor in weights.items()
        if ".lora_" not in name
    }
    for name in adapters:
        layer = name.removeprefix(_PEFT).partition(".lora_A.")[0]
        down, up = weights[name], weights[name.replace(".lora_A.", ".lora_B.")]  # (rank, in), (out, rank)
        base = merged[f"{layer}.weight"]
        # The product is computed in float64 so that it is rounded only once, to the precision of the base weight.
        merged[f"{layer}.weight"] = base + (scale * (up.double() @ down.double())).to(base.dtype)
    return merged


def join_shards(name: str, parts: list[Any]) -> Any:
    """Join the parts of one tensor, given in order of rank; plain tensors are equal on every rank.

    Raises:
        TrainingError: the tensor is sharded along more than one dimension.
    """
    import torch
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(parts[0], DTensor):
        return parts[0]
    placements = parts[0].placements
    local = [part._local_tensor for part in parts]
    if all(placement.is_replicate() for placement in placements):
        return local[0]
    if len(placements) != 1 or not isinstance(placements[0], Shard):
        raise TrainingError(f"{name}: expected sharding along one dimension, found {placements}")
    return torch.cat(local, dim=placements[0].dim).contiguous()
