"""`agentic-r train-retriever`: train the retriever on the groups (method section 5).

The output folder is a sentence-transformers model with `agentic_r.json` (formulation, prefixes, lengths), a model card
`README.md`, the training log `metrics.jsonl`, and `done.json`, which is written last. An interrupted run resumes from
its last checkpoint and ends with the same weights as an uninterrupted one.

On several devices of one node, set `processes=N` or start it with `torchrun --nproc-per-node N --no-python agentic-r
train-retriever ...`. Several nodes need torchrun's rendezvous and an output folder that all of them can access.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from agentic_r_plugin import child, components, compute
from agentic_r_plugin.config import deciding, save_config, to_dict
from agentic_r_plugin.errors import ConfigError, TrainingError
from agentic_r_plugin.hub import push_folder
from agentic_r_plugin.memory import bound_caches
from agentic_r_plugin.retriever import loss as losses
from agentic_r_plugin.retriever.batches import Example, read_examples, read_scores, require_reasoning
from agentic_r_plugin.retriever.card import write_card
from agentic_r_plugin.retriever.dev import METRICS
from agentic_r_plugin.retriever.distributed import barrier, from_first, process_group
from agentic_r_plugin.retriever.interpolation import interpolate
from agentic_r_plugin.retriever.loop import BEST, STATE, Training, peak_memory_bytes
from agentic_r_plugin.retriever.settings import TrainRetrieverConfig
from agentic_r_plugin.retriever.start import initial_retriever
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.storage.claim import MANIFEST, Claim, Output, require_new
from agentic_r_plugin.store import file_fingerprint

__all__ = ["TrainRetrieverConfig", "run", "run_apart", "train", "train_llm_embedder", "train_replug"]

DONE = "done.json"


def run(config: TrainRetrieverConfig, *, resume: bool = False) -> None:
    """Train with the registered trainer `config.trainer`, in this process or in `config.processes` new ones."""
    if config.processes > 1 and "WORLD_SIZE" not in os.environ:
        if not resume:
            require_new(config.out, folder=True)
        return run_apart(config)
    components.load("retriever_trainer", config.trainer)(config, resume=resume)


def run_apart(config: TrainRetrieverConfig) -> None:
    """`run` with resume in `config.processes` separate processes; raises the same errors."""
    child.run_command("train-retriever", config, processes=config.processes)


def train(config: TrainRetrieverConfig, *, resume: bool = False) -> Path:
    """InfoNCE over own, in-batch and other devices' negatives; returns the checkpoint's folder.

    Raises:
        OutputExistsError: the folder is not empty and `resume` is off.
        ManifestMismatchError: the folder was begun with other inputs or settings.
        RecordError: a group is broken, or a passage of it is not in the corpus.
        TrainingError: the loss is not finite.
        ConfigError: a tracker in `loggers` is not installed.
        BackendError: the upload to `push_to_hub` failed; the folder is complete.
    """
    return _train(config, losses.contrastive, resume=resume, from_scores=False)


def train_replug(config: TrainRetrieverConfig, *, resume: bool = False) -> Path:
    """REPLUG: fit the retriever's distribution over a group to that of the passages' scores (KL divergence).

    Reads `relevance`, `correctness` or both in addition to the groups; returns and raises as `train`.
    """
    loss = partial(losses.distillation, teacher_temperature=config.teacher_temperature)
    return _train(config, loss, resume=resume, from_scores=True)


def train_llm_embedder(config: TrainRetrieverConfig, *, resume: bool = False) -> Path:
    """LLM-Embedder: each passage is a positive, weighted by its score, against lower-scored ones and the batch.

    Reads `relevance`, `correctness` or both in addition to the groups; returns and raises as `train`.
    """
    loss = partial(losses.reward_weighted, teacher_temperature=config.teacher_temperature)
    return _train(config, loss, resume=resume, from_scores=True)


def _train(config: TrainRetrieverConfig, loss: losses.Loss, *, resume: bool, from_scores: bool) -> Path:
    if config.options:
        raise ConfigError(f"options: the trainer {config.trainer!r} has none, found {', '.join(config.options)}")
    if config.dev_metric not in METRICS:
        raise ConfigError(f"dev_metric {config.dev_metric!r}: expected one of {', '.join(METRICS)}")
    bound_caches()
    other_corpus = Corpus(config.elsewhere_corpus) if config.elsewhere_corpus else nullcontext()
    with Corpus(config.corpus) as corpus, other_corpus as other, process_group(config.device) as (rank, world):
        scores = read_scores(config.relevance, config.correctness) if from_scores else None
        examples = read_examples(config.groups, corpus, scores)
        dev = read_examples(config.dev_groups, corpus) if config.dev_groups else []
        there = other or corpus
        elsewhere = (there, read_examples(config.elsewhere_groups, there)) if config.elsewhere_groups else None
        retriever = initial_retriever(config)
        require_reasoning(retriever.record.formulation, (item.request for item in examples), "group", config.groups)
        output = Output(
            out=Path(config.out),
            made_from=_made_from(config, corpus, retriever, world),
            done=DONE,
            folder=True,
            at_end=frozenset({"interpolation"}),
        )
        # Only process 0 claims and writes the folder. The others learn from it whether the work is done already.
        with output.claim(resume=resume) if rank == 0 else nullcontext() as held:
            if not from_first(held.finished is not None if held else None):
                # Made before anything is written: it may refuse the settings (LoRA without peft).
                training = Training(config, corpus, retriever, loss, rank, world)
                _begin(config, output, held, rank)
                with training.trackers.running(output.out, to_dict(config)) if held else nullcontext():
                    training.restore()
                    training.fit(examples, dev, elsewhere)
                if held:
                    _finish(config, training, examples, held)
                barrier()  # no process returns before the folder is complete
            if held:
                # Also for a finished run, which may have been killed before this line.
                for name in (STATE, BEST):
                    (held.out / name).unlink(missing_ok=True)
                push_folder(config)
    return output.out


def _begin(config: TrainRetrieverConfig, output: Output, held: Claim | None, rank: int) -> None:
    if held:
        held.begin()
        save_config(config, output.out / "config.yaml")
    barrier()  # process 0 has written the manifest
    if not output.path(MANIFEST).is_file():
        raise TrainingError(f"process {rank} cannot see {output.out}, which process 0 created; use a shared disk")


def _finish(config: TrainRetrieverConfig, training: Training, examples: list[Example], held: Claim) -> None:
    """Write the retriever, its card and the done file."""
    if config.interpolation < 1:
        interpolate(training.model, initial_retriever(config).model, config.interpolation)
    training.retriever.save(held.out)
    done = _summary(config, training, examples)
    write_card(held.out, config, training.retriever.record, done)
    held.finish(done)


def _summary(config: TrainRetrieverConfig, training: Training, examples: list[Any]) -> dict[str, Any]:
    return {
        **({"interpolation": config.interpolation} if config.interpolation < 1 else {}),
        "steps": training.step,
        "groups": len(examples),
        "loss": training.last_loss,
        "best_step": training.kept_step,
        "processes": training.world,
        "device": str(training.model.device.type),
        "precision": compute.resolve(config.precision, training.model.device),
        "packed": training.encoder.packs,
        "attention_dropout": training.encoder.attention_dropout,
        "peak_memory_bytes": peak_memory_bytes(training.model.device),
        "groups_fingerprint": file_fingerprint(config.groups),
        "corpus_fingerprint": training.corpus.fingerprint(),
    }


def _made_from(config: TrainRetrieverConfig, corpus: Corpus, retriever: Retriever, world: int) -> dict[str, Any]:
    """Everything that the weights depend on."""
    files = {name: getattr(config, name) for name in ("groups", "relevance", "correctness", "dev_groups")}
    # Manifests of earlier versions do not have these entries, so they are left out where unset.
    later = {name: getattr(config, name) for name in ("elsewhere_groups", "elsewhere_corpus")}
    files |= {name: path for name, path in later.items() if path}
    return deciding(config) | {
        "precision": compute.resolve(config.precision, retriever.model.device),
        **{name: file_fingerprint(path) if path else None for name, path in files.items()},
        "corpus": corpus.fingerprint(),
        "retriever": retriever.fingerprint(),
        "processes": world,
    }
