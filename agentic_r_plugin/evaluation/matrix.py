"""The matrix of all cells, compared question by question, as JSON and as Markdown, CSV and LaTeX tables.

Not on pandas: `to_markdown` aligns and pads columns differently and needs tabulate; `to_latex` gives the same bytes,
but would save seven lines for a second of imports.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from agentic_r_plugin.evaluation.statistics import paired_difference
from agentic_r_plugin.store import atomic_path, read_json

COMPARED = ("agentic_em", "agentic_judge", "agentic_f1", "search_turns", "answer_recall_at_3", "gold_document_recall")
"""Metrics whose differences are tested for significance."""

Result = Mapping[str, Any]


def compare(results: Sequence[Result], out: Path, *, level: float, resamples: int, seed: int) -> list[dict[str, Any]]:
    """Paired comparisons of cells, metric by metric (`compared_pairs`); `out` holds the cells' folders."""
    comparisons = []
    for pair in compared_pairs(results):
        before, after = (read_json(out / cell_name(result) / "scores.json") for result in pair)
        found = {
            name: _difference(before, after, name, level=level, resamples=resamples, seed=seed)
            for name in COMPARED
            if name in before and name in after
        }
        metrics = {name: difference for name, difference in found.items() if difference is not None}
        comparisons.append({**pair_names(*pair), "metrics": metrics})
    return comparisons


def compared_pairs(results: Sequence[Result]) -> Iterator[tuple[Result, Result]]:
    """Pairs of a benchmark's cells that share the agent or the retriever, and its first cell with its last."""
    for first, second in combinations(results, 2):
        of_benchmark = [result for result in results if result["benchmark"] == first["benchmark"]]
        # In a loop the first cell is the untrained pair and the last the final one: the effect of the whole run.
        corners = first is of_benchmark[0] and second is of_benchmark[-1]
        shared = first["agent"] == second["agent"] or first["retriever"] == second["retriever"]
        if first["benchmark"] == second["benchmark"] and (shared or corners):
            yield first, second


def pair_names(first: Result, second: Result) -> dict[str, Any]:
    """Labels of a comparison: its benchmark, its two sides, and whether they share the agent or the retriever."""
    sides = ("agent", "retriever")
    return {
        "benchmark": first["benchmark"],
        "fixed": next((key for key in sides if first[key] == second[key]), None),
        "first": {key: first[key] for key in sides},
        "second": {key: second[key] for key in sides},
    }


def cell_name(result: Result) -> str:
    """Name of the cell's folder."""
    return f"{result['agent']}-{result['retriever']}-{result['benchmark']}"


def _difference(first: Result, second: Result, name: str, **options: Any) -> dict[str, Any] | None:
    """Paired difference over the questions for which both cells have a score; None if there are none."""
    before = {key: score for key, score in zip(first["id"], first[name], strict=True) if score is not None}
    after = {key: score for key, score in zip(second["id"], second[name], strict=True) if score is not None}
    shared = [key for key in before if key in after]
    if not shared:
        return None
    found = paired_difference([before[key] for key in shared], [after[key] for key in shared], **options)
    return asdict(found) | {"beyond_chance": found.beyond_chance}


_COLUMNS = (
    ("agentic_em", "EM", 100.0),
    ("agentic_judge", "judge", 100.0),
    ("agentic_f1", "F1", 100.0),
    ("search_turns", "search turns", 1.0),
    ("answer_recall_at_3", "answer recall@3", 100.0),
    ("gold_document_recall", "gold recall@3", 100.0),
)


def write_tables(results: Sequence[Result], out: Path) -> str:
    """Write `matrix.md`, `matrix.csv` and `matrix.tex` to `out`; returns the Markdown."""
    markdown = markdown_table(results)
    for suffix, text in (("md", markdown), ("csv", csv_table(results)), ("tex", latex_table(results))):
        with atomic_path(out / f"matrix.{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    return markdown


def csv_table(results: Iterable[Result]) -> str:
    """One line per cell and metric; shares are not scaled to per cent."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    where = ("benchmark", "split", "agent", "retriever")
    writer.writerow([*where, "metric", "mean", "low", "high", "num_questions"])
    for result in results:
        for name, entry in result["metrics"].items():
            figures = [entry["mean"], entry.get("low"), entry.get("high")]
            size = entry.get("num_questions", result["num_questions"])
            writer.writerow([*(result[key] for key in where), name, *figures, size])
    return stream.getvalue()


def latex_table(results: Sequence[Result]) -> str:
    """The paper's table: one row per agent and retriever, exact match in per cent per benchmark, and the mean.

    Intervals follow the figures in small type, and the best retriever of each agent is bold. Needs `booktabs`. There is
    no mean in a row that lacks a benchmark, nor in a table of a single benchmark.
    """
    benchmarks = list(dict.fromkeys(result["benchmark"] for result in results))
    rows: dict[tuple[str, str], dict[str, Result]] = {}
    for result in results:
        pair = (result["agent"], result["retriever"])
        rows.setdefault(pair, {})[result["benchmark"]] = result["metrics"]["agentic_em"]
    if len(benchmarks) > 1:
        for found in rows.values():
            if len(found) == len(benchmarks):
                means = [entry["mean"] for entry in found.values()]
                found["mean"] = {"mean": None if None in means else sum(means) / len(benchmarks)}
        benchmarks.append("mean")
    lines = [
        f"\\begin{{tabular}}{{ll{'r' * len(benchmarks)}}}",
        "\\toprule",
        " & ".join(["agent", "retriever", *map(_tex, benchmarks)]) + " \\\\",
        "\\midrule",
    ]
    for pair, found in rows.items():
        # Bold marks the best retriever for one agent, so only rows of the same agent compete.
        rivals = [other for (agent, _), other in rows.items() if agent == pair[0]]
        figures = [
            _tex_figure(found.get(name), [other[name] for other in rivals if name in other]) for name in benchmarks
        ]
        lines.append(" & ".join([*map(_tex, pair), *figures]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _tex(text: str) -> str:
    """Text with LaTeX's special letters escaped.

    >>> print(_tex("agentic_r & co"))
    agentic\\_r \\& co
    """
    return "".join("\\" + letter if letter in "&%$#_{}" else letter for letter in text)


def _tex_figure(entry: Result | None, rivals: Sequence[Result]) -> str:
    if entry is None or entry["mean"] is None:
        return "--"
    text = f"{entry['mean'] * 100:.2f}"
    if len(rivals) > 1 and entry["mean"] == max(rival["mean"] for rival in rivals if rival["mean"] is not None):
        text = f"\\textbf{{{text}}}"
    if "low" in entry:
        text += f" {{\\scriptsize [{entry['low'] * 100:.1f}, {entry['high'] * 100:.1f}]}}"
    return text


def matrix_folder(run: Path) -> Path | None:
    """Folder of `matrix.json` in the output of `iterate`, `experiment`, `evaluate` or `aggregate`; None if missing."""
    return next((folder for folder in (run / "evaluation", run) if (folder / "matrix.json").is_file()), None)


def markdown_table(results: Sequence[Result]) -> str:
    """The cells as a Markdown table with the metrics of `_COLUMNS`; the judge's column only if a cell has it."""
    columns = [item for item in _COLUMNS if item[0] != "agentic_judge" or any(item[0] in r["metrics"] for r in results)]
    rows = [["benchmark", "agent", "retriever", "questions", *(title for _, title, _ in columns)]]
    for result in results:
        row = [result["benchmark"], result["agent"], result["retriever"], str(result["num_questions"])]
        for name, _, scale in columns:
            with_interval = name in ("agentic_em", "agentic_judge")
            row.append(figure(result["metrics"].get(name), scale, with_interval=with_interval))
        rows.append(row)
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a Markdown table; the first row is the header. A `|` in a text is escaped.

    >>> print(markdown([["a", "b"], ["1", "long"]]), end="")
    | a | b    |
    |---|------|
    | 1 | long |
    """
    rows = [[text.replace("|", "\\|") for text in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def figure(entry: Result | None, scale: float = 100.0, *, with_interval: bool = False) -> str:
    """Format a metric for a table; a dash if it has no value, as for the exact match of unlabelled questions."""
    if entry is None or entry["mean"] is None:
        return "–"
    digits = 1 if scale == 100.0 else 2
    text = f"{entry['mean'] * scale:.{digits}f}"
    if with_interval and "low" in entry:
        text += f" [{entry['low'] * scale:.{digits}f}, {entry['high'] * scale:.{digits}f}]"
    return text
