"""`agentic-r train-retriever`: contrastive training on the groups (method section 5).

The output folder is a sentence-transformers model with `agentic_r.json` (formulation, prefixes, lengths), the loss
curve `metrics.jsonl`, and `done.json`, which is written last. An interrupted run goes on from its last checkpoint and
gives the same weights as one that was not interrupted.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from agentic_r_plugin import components
from agentic_r_plugin.config import fingerprint, save_config, to_dict
from agentic_r_plugin.errors import ManifestMismatchError, OutputExistsError
from agentic_r_plugin.retriever.batches import read_examples
from agentic_r_plugin.retriever.contrastive import STATE, Run
from agentic_r_plugin.retriever.settings import MAX_LENGTH, TrainRetrieverConfig
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.store import file_fingerprint, read_json, write_json

__all__ = ["TrainRetrieverConfig", "run", "train"]

DONE, _WORK = "done.json", "work.json"


def run(config: TrainRetrieverConfig, *, resume: bool = False) -> None:
    """Train with the registered trainer that `config` names."""
    components.load("retriever_trainer", config.trainer)(config, resume=resume)


def train(config: TrainRetrieverConfig, *, resume: bool = False) -> Path:
    """InfoNCE over own, in-batch and other devices' negatives; returns the checkpoint's folder.

    Under `torchrun`, each process takes its share of every batch.

    Raises:
        OutputExistsError: the folder is not empty and `resume` is off.
        ManifestMismatchError: the folder was begun with other inputs or settings.
        RecordError: a broken group, or one whose passage the corpus does not hold.
        TrainingError: a loss that is not finite.
    """
    out = Path(config.out)
    if not resume and out.exists() and any(out.iterdir()):
        raise OutputExistsError(f"{out} is not empty; choose another folder, remove it, or pass --resume to go on")
    with Corpus(config.corpus) as corpus, _process_group() as (rank, world):
        examples = read_examples(config.groups, corpus)
        dev = read_examples(config.dev_groups, corpus) if config.dev_groups else []
        retriever = _initial_retriever(config)
        key = _work_key(config, corpus, retriever, world)
        if _is_done(out, key):
            return out
        training = Run(config, corpus, retriever, rank, world)
        if rank == 0:
            _begin(out, key, config)
        training.restore()
        training.fit(examples, dev)
        if rank == 0:
            retriever.save(out)
            write_json(
                out / DONE, {"key": key, "steps": training.step, "groups": len(examples), "loss": training.last_loss}
            )
            (out / STATE).unlink(missing_ok=True)
            (out / _WORK).unlink()
    return out


def _initial_retriever(config: TrainRetrieverConfig) -> Retriever:
    retriever = Retriever.load(
        config.retriever, preset=config.preset, device=config.device, formulation=config.formulation
    )
    positions = getattr(retriever.model.config, "max_position_embeddings", None) or MAX_LENGTH
    lengths = min(config.query_max_length, positions), min(config.passage_max_length, positions)
    record = replace(retriever.record, query_max_length=lengths[0], passage_max_length=lengths[1])
    return Retriever(retriever.model, record, precision=config.precision, source=config.retriever)


def _work_key(config: TrainRetrieverConfig, corpus: Corpus, retriever: Retriever, world: int) -> str:
    """What the weights depend on."""
    settings = to_dict(config)
    for name in ("groups", "corpus", "out", "retriever", "device", "checkpoint_steps", "dev_groups"):
        settings.pop(name)
    return fingerprint(settings, file_fingerprint(config.groups), corpus.fingerprint(), retriever.fingerprint(), world)


def _is_done(out: Path, key: str) -> bool:
    if not (out / DONE).is_file():
        return False
    if read_json(out / DONE)["key"] != key:
        raise ManifestMismatchError(f"{out} holds a retriever trained on other inputs or settings; choose another out")
    return True


def _begin(out: Path, key: str, config: TrainRetrieverConfig) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if (out / _WORK).is_file() and read_json(out / _WORK) != {"key": key}:
        raise ManifestMismatchError(f"{out} was begun with other inputs or settings; remove it or choose another out")
    save_config(config, out / "config.yaml")
    write_json(out / _WORK, {"key": key})


class _process_group:
    """(rank, number of processes): of the group that is there, or that `torchrun` asks for."""

    def __enter__(self) -> tuple[int, int]:
        self._ours = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if self._ours:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def __exit__(self, *_: object) -> None:
        if self._ours:
            dist.destroy_process_group()
