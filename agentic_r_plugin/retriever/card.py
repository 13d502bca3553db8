"""The model card of a trained retriever: usage, data and settings, cost and results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentic_r_plugin.retriever.dev import METRICS as DEV_METRICS
from agentic_r_plugin.retriever.loop import METRICS
from agentic_r_plugin.retriever.settings import TrainRetrieverConfig
from agentic_r_plugin.search.encoder import RetrieverRecord
from agentic_r_plugin.store import read_lines

CARD = "README.md"


def write_card(folder: Path, config: TrainRetrieverConfig, record: RetrieverRecord, done: dict[str, Any]) -> None:
    """Write the card from the settings, the record and the training log in `folder`."""
    lines = [line for _, line in read_lines(folder / METRICS)]
    parts = (_head(config), _use(record), _data(config, done), _costs(done, lines), _results(done, lines))
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _head(config: TrainRetrieverConfig) -> str:
    return (
        "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\ntags:\n- agentic-search\n"
        "- retrieval\n---\n\n# Retriever for agentic search\n\n"
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
        "learning rate": f"{config.learning_rate:g}, {config.schedule}",
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


def _results(done: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    measured = {line["step"]: line for line in lines if line.keys() & set(DEV_METRICS)}
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
