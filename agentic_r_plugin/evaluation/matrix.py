"""The matrix: all cells together, compared question by question, as JSON and as a Markdown table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from agentic_r_plugin import __version__
from agentic_r_plugin.evaluation.statistics import paired_difference
from agentic_r_plugin.store import read_json

COMPARED = ("agentic_em", "agentic_f1", "search_turns", "answer_recall_at_3", "gold_document_recall")
"""Metrics whose differences are tested."""

_PACKAGES = ("torch", "transformers", "flashrag-dev", "verl", "sentence-transformers", "faiss-cpu", "vllm", "numpy")

Result = Mapping[str, Any]


def versions() -> dict[str, str]:
    """Releases of what a result depends on."""
    found = {"agentic-r-plugin": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What it was run on."""
    import torch

    cpu_info = Path("/proc/cpuinfo")
    model = (
        next(
            (
                line.partition(":")[2].strip()
                for line in cpu_info.read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        )
        if cpu_info.is_file()
        else platform.processor()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": model, "cpus": os.cpu_count(), "memory_gib": round(memory / 2**30, 1), "accelerators": accelerators}


def compare(
    results: Sequence[Result], folders: Mapping[str, Path], *, level: float, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Every pair of cells of one benchmark that share the agent or the retriever, metric by metric.

    The benchmark's first cell is compared with its last, too: what the whole run gave.

    Args:
        results: the cells.
        folders: each cell's folder, by `cell_name`.
    """
    comparisons = []
    for first, second in combinations(results, 2):
        same = [key for key in ("agent", "retriever") if first[key] == second[key]]
        of_benchmark = [result for result in results if result["benchmark"] == first["benchmark"]]
        corners = first is of_benchmark[0] and second is of_benchmark[-1]
        if first["benchmark"] != second["benchmark"] or not (same or corners):
            continue
        before, after = (read_json(folders[cell_name(result)] / "scores.json") for result in (first, second))
        metrics = {
            name: _difference(before, after, name, level=level, resamples=resamples, seed=seed)
            for name in COMPARED
            if name in before and name in after
        }
        comparisons.append(
            {
                "benchmark": first["benchmark"],
                "fixed": same[0] if same else None,
                "first": {key: first[key] for key in ("agent", "retriever")},
                "second": {key: second[key] for key in ("agent", "retriever")},
                "metrics": {name: found for name, found in metrics.items() if found is not None},
            }
        )
    return comparisons


def cell_name(result: Result) -> str:
    """Name of the folder of a cell's result."""
    return f"{result['agent']}-{result['retriever']}-{result['benchmark']}"


def _difference(first: Result, second: Result, name: str, **options: Any) -> dict[str, Any] | None:
    """Difference on the questions that both answered and that the metric speaks about."""
    before = {key: score for key, score in zip(first["id"], first[name], strict=True) if score is not None}
    after = {key: score for key, score in zip(second["id"], second[name], strict=True) if score is not None}
    shared = [key for key in before if key in after]
    if not shared:
        return None
    found = paired_difference([before[key] for key in shared], [after[key] for key in shared], **options)
    return asdict(found) | {"beyond_chance": found.beyond_chance}


_COLUMNS = (
    ("agentic_em", "EM", 100.0),
    ("agentic_f1", "F1", 100.0),
    ("search_turns", "search turns", 1.0),
    ("answer_recall_at_3", "answer recall@3", 100.0),
    ("gold_document_recall", "gold recall@3", 100.0),
)


def markdown_table(results: Iterable[Result]) -> str:
    """The cells as a Markdown table: EM with its interval, F1, search turns, answer recall at 3."""
    rows = [["benchmark", "agent", "retriever", "questions", *(title for _, title, _ in _COLUMNS)]]
    for result in results:
        row = [result["benchmark"], result["agent"], result["retriever"], str(result["num_questions"])]
        for name, _, scale in _COLUMNS:
            row.append(_figure(result["metrics"].get(name), scale, with_interval=name == "agentic_em"))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _figure(entry: Result | None, scale: float, *, with_interval: bool) -> str:
    if entry is None or entry["mean"] is None:
        return "–"
    digits = 1 if scale == 100.0 else 2
    text = f"{entry['mean'] * scale:.{digits}f}"
    if with_interval and "low" in entry:
        text += f" [{entry['low'] * scale:.{digits}f}, {entry['high'] * scale:.{digits}f}]"
    return text
