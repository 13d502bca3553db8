"""Write the tables and figures of `RESULTS.md` from finished experiments.

    python docs/results.py add NAME OUT COMMIT COMMAND    # keep what COMMAND measured as docs/results/NAME.json
    python docs/results.py                                # write the tables of RESULTS.md, and docs/results/*.svg

OUT is an output folder of `agentic-r experiment`, `aggregate` or `evaluate`. In `RESULTS.md`, the table follows
`<!-- table: NAME -->` or `<!-- differences: NAME AGENT+RETRIEVER>AGENT+RETRIEVER ... -->` and ends at `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from agentic_r_plugin.evaluation.matrix import COMPARED
from agentic_r_plugin.report.charts import HEIGHT, WIDTH, Series, line_chart
from agentic_r_plugin.store import read_json, write_json

PAGE, KEPT = Path(__file__).with_name("RESULTS.md"), Path(__file__).with_name("results")
_BLOCK = re.compile(r"(<!-- (table|differences): (\S+)((?: \S+)*) -->\n).*?(<!-- end -->)", re.S)

Point = tuple[float, str, str, str, str]
"""x, and where y is: name of the experiment, benchmark, agent, retriever."""

_LIMITS, _WORLDS = (1, 2, 3, 4, 5), ("fictional_world", *(f"drift-{n}" for n in range(1, 6)))
FIGURES: dict[str, tuple[str, str, dict[str, list[Point]]]] = {
    "judge": (
        "Exact match by errors of the judge",
        "passages with an error, per cent",
        {
            f"{world}: {label}": [(0.0, experiment, "", "agent-1", perfect), (80.0, experiment, "", "agent-1", noisy)]
            for world, experiment in (("without causes", "no_causes"), ("with causes", "causes_seed_0"))
            for label, perfect, noisy in (
                ("with correctness", "full", "errors-8"),
                ("judge alone", "judge_alone", "errors-8-alone"),
            )
        },
    ),
    "search_turns": (
        "Exact match by limit of searches",
        "searches allowed",
        {
            name: [(float(n), "search_turns", "", f"agent-1-max-{n}", name) for n in _LIMITS]
            for name in ("bm25", "retriever-0", "retriever-1")
        },
    ),
    "domain_shift": (
        "Exact match in worlds that differ more and more",
        "step (0: the run's own world)",
        {
            name: [(float(n), "domain_shift", world, "agent-1", name) for n, world in enumerate(_WORLDS)]
            for name in ("retriever-0", "retriever-1")
        },
    ),
}
"""Name -> title, label of x, curves."""


def keep(name: str, out: Path, commit: str, command: str) -> None:
    """Write the figures of an experiment, without what is not shown, to `results/NAME.json`."""
    home = next(place for place in (out / "evaluation", out) if (place / "matrix.json").is_file())
    matrix = read_json(home / "matrix.json")
    made = read_json(out / "experiment.json")["retrievers"] if (out / "experiment.json").is_file() else {}
    provenance = matrix["cells"][0].get("provenance", matrix)
    write_json(
        KEPT / f"{name}.json",
        {
            "command": command,
            "commit": commit,
            "sources": provenance["source_fingerprint"],
            "seeds": matrix.get("num_seeds", 1),
            "cells": [
                {key: cell[key] for key in ("benchmark", "agent", "retriever", "num_questions")}
                | {"metrics": {key: _short(cell["metrics"][key]) for key in COMPARED if key in cell["metrics"]}}
                | {"made": made.get(cell["retriever"])}
                for cell in matrix["cells"]
            ],
            "comparisons": [
                {key: item[key] for key in ("benchmark", "first", "second")}
                | {"metrics": {key: _short(found) for key, found in item["metrics"].items()}}
                for item in matrix["comparisons"]
            ],
        },
    )


def _short(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Value and interval, to four digits."""
    found = {key: entry.get(key) for key in ("mean", "difference", "low", "high", "beyond_chance")}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items() if v is not None}


# --- Tables


def page() -> str:
    """`RESULTS.md` with its tables made again."""
    return _BLOCK.sub(_block, PAGE.read_text(encoding="utf-8"))


def _block(found: re.Match[str]) -> str:
    head, kind, name, arguments, end = found.groups()
    kept = read_json(KEPT / f"{name}.json")
    table = cells_table(kept) if kind == "table" else differences_table(kept, arguments.split())
    note = f"\n`{kept['command']}` at {kept['commit']} (sources {kept['sources']}).\n\n" if kind == "table" else "\n"
    return f"{head}{table}{note}{end}"


def cells_table(kept: Mapping[str, Any]) -> str:
    """A row per cell: exact match with its interval, F1, searches, recall; and what its retriever was made from."""
    benchmarks = dict.fromkeys(cell["benchmark"] for cell in kept["cells"])
    made = any(cell["made"] and cell["made"]["groups"] for cell in kept["cells"])
    titles = ["agent", "retriever", "EM", "F1", "searches", "answer recall@3", "gold recall@3"]
    rows = [[*(["benchmark"] if len(benchmarks) > 1 else []), *titles, *(["groups", "rollouts"] if made else [])]]
    for cell in kept["cells"]:
        found = cell["metrics"]
        row = [cell["benchmark"]] if len(benchmarks) > 1 else []
        row += [cell["agent"], cell["retriever"], figure(found["agentic_em"], "mean")]
        row += [f"{found[key]['mean'] * scale:.{digits}f}" for key, scale, digits in _PLAIN]
        if made:
            own = cell["made"] or {}
            row += [f"{value:,}" if (value := own.get(key)) is not None else "" for key in ("groups", "rollouts")]
        rows.append(row)
    return markdown(rows)


_PLAIN = (
    ("agentic_f1", 100, 1),
    ("search_turns", 1, 2),
    ("answer_recall_at_3", 100, 1),
    ("gold_document_recall", 100, 1),
)


def differences_table(kept: Mapping[str, Any], wanted: Sequence[str]) -> str:
    """A row per `AGENT+RETRIEVER>AGENT+RETRIEVER`: what the second has more than the first, over the same questions."""
    rows = [["from", "to", "EM", "searches", "gold recall@3", "beyond chance"]]
    for pair in wanted:
        before, after = pair.split(">")
        for benchmark, metrics in compared(kept, before, after):
            em, turns, gold = (metrics.get(key) for key in ("agentic_em", "search_turns", "gold_document_recall"))
            named = (("EM", em), ("searches", turns), ("recall", gold))
            beyond = ", ".join(name for name, entry in named if entry and entry["beyond_chance"])
            several = len({cell["benchmark"] for cell in kept["cells"]}) > 1
            rows.append(
                [
                    f"{benchmark}: {before}" if several else before,
                    after,
                    *(figure(entry, "difference", scale) for entry, scale in ((em, 100), (turns, 1), (gold, 100))),
                    beyond or "nothing",
                ]
            )
    return markdown(rows)


def compared(kept: Mapping[str, Any], before: str, after: str) -> list[tuple[str, dict[str, Any]]]:
    """Benchmark and differences of two cells, in the order asked for.

    Raises:
        SystemExit: the experiment did not compare them.
    """
    found = []
    for item in kept["comparisons"]:
        first, second = (f"{item[side]['agent']}+{item[side]['retriever']}" for side in ("first", "second"))
        if (first, second) == (before, after):
            found.append((item["benchmark"], item["metrics"]))
        elif (second, first) == (before, after):
            found.append((item["benchmark"], {key: _turned(entry) for key, entry in item["metrics"].items()}))
    if not found:
        raise SystemExit(f"{before}>{after}: not compared in {kept['command']}")
    return found


def _turned(entry: Mapping[str, Any]) -> dict[str, Any]:
    return dict(entry) | {"difference": -entry["difference"], "low": -entry["high"], "high": -entry["low"]}


def figure(entry: Mapping[str, Any] | None, key: str, scale: int = 100) -> str:
    """A value with its interval.

    >>> figure({"difference": 0.0512, "low": -0.01, "high": 0.1}, "difference")
    '+5.1 [-1.0, 10.0]'
    """
    if entry is None:
        return ""
    digits, sign = (1 if scale == 100 else 2), ("+" if key == "difference" else "")
    text = f"{entry[key] * scale:{sign}.{digits}f}"
    return f"{text} [{entry['low'] * scale:.{digits}f}, {entry['high'] * scale:.{digits}f}]" if "low" in entry else text


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows as a Markdown table; the first is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


# --- Figures


def figures() -> dict[str, str]:
    """File name -> SVG, for the figures whose experiments were kept."""
    found = {}
    for name, (title, x_label, curves) in FIGURES.items():
        series = [
            Series(name=label, points=_points(points), color=i, marked=True)
            for i, (label, points) in enumerate(curves.items())
        ]
        series = [one for one in series if one.points]
        if any(len(one.points) > 1 for one in series):
            svg = line_chart(title, series, x_label=x_label, y_label="EM, per cent", y_range=(0, None))
            found[f"{name}.svg"] = standalone(svg, series)
    return found


def _points(points: Sequence[Point]) -> list[tuple[float, float]]:
    found = []
    for x, experiment, benchmark, agent, retriever in points:
        if not (KEPT / f"{experiment}.json").is_file():
            continue
        for cell in read_json(KEPT / f"{experiment}.json")["cells"]:
            if (cell["agent"], cell["retriever"]) == (agent, retriever) and benchmark in ("", cell["benchmark"]):
                found.append((x, 100 * cell["metrics"]["agentic_em"]["mean"]))
    return found


def standalone(svg: str, series: Sequence[Series]) -> str:
    """A chart of the report with its own colours and a legend, as a file."""
    css = (files("agentic_r_plugin.report") / "templates" / "report.css").read_text(encoding="utf-8")
    root = css[: css.index("}") + 1]
    rules = re.findall(r"^(?:svg|\.c0 ).*$", css, re.M)
    height = HEIGHT + 18 * len(series)
    legend = "".join(
        f'<g class="c{one.color}"><line class="curve" x1="40" x2="60" y1="{y}" y2="{y}"/>'
        f'<text x="68" y="{y + 4}">{one.name}</text></g>'
        for y, one in zip(range(HEIGHT + 5, height, 18), series, strict=False)
    )
    opened, _, body = svg.partition(">")
    opened = opened.replace(f"0 0 {WIDTH} {HEIGHT}", f"0 0 {WIDTH} {height}")
    opened = opened.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" ')
    style = "\n".join([root, *rules])
    return f"{opened}>\n<style>{style}</style>\n{body.removesuffix('</svg>')}{legend}</svg>\n"


def main() -> None:
    """Keep an experiment, or write the page's tables and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command_")
    add = commands.add_parser("add", help="keep what an experiment measured")
    add.add_argument("name")
    add.add_argument("out", type=Path)
    add.add_argument("commit", help="of the code that it ran from")
    add.add_argument("made_by", help="the command that made OUT")
    args = parser.parse_args()
    if args.command_ == "add":
        KEPT.mkdir(exist_ok=True)
        keep(args.name, args.out, args.commit, args.made_by)
    else:
        PAGE.write_text(page(), encoding="utf-8")
        for name, svg in figures().items():
            (KEPT / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
