"""`agentic-r train-reranker`: a cross-encoder learns to rank the candidates of a query (LambdaLoss).

The label of a candidate is its relevance / 100, plus 1 if its correctness is 1. This is the order of the method
(section 4, step 6): correctness first, then relevance. A candidate without correctness counts as not correct, because
the stage stops at the first correct one. Queries whose candidates all have one label are left out.

The output folder is a `CrossEncoder` of sentence-transformers with `agentic_r.json` (formulation and length), a model
card `README.md`, the training log `metrics.jsonl`, and `done.json`, which is written last. An interrupted run resumes
from its last checkpoint. One device is used; `CUDA_VISIBLE_DEVICES` selects another one.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import CrossEncoder
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import LambdaLoss
from torch import nn
from transformers import TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from agentic_r_plugin import compute
from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, deciding, save_config, setting, to_dict
from agentic_r_plugin.data.selection import check_scored
from agentic_r_plugin.errors import ConfigError, RecordError, TrainingError
from agentic_r_plugin.hub import CARD, push_folder
from agentic_r_plugin.memory import bound_caches
from agentic_r_plugin.progress import progress
from agentic_r_plugin.query import DEFAULT_FORMULATION
from agentic_r_plugin.records import Candidates
from agentic_r_plugin.retriever.batches import Key, read_scores, require_reasoning
from agentic_r_plugin.retriever.card import header, table
from agentic_r_plugin.retriever.dev import ranking_metrics
from agentic_r_plugin.retriever.settings import TrainedModelConfig
from agentic_r_plugin.retriever.trackers import Trackers
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.cross_encoder import CrossEncoderReranker
from agentic_r_plugin.search.encoder import resolve
from agentic_r_plugin.search.rerank import order_of
from agentic_r_plugin.storage.claim import Output, require_new
from agentic_r_plugin.storage.fingerprints import path_fingerprint
from agentic_r_plugin.store import atomic_path, dump_line, file_fingerprint, read_records

DONE, METRICS = "done.json", "metrics.jsonl"
_HELD_OUT = 0.1
"""Share of the questions that are held out, for the figures before and after."""
_SHOWN = ("recall_at_1", "recall_at_3", "mrr_at_10", "ndcg_at_10")
_PAIRS = 32
"""Pairs of one forward pass in training."""


@dataclass(frozen=True, kw_only=True)
class TrainRerankerConfig(TrainedModelConfig):
    """Settings of `agentic-r train-reranker`."""

    candidates: str = setting("candidates file", BY_CONTENTS)
    corpus: str = setting("corpus of the candidates", BY_CONTENTS)
    out: str = setting("checkpoint folder to write", FREE)
    relevance: str = setting("relevance file", BY_CONTENTS, default="")
    correctness: str = setting("correctness file; correct candidates rank above all others", BY_CONTENTS, default="")
    model: str = setting(
        "cross-encoder or encoder to start from: folder, hub name, builtin:minilm",
        BY_CONTENTS,
        default="cross-encoder/ms-marco-MiniLM-L12-v2",
    )
    formulation: str = setting(
        f"registered query_formulation; empty: the checkpoint's record, else {DEFAULT_FORMULATION}", default=""
    )
    epochs: int = setting("passes over the queries", default=1)
    learning_rate: float = setting("peak, of AdamW; a tenth of the steps warms up", default=2e-5)
    batch_size: int = setting("queries per step", default=8)
    num_candidates: int = setting(
        "candidates per query: one with the highest label, others drawn; 0: all", LATER, default=0
    )
    device: str = setting("auto: cuda where there is one, else cpu", FREE, default="auto")
    seed: int = setting("of the held-out questions, a new head, order and dropout", default=0)

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "batch_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, found {getattr(self, name)}")
        if self.num_candidates < 0 or self.num_candidates == 1:
            raise ConfigError(f"num_candidates: expected 0 (all) or at least 2, found {self.num_candidates}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device {self.device!r}: expected auto, cpu or cuda (CUDA_VISIBLE_DEVICES selects one)")


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A query with its candidates, in retrieval order, and their labels."""

    key: Key
    request: SearchRequest
    passages: tuple[str, ...]
    labels: tuple[float, ...]

    @property
    def best(self) -> frozenset[int]:
        """Places of the candidates with the highest label."""
        return frozenset(place for place, label in enumerate(self.labels) if label == max(self.labels))


def read_labelled(config: TrainRerankerConfig) -> tuple[list[Labelled], dict[str, int]]:
    """All queries with an order to learn, and the number of those left out, by reason.

    Raises:
        ConfigError: neither relevance nor correctness is given.
        RecordError: a broken record, a candidate that was not scored, or no query is left.
    """
    if not config.relevance and not config.correctness:
        raise ConfigError("train-reranker learns from scores: give relevance=FILE, correctness=FILE, or both")
    relevance = read_scores(config.relevance, None) if config.relevance else None
    correct = read_scores(None, config.correctness) if config.correctness else {}
    found: list[Labelled] = []
    left_out = {"without_scores": 0, "without_order": 0}
    for query in read_records(config.candidates, Candidates):
        passages = tuple(passage.id for passage in query.passages)
        scores: Mapping[str, float] | None = relevance.get(query.key) if relevance is not None else {}
        if scores is None or (relevance is None and query.key not in correct):
            left_out["without_scores"] += 1
            continue
        if relevance is not None:
            check_scored(passages, scores)  # type: ignore[arg-type]
        known = correct.get(query.key, {})
        labels = tuple(scores.get(passage, 0.0) + known.get(passage, 0.0) for passage in passages)
        if len(set(labels)) < 2:
            left_out["without_order"] += 1
            continue
        found.append(Labelled(key=query.key, request=SearchRequest.of(query), passages=passages, labels=labels))
    if not found:
        raise RecordError(f"no query has candidates with different labels ({left_out})", path=config.candidates)
    return found, left_out


def held_out(queries: Sequence[Labelled], seed: int) -> tuple[list[Labelled], list[Labelled]]:
    """(queries to train on, queries held out): all queries of a question are on one side."""
    # Sorted, because the order of a set differs between processes.
    questions = sorted({query.key[0] for query in queries})
    count = max(1, round(_HELD_OUT * len(questions))) if len(questions) > 1 else 0
    drawn = set(random.Random(f"reranker {seed}").sample(questions, count))
    return [q for q in queries if q.key[0] not in drawn], [q for q in queries if q.key[0] in drawn]


def drawn(query: Labelled, count: int, seed: int) -> Labelled:
    """The query with its first candidate of the highest label and at most `count - 1` with lower ones; 0: unchanged."""
    if not count:
        return query
    below = [place for place in range(len(query.passages)) if place not in query.best]
    sampler = random.Random(f"reranker {seed} {query.key}")
    kept = sorted([min(query.best), *sampler.sample(below, min(count - 1, len(below)))])
    return replace(
        query,
        passages=tuple(query.passages[place] for place in kept),
        labels=tuple(query.labels[place] for place in kept),
    )


def measure(
    queries: Sequence[Labelled], corpus: Corpus, reranker: CrossEncoderReranker | None = None
) -> dict[str, float]:
    """Recall, MRR and nDCG of the candidates with the highest label, by `reranker` or in retrieval order."""
    orders = [list(range(len(query.passages))) for query in queries]
    if reranker is not None:
        texts = [[corpus.by_id(passage) for passage in query.passages] for query in queries]
        orders = [order_of(row) for row in reranker.score([query.request for query in queries], texts)]
    found = ranking_metrics(orders, [query.best for query in queries])
    return {name: found[name] for name in _SHOWN}


def run(config: TrainRerankerConfig, *, resume: bool = False) -> None:
    """Train, or continue an interrupted training.

    Raises:
        OutputExistsError: the folder is not empty and `resume` is off.
        ManifestMismatchError: the folder was begun with other inputs or settings.
        ConfigError: the model cannot be loaded, or no scores are given.
        RecordError: a record is broken, a candidate has no score or is not in the corpus, or nothing can be learned.
        TrainingError: the loss is not finite.
        BackendError: the upload to `push_to_hub` failed; the folder is complete.
    """
    out, trackers = Path(config.out), Trackers(config.loggers)
    if not resume:
        require_new(out, folder=True)
    bound_caches()
    queries, left_out = read_labelled(config)
    training, dev = held_out(queries, config.seed)
    with Corpus(config.corpus) as corpus:
        set_seed(config.seed)  # for a new head
        reranker = CrossEncoderReranker.load(
            resolve(config.model),
            formulation=config.formulation,
            untrained=DEFAULT_FORMULATION,
            device=config.device,
            new_head=True,
        )
        require_reasoning(reranker.record.formulation, (q.request for q in queries), "query", config.candidates)
        output = Output(out=out, made_from=_made_from(config, corpus, reranker), done=DONE, folder=True)
        with output.claim(resume=resume) as held:
            if held.finished is None:
                held.begin()
                save_config(config, out / "config.yaml")
                # Measured once: a resume finds the figures in the manifest.
                if dev and not held.noted("before"):
                    held.note(before={"retriever": measure(dev, corpus), "before": measure(dev, corpus, reranker)})
                chosen = [drawn(query, config.num_candidates, config.seed) for query in training]
                with trackers.running(out, to_dict(config)):
                    log = fit(
                        reranker.model,
                        _columns(chosen, corpus, reranker),
                        LambdaLoss(reranker.model, mini_batch_size=_PAIRS),
                        held.work,
                        epochs=config.epochs,
                        batch_size=config.batch_size,
                        learning_rate=config.learning_rate,
                        seed=config.seed,
                        on_log=trackers.log,
                    )
                measured = held.noted("before") | {"after": measure(dev, corpus, reranker)} if dev else {}
                reranker.save(out)
                with atomic_path(out / METRICS) as temporary:
                    temporary.write_bytes(b"".join(map(dump_line, log)))
                done = {"queries": len(training), "held_out": len(dev), **left_out, **log[-1], "measured": measured}
                _write_card(out, config, reranker, done)
                held.finish(done)
                print(summary(measured), flush=True)
            # Also for a finished run, which may have been killed before this line.
            shutil.rmtree(held.work, ignore_errors=True)
            push_folder(config)


def summary(measured: Mapping[str, Mapping[str, float]]) -> str:
    """The held-out figures in a line, and a warning if the reranker makes the retriever's order worse.

    >>> summary({"retriever": {"ndcg_at_10": 0.6}, "before": {"ndcg_at_10": 0.2}, "after": {"ndcg_at_10": 0.8}})
    'train-reranker: nDCG@10 of held-out queries 0.600 (retriever), 0.200 (before), 0.800 (after)'
    """
    if not measured:
        return "train-reranker: too few questions to hold some out, so nothing was measured"
    found = {name: figures["ndcg_at_10"] for name, figures in measured.items()}
    line = ", ".join(f"{value:.3f} ({name})" for name, value in found.items())
    worse = found["after"] <= found["retriever"]
    return f"train-reranker: nDCG@10 of held-out queries {line}" + (
        ": it ranks no better than the retriever, so searches with it will find less; train longer, on more queries, "
        "or from a trained cross-encoder (recipes/retriever/prepare_ms_marco.py)" if worse else ""
    )  # fmt: skip


def fit(
    model: CrossEncoder,
    columns: Mapping[str, list[Any]],
    loss: nn.Module,
    folder: Path,
    *,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    seed: int,
    save_steps: int = 50,
    on_log: Callable[[Mapping[str, Any]], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Train a cross-encoder in place with sentence-transformers' `CrossEncoderTrainer`; returns the log.

    Args:
        model: on the device that it is trained on.
        columns: texts and labels, as `loss` expects them.
        folder: for checkpoints; training continues from the last whole one.
        epochs, batch_size, learning_rate, seed: as in `TrainingArguments`; a tenth of the steps warms up.
        save_steps: steps between two checkpoints.
        on_log: called with each line of the log that has a loss.

    Raises:
        TrainingError: a loss is not finite.
    """
    device = str(model.device)
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=0.1,
        bf16=compute.fast_type(device) == "bfloat16",
        use_cpu=device == "cpu",
        save_steps=save_steps,
        save_total_limit=1,
        logging_steps=10,  # a divisor of save_steps: a logged loss is then the same after a resume
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    if arguments.n_gpu > 1:  # DataParallel cannot take texts
        arguments._n_gpu = 1
    trainer = CrossEncoderTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(dict(columns)),
        loss=loss,
        callbacks=[Progress(on_log)],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_whole_checkpoint(folder)
    trainer.train(resume_from_checkpoint=checkpoint)
    log = list(trainer.state.log_history)
    return log if checkpoint is None else _with_earlier(log, int(checkpoint.rpartition("-")[2]))


def _with_earlier(log: Sequence[Mapping[str, Any]], resumed: int) -> list[dict[str, Any]]:
    """The log of a training that went on from step `resumed`, whose last line then is about all steps.

    `Trainer` sums loss and time only of the steps after the checkpoint, but divides by the number of all steps.
    """
    *lines, last = (dict(line) for line in log)
    if before := [line for line in lines if "loss" in line and line["step"] <= resumed]:
        mean = sum(line["loss"] for line in before) / len(before)
        last["train_loss"] += mean * resumed / last["step"]
        seconds = last["train_runtime"] + before[-1].get("seconds", 0.0)  # none in a log of an earlier version
        for rate in ("train_samples_per_second", "train_steps_per_second"):
            last[rate] = round(last[rate] * last["train_runtime"] / seconds, 3)
        last["train_runtime"] = round(seconds, 4)
    return [*lines, last]


class Progress(TrainerCallback):
    """Progress with an estimate, the log, and an end to training whose loss is not finite.

    Adds to each line with a loss the `seconds` of training so far, with those before the checkpoint of a resume.
    """

    def __init__(self, log: Callable[[Mapping[str, Any]], None] = lambda line: None) -> None:
        self.log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shown = progress(total=state.max_steps, desc="training", unit="step", initial=state.global_step)
        self.shown.__enter__()
        earlier = [line.get("seconds", 0.0) for line in state.log_history if "loss" in line]
        self.started = time.monotonic() - (earlier[-1] if earlier else 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shown.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name in ("loss", "grad_norm"):
            value = float((logs or {}).get(name, 0.0))
            if value != value or abs(value) == float("inf"):
                raise TrainingError(
                    f"step {state.global_step}: {name} is {value}; train with a smaller learning_rate, or look for "
                    "broken data"
                )
        if "loss" in (logs or {}):
            state.log_history[-1]["seconds"] = round(time.monotonic() - self.started, 3)
            self.log({"step": state.global_step, **logs})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shown.__exit__(None, None, None)


def last_whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint; those that were not finished (their last file is missing) are removed."""
    while folder.is_dir() and (last := get_last_checkpoint(str(folder))) is not None:
        if (Path(last) / "trainer_state.json").is_file():
            return str(last)
        shutil.rmtree(last)
    return None


def _columns(queries: Sequence[Labelled], corpus: Corpus, reranker: CrossEncoderReranker) -> dict[str, list[Any]]:
    """The texts that the reranker reads when it serves, and their labels."""
    return {
        "query": [reranker.query_text(query.request) for query in queries],
        "passages": [[reranker.passage_text(corpus.by_id(passage)) for passage in q.passages] for q in queries],
        "labels": [list(query.labels) for query in queries],
    }


def _made_from(config: TrainRerankerConfig, corpus: Corpus, reranker: CrossEncoderReranker) -> dict[str, Any]:
    """Everything that the weights depend on."""
    files = {name: getattr(config, name) for name in ("candidates", "relevance", "correctness")}
    return deciding(config) | {
        **{name: file_fingerprint(path) if path else None for name, path in files.items()},
        "corpus": corpus.fingerprint(),
        "model": path_fingerprint(resolve(config.model)),
        "record": reranker.record.to_dict(),
        "precision": compute.fast_type(str(reranker.model.device)),
    }


def _write_card(
    folder: Path, config: TrainRerankerConfig, reranker: CrossEncoderReranker, done: Mapping[str, Any]
) -> None:
    """Write the model card."""
    measured = done["measured"]
    rows = {
        "query formulation": f"`{reranker.record.formulation}`",
        "passage": "title and text, one per line",
        "length": f"{reranker.record.max_length} tokens a pair",
        "queries": f"{done['queries']}, and {done['held_out']} held out",
        "labels": " + ".join(["relevance / 100"] * bool(config.relevance) + ["correctness"] * bool(config.correctness)),
        "loss": "LambdaLoss (NDCG-Loss2++)",
        **({"candidates per query": str(config.num_candidates)} if config.num_candidates else {}),
        "epochs, batch, learning rate, seed": f"{config.epochs}, {config.batch_size} queries, "
        f"{config.learning_rate:g}, {config.seed}",
    }
    figures = ["| held-out queries | " + " | ".join(measured) + " |", "|---" * (1 + len(measured)) + "|"]
    figures += [f"| {name} | " + " | ".join(f"{measured[of][name]:.4f}" for of in measured) + " |" for name in _SHOWN]
    results = {name.replace("_at_", "@"): measured["after"][name] for name in _SHOWN} if measured else {}
    yaml = header(
        config.model,
        config.out,
        pipeline_tag="text-ranking",
        tags=["cross-encoder", "reranker", f"dataset_size:{done['queries']}"],
        datasets=config.datasets,
        results={"held-out queries": results},
    )
    text = (
        f"{yaml}\n\n# Reranker for agentic search\n\n"
        f"Trained from `{config.model}` by `agentic-r train-reranker`. `agentic-r serve rerank.model=FOLDER` and every "
        "search with `search.rerank.model=FOLDER` read everything from `agentic_r.json`.\n\n"
        f"{table(rows)}\n\n" + ("\n".join(figures) if measured else "Nothing was held out to measure on.") + "\n"
    )
    (folder / CARD).write_text(text, encoding="utf-8")
