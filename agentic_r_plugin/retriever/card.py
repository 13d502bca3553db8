"""The model card of a trained retriever: metadata for the hub, usage, data and settings, cost and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load
from sentence_transformers.util import load_file_path
from yaml import YAMLError

from agentic_r_plugin.hub import CARD
from agentic_r_plugin.retriever.dev import METRICS as DEV_METRICS
from agentic_r_plugin.retriever.loop import METRICS
from agentic_r_plugin.retriever.settings import TrainRetrieverConfig
from agentic_r_plugin.search.encoder import RetrieverRecord, resolve
from agentic_r_plugin.store import read_lines

_BUILTIN = {"builtin:minilm": "sentence-transformers/all-MiniLM-L6-v2"}
"""Model of a package -> its name on the hub."""

_POOLS = {
    "dev": "held-out groups",
    "corpus": "held-out groups, whole corpus",
    "elsewhere": "held-out groups of another set",
}
"""Prefix of a metric -> what was searched."""


def write_card(folder: Path, config: TrainRetrieverConfig, record: RetrieverRecord, done: dict[str, Any]) -> None:
    """Write the card from the settings, the record and the training log in `folder`."""
    lines = [line for _, line in read_lines(folder / METRICS)]
    measured = {line["step"]: line for line in lines if line.keys() & set(DEV_METRICS)}
    kept = measured.get(done["best_step"], {})
    parts = (
        _head(config, record, done, kept),
        _use(record),
        _data(config, done),
        _costs(done, lines),
        _results(done, measured),
    )
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def header(
    base: str,
    out: str,
    *,
    pipeline_tag: str,
    tags: Sequence[str],
    datasets: Sequence[str],
    results: Mapping[str, Mapping[str, float]],
) -> str:
    """The YAML header of a model card, as sentence-transformers writes it.

    Args:
        base: the model that training started from: folder, hub name or built-in name.
        out: the trained model's folder.
        datasets: names on the hub.
        results: data -> metric, such as `cosine_ndcg@10` -> value.
    """
    known = _card_data(base)
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag=pipeline_tag,
        tags=["sentence-transformers", "agentic-search", *tags],
        base_model=_BUILTIN.get(base, known.get("base_model") if Path(base).is_dir() else base),
        datasets=list(datasets) or None,
        license=known.get("license"),
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        model_name=Path(out).name,
        eval_results=[
            EvalResult(
                task_type="information-retrieval",
                task_name="Information Retrieval",
                dataset_type="unknown",
                dataset_name=name,
                metric_type=metric,
                metric_name=metric.replace("_", " ").title(),
                metric_value=round(value, 4),
            )
            for name, values in results.items()
            for metric, value in values.items()
        ]
        or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _card_data(base: str) -> dict[str, Any]:
    """Metadata of a model's own card; empty if it has none."""
    path = load_file_path(resolve(base), CARD)
    try:
        return (metadata_load(path) if path else None) or {}
    except (ValueError, YAMLError):  # a broken card of the base model must not fail a finished training
        return {}


def _head(config: TrainRetrieverConfig, record: RetrieverRecord, done: dict[str, Any], kept: dict[str, Any]) -> str:
    results: dict[str, dict[str, float]] = {}
    # With interpolation, the weights that were measured are not those that are written.
    for name in DEV_METRICS if config.interpolation == 1 else ():
        if name in kept:
            pool, _, metric = name.replace("_at_", "@").partition("_")
            metric = f"{'cosine' if record.normalize else 'dot'}_{metric}"
            results.setdefault(_POOLS[pool], {})[metric] = kept[name]
    yaml = header(
        config.retriever,
        config.out,
        pipeline_tag="sentence-similarity",
        tags=["sentence-similarity", "feature-extraction", "dense", "retrieval", f"dataset_size:{done['groups']}"],
        datasets=config.datasets,
        results=results,
    )
    return (
        f"{yaml}\n\n# Retriever for agentic search\n\n"
        f"Trained from `{config.retriever}` by `agentic-r train-retriever` (trainer `{config.trainer}`), after "
        "Agentic-R (arXiv 2601.11888)."
    )


def _use(record: RetrieverRecord) -> str:
    rows = {
        "query formulation": f"`{record.formulation}`",
        "query prefix": f"`{record.query_prompt!r}`",
        "passage prefix": f"`{record.passage_prompt!r}`",
        "lengths": f"{record.query_max_length} tokens per query, {record.passage_max_length} per passage",
        "pooling": f"{record.pooling}{', vectors of length 1' if record.normalize else ''}",
    }
    return (
        "## Use\n\n"
        + table(rows)
        + "\n\nThe model's own prompts hold the prefixes: `model.encode_query(texts)`, `model.encode_document(texts)`; "
        'a passage is `"Title"\\ntext`. `agentic-r index` and `agentic-r serve` read everything from `agentic_r.json`.'
    )


def _data(config: TrainRetrieverConfig, done: dict[str, Any]) -> str:
    rows = {
        "groups": f"{done['groups']} of `{Path(config.groups).name}` ({done['groups_fingerprint']})",
        "corpus": f"`{Path(config.corpus).name}` ({done['corpus_fingerprint']})",
        "passages per group": config.group_size,
        "known false negatives": "masked" if config.mask_false_negatives else "kept",
        "batch": f"{config.batch_size} queries on each of {done['processes']} processes",
        "temperature": config.temperature,
        "learning rate": f"{config.learning_rate:g}, linear",
        "seed": config.seed,
    }
    if config.interpolation < 1:
        rows["weights"] = f"base + {config.interpolation:g} x (trained - base); results below are of the trained ones"
    return "## Data and settings\n\n" + table(rows) + "\n\nAll settings are in `config.yaml`."


def _costs(done: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    steps = [line for line in lines if "loss" in line]
    slots, passages = (sum(line[name] for line in steps) for name in ("slots", "passages"))
    rows = {
        "steps": done["steps"],
        "seconds in steps": round(sum(line["seconds"] for line in steps), 1),
        "tokens, of process 0": sum(line["tokens"] for line in steps),
        "passages encoded": f"{passages} for {slots} slots",
        "most memory of process 0": f"{done['peak_memory_bytes'] / 2**30:.2f} GiB ({done['device']})",
    }
    return "## Costs\n\n" + table(rows)


def _results(done: dict[str, Any], measured: dict[int, dict[str, Any]]) -> str:
    if not measured:
        return f"## Results\n\nLoss of the last step: {done['loss']:.4f}. Nothing was held out to measure on."
    first, kept = measured[min(measured)], measured[done["best_step"]]
    names = [name for name in DEV_METRICS if name in kept]
    table = ["| held-out groups | before | after |", "|---|---|---|"]
    table += [f"| {name} | {first[name]:.4f} | {kept[name]:.4f} |" for name in names]
    return f"## Results\n\nWeights of step {done['best_step']} of {done['steps']}.\n\n" + "\n".join(table)


def table(rows: dict[str, Any]) -> str:
    """Names and values as a Markdown table without a header."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
