"""`agentic-r report`: a self-contained HTML page of a run folder, and the same in Markdown.

The page loads nothing from the network: it contains its styles, scripts, charts and trajectories, and its content
security policy forbids anything else. Parts missing from the run folder are left out and listed at the end.
"""

from __future__ import annotations

import math
import shlex
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

from agentic_r_plugin import __version__
from agentic_r_plugin.config import check_least, setting
from agentic_r_plugin.evaluation.matrix import cell_name, markdown_table
from agentic_r_plugin.report import curves, results
from agentic_r_plugin.report.flips import embed, read_answers
from agentic_r_plugin.report.run_folder import RunFolder, read_run
from agentic_r_plugin.storage.claim import require_new
from agentic_r_plugin.store import atomic_path


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Make report.html and report.md of a run."""

    run: str = setting("run folder of iterate, or output folder of evaluate")
    out: str = setting("folder for the report; empty: the run folder", default="")
    title: str = setting("heading; empty: the run folder's name", default="")
    num_trajectories: int = setting(
        "maximum trajectories in the page, of questions that flip; 1-2 KB each", default=2000
    )

    def __post_init__(self) -> None:
        check_least(self, num_trajectories=0)


def run(config: ReportConfig, *, resume: bool = False) -> None:
    """Write both files. With `resume`, an earlier report is replaced.

    Raises:
        RecordError: the run folder does not exist, holds nothing to report, or has a damaged file.
        OutputExistsError: there is a report already and `resume` is off.
    """
    folder = Path(config.run)
    out = Path(config.out) if config.out else folder
    if not resume:
        require_new(out / "report.html")
        require_new(out / "report.md")
    content = context(read_run(folder), config)
    for name in ("report.html", "report.md"):
        text = render(f"{name}.jinja", content)
        with atomic_path(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(out / "report.html", flush=True)


def render(template: str, content: Mapping[str, Any]) -> str:
    """Render a template of this package. Values in HTML are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("agentic_r_plugin.report", "templates"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "signed": signed}
    return environment.get_template(template).render(content)


def signed(value: float, digits: int = 1) -> str:
    """Format with a sign; the minus is a real minus sign, as wide as the plus.

    >>> signed(-0.25, 2), signed(3)
    ('−0.25', '+3.0')
    """
    return f"{value:+.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Format seconds for readers.

    >>> [duration(value) for value in (0.4, 12, 75, 3720)]
    ['0.4 s', '12 s', '1 min 15 s', '1 h 2 min']
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def context(run: RunFolder, config: ReportConfig) -> dict[str, Any]:
    """All values that the templates use."""
    script = _asset("report.js") + _asset("questions.js")
    content: dict[str, Any] = {
        "title": config.title or f"Agentic-R: {run.path.resolve().name}",
        "version": __version__,
        "facts": _facts(run),
        "iterations": run.iterations,
        "agent_charts": curves.agent_charts(run.iterations),
        "retriever_charts": curves.retriever_charts(run.iterations),
        "positives": curves.positives_charts(run.iterations),
        "has_data": any(iteration.stages for iteration in run.iterations),
        "provenance": _provenance(run),
        "config": run.config,
        "notes": run.notes,
        "table": markdown_table(run.cells),
        "css": _asset("report.css"),
        "js": script,
        # The page's content security policy allows only the script with this hash.
        "js_hash": b64encode(sha256(script.encode()).digest()).decode(),
    }
    content |= _results(run, config.num_trajectories) | _costs(run)
    return content | {"sections": _sections(content)}


def _results(run: RunFolder, num_trajectories: int) -> dict[str, Any]:
    cells = run.cells
    groups = results.by_benchmark(cells)
    effects = [(name, results.effects(run, mine)) for name, mine in groups.items()]
    answers = read_answers(run, num_trajectories=num_trajectories)
    config = run.matrix["config"] if run.matrix else {}
    return {
        "cells": cells,
        "seeds": run.matrix.get("num_seeds", 1) if run.matrix else 1,
        "level": f"{config.get('level', 0.95) * 100:g}",
        "columns": results.columns(cells),
        "best": [cell for mine in groups.values() for cell in results.best(mine)],
        "many_benchmarks": len(groups) > 1,
        "questions_differ": len({cell["num_questions"] for cell in cells}) > 1,
        "tiles": results.headlines(run, next(iter(groups.values()))) if groups else [],
        "tile_titles": _TILE_TITLES if run.iterations else {"agent": "Agent", "retriever": "Retriever", "both": "Both"},
        "effects": [
            (name, [(group, list(steps)) for group, steps in groupby(rows, key=lambda effect: effect.group)])
            for name, rows in effects
            if rows
        ],
        "effect_reach": _reach([effect.em for _, rows in effects for effect in rows if effect.em]),
        "comparisons": run.matrix["comparisons"] if run.matrix else [],
        "overview": results.overview(cells),
        "heatmaps": results.heatmaps(cells),
        "plots": {name: results.plots(mine) for name, mine in groups.items()},
        "breakdowns": _breakdowns(cells),
        "questions": bool(answers["benchmarks"]),
        "questions_json": embed(answers),
    }


_TILE_TITLES = {"agent": "Training the agent", "retriever": "Training the retriever", "both": "Both together"}


def _reach(differences: Sequence[Mapping[str, float]]) -> float:
    """Half-width of an axis around zero that covers all intervals, in steps of 5 points.

    >>> _reach([{"low": -0.12, "high": 0.01}])
    0.15
    """
    furthest = max((abs(item[side]) for item in differences for side in ("low", "high")), default=0.0)
    return max(1, math.ceil(furthest * 20)) / 20


def _costs(run: RunFolder) -> dict[str, Any]:
    rows, columns = curves.cost_rows(run)
    return {
        "costs": rows,
        "cost_columns": columns,
        "total_time": duration(sum(line.get("seconds", 0.0) for line in run.costs)),
        "total_usd": sum(line.get("usd", 0.0) for line in run.costs),
    }


def _asset(name: str) -> str:
    return (files("agentic_r_plugin.report") / "templates" / name).read_text(encoding="utf-8")


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    facts = []
    if run.matrix:
        cells = run.cells
        facts.append(("benchmark", ", ".join(dict.fromkeys(f"{cell['benchmark']} {cell['split']}" for cell in cells))))
        facts.append(("questions", f"{max(cell['num_questions'] for cell in cells):,}"))
        if "num_seeds" in run.matrix:
            facts.append(("seeds", str(run.matrix["num_seeds"])))
        facts.append(("on", "; ".join(dict.fromkeys(text for text, _ in _of_cells(run, "hardware", _accelerators)))))
    if run.iterations:
        facts.append(("iterations", str(max(iteration.number for iteration in run.iterations))))
    if run.costs:
        facts.append(("time", duration(sum(line.get("seconds", 0.0) for line in run.costs))))
    return facts


def _breakdowns(cells: Sequence[results.Cell]) -> list[tuple[str, list[tuple[str, int | None]]]]:
    """For each kind of breakdown, its values with their number of questions; None if cells differ in that number."""
    counts: dict[str, dict[str, set[int]]] = {}
    for cell in cells:
        for key, groups in cell.get("breakdown", {}).items():
            for value, group in groups.items():
                counts.setdefault(key, {}).setdefault(value, set()).add(group["num_questions"])
    return [
        (key, [(value, found.pop() if len(found) == 1 else None) for value, found in sorted(values.items())])
        for key, values in counts.items()
    ]


def _of_cells(run: RunFolder, part: str, shown: Callable[[Any], str]) -> Iterator[tuple[str, str]]:
    """(text, name of the cell) of one part of the cells' provenance.

    Cells without provenance (of several seeds, or of an earlier version) use the matrix's.
    """
    for cell in run.cells:
        value = cell.get("provenance", run.matrix or {}).get(part)
        if value is not None:
            yield shown(value), cell_name(cell)


def _accelerators(machine: Mapping[str, Any]) -> str:
    return ", ".join(machine["accelerators"]) or f"{machine['cpus']} CPU cores, no accelerator"


def _machine(machine: Mapping[str, Any]) -> str:
    cpu = f"{machine['cpu']}, {machine['cpus']} cores, {machine['memory_gib']} GiB"
    return ", ".join([cpu, *machine["accelerators"]])


def _releases(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


_MADE_BY: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("hardware", "hardware", _machine),
    ("versions", "versions", _releases),
    ("source_fingerprint", "sources", str),
    ("command", "command", shlex.join),
)


def _provenance(run: RunFolder) -> list[tuple[str, str]]:
    if run.matrix is None:
        return []
    found = {
        "protocol": _texts((_protocol(cell), cell["agent"]) for cell in run.cells),
        "questions": _texts((_questions(cell), cell["benchmark"]) for cell in run.cells),
        **{label: _texts(_of_cells(run, part, shown)) for part, label, shown in _MADE_BY},
    }
    rows = [(label, ("differs: " if texts[1:] else "") + "; ".join(texts)) for label, texts in found.items() if texts]
    for key, which in (("agent", "agent_fingerprint"), ("retriever", "search_fingerprint")):
        named = []
        for name in dict.fromkeys(cell[key] for cell in run.cells):
            prints = _texts((cell.get(which, ""), cell["benchmark"]) for cell in run.cells if cell[key] == name)
            named.append(f"{name} {', '.join(prints)}".strip())
        rows.append((f"{key}s", ", ".join(named)))
    return rows


def _texts(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """The distinct texts of (text, name) pairs; if there are several, each with the names that have it."""
    names: dict[str, dict[str, None]] = {}
    for text, name in pairs:
        names.setdefault(text, {})[name] = None
    return list(names) if len(names) < 2 else [f"{text} ({', '.join(having)})" for text, having in names.items()]


def _protocol(cell: results.Cell) -> str:
    return f"{cell['protocol']}, {cell['topk']} passages per search, at most {cell['limits']['max_searches']}"


def _questions(cell: results.Cell) -> str:
    return f"{cell['sample']} of {cell['split']}, seed {cell['seed']}"


def _sections(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    present = (
        ("results", "Results", content["cells"]),
        ("effects", "Effects", content["effects"] or content["comparisons"]),
        ("benchmarks", "Benchmarks", content["overview"]),
        ("matrix", "Matrix", content["heatmaps"]),
        ("breakdown", "By kind", content["breakdowns"]),
        ("questions", "Questions", content["questions"]),
        ("agent", "Agent", content["agent_charts"]),
        ("data", "Data", content["has_data"]),
        ("retriever", "Retriever", content["retriever_charts"]),
        ("cost", "Cost", content["costs"]),
        ("provenance", "Made from", True),
    )
    return [(anchor, name) for anchor, name, there in present if there]
