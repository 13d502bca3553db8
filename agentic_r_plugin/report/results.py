"""The report's results as plain values: the table, the effect of each change, the matrix and the paper's figures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentic_r_plugin.evaluation.matrix import cell_name, compare
from agentic_r_plugin.report import paper
from agentic_r_plugin.report.charts import Estimate, Series, interval_chart, line_chart
from agentic_r_plugin.report.run_folder import RunFolder

Cell = Mapping[str, Any]
Pair = tuple[str, str]
"""(agent, retriever)."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column of the results table: the metric, its title and its number format."""

    key: str
    title: str
    scale: int = 100
    """Factor for display; 100 shows a share in per cent."""
    digits: int = 1


COLUMNS = (
    Metric(key="agentic_em", title="EM"),
    Metric(key="agentic_judge", title="judge"),
    Metric(key="agentic_f1", title="F1"),
    Metric(key="agentic_sub_em", title="sub-EM"),
    Metric(key="search_turns", title="searches", scale=1, digits=2),
    Metric(key="answer_recall_at_3", title="answer recall@3"),
    Metric(key="answer_recall_at_20", title="answer recall@20"),
    Metric(key="gold_document_recall", title="gold recall@3"),
    Metric(key="gold_document_recall_at_20", title="gold recall@20"),
    Metric(key="malformed_share", title="malformed"),
    Metric(key="generated_tokens", title="tokens", scale=1, digits=0),
)


def columns(cells: Sequence[Cell]) -> list[Metric]:
    """The columns for which at least one cell has a value."""
    return [column for column in COLUMNS if any(_mean(cell, column.key) is not None for cell in cells)]


def by_benchmark(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells of each benchmark, in their order."""
    return {name: [c for c in cells if c["benchmark"] == name] for name in dict.fromkeys(c["benchmark"] for c in cells)}


def pair(cell: Cell) -> Pair:
    """Agent and retriever, which identify a cell within its benchmark."""
    return cell["agent"], cell["retriever"]


def label(cell: Cell) -> str:
    """Name of a cell within its benchmark."""
    return " + ".join(pair(cell))


def _mean(cell: Cell, key: str) -> float | None:
    entry = cell["metrics"].get(key)
    return entry["mean"] if entry else None


def best(cells: Sequence[Cell]) -> list[Cell]:
    """The first cell with the highest exact match; none for questions without gold answers."""
    known = [cell for cell in cells if _mean(cell, "agentic_em") is not None]
    return [max(known, key=lambda cell: cell["metrics"]["agentic_em"]["mean"])] if known else []


def _names(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    """Names of the agents and of the retrievers, without duplicates, in order."""
    return list(dict.fromkeys(c["agent"] for c in cells)), list(dict.fromkeys(c["retriever"] for c in cells))


# --- Effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Effect of one change, paired over the same questions."""

    benchmark: str
    group: str
    """The iteration, or the whole loop."""
    what: str
    """agent, retriever or both."""
    before: Cell
    after: Cell
    differences: Mapping[str, Any]
    """Paired difference by metric; empty if it cannot be computed."""

    @property
    def change(self) -> str:
        """Names of what was replaced and of what was kept."""
        (agent, retriever), (new_agent, new_retriever) = pair(self.before), pair(self.after)
        if retriever == new_retriever:
            return f"{agent} → {new_agent}, with {retriever}"
        if agent == new_agent:
            return f"{retriever} → {new_retriever}, with {agent}"
        return f"{agent} + {retriever} → {new_agent} + {new_retriever}"

    @property
    def em(self) -> Mapping[str, Any] | None:
        """Paired difference of exact match."""
        return self.differences.get("agentic_em")

    @property
    def verdict(self) -> str:
        """`good`, `bad`, or an empty string if the difference may be chance."""
        if self.em is None or not self.em["beyond_chance"]:
            return ""
        return "good" if self.em["difference"] > 0 else "bad"


def effects(run: RunFolder, cells: Sequence[Cell]) -> list[Effect]:
    """Effects of each iteration of a loop (agent, retriever, both), or else of all changes from the first cell."""
    agents, retrievers = _names(cells)
    for steps in (
        _loop_steps(_rounds(agents, "agent"), _rounds(retrievers, "retriever")),
        _baseline_steps(agents, retrievers),
    ):
        if found := [effect for effect in _effects(run, cells, steps) if effect.differences]:
            return found
    return []


def headlines(run: RunFolder, cells: Sequence[Cell]) -> list[Effect]:
    """Effects from the first agent and retriever to the last: of the retriever, of the agent, and of both.

    There are none for questions without gold answers.
    """
    steps = sorted(_first_to_last(*_names(cells)), key=lambda step: step[1] != "retriever")
    found = _effects(run, cells, steps)
    return [item for item in found if None not in (_mean(item.before, "agentic_em"), _mean(item.after, "agentic_em"))]


Step = tuple[str, str, Pair, Pair]


def _effects(run: RunFolder, cells: Sequence[Cell], steps: Sequence[Step] | Iterator[Step]) -> list[Effect]:
    there = {pair(cell): cell for cell in cells}
    return [
        Effect(
            benchmark=there[before]["benchmark"],
            group=group,
            what=what,
            before=there[before],
            after=there[after],
            differences=_differences(run, there[before], there[after]),
        )
        for group, what, before, after in steps
        if before in there and after in there
    ]


def _rounds(names: Sequence[str], stem: str) -> dict[int, str]:
    """Number -> name, if all names have the loop's form `STEM-NUMBER`; otherwise empty.

    >>> _rounds(["agent-0", "agent-2"], "agent"), _rounds(["agent-2-max-1", "agent-2-max-2"], "agent")
    ({0: 'agent-0', 2: 'agent-2'}, {})
    """
    found = {name: re.fullmatch(rf"{stem}-(\d+)", name) for name in names}
    return {int(match[1]): name for name, match in found.items() if match} if all(found.values()) else {}


def _loop_steps(agents: Mapping[int, str], retrievers: Mapping[int, str]) -> Iterator[Step]:
    shared = agents.keys() & retrievers.keys()
    iterations = [k for k in sorted(shared) if k - 1 in shared]
    for new in iterations:
        old = new - 1
        group, middle = f"iteration {new}", (agents[new], retrievers[old])
        yield group, "agent", (agents[old], retrievers[old]), middle
        yield group, "retriever", middle, (agents[new], retrievers[new])
        yield group, "both", (agents[old], retrievers[old]), (agents[new], retrievers[new])
    # With two agents there is one iteration, whose effects these would repeat.
    if iterations and len(agents) > 2:
        yield from _first_to_last(*([names[k] for k in sorted(names)] for names in (agents, retrievers)))


def _first_to_last(agents: Sequence[str], retrievers: Sequence[str]) -> Iterator[Step]:
    """The agent with the first retriever, the retriever with the last agent, and both if both changed."""
    first, middle, last = (agents[0], retrievers[0]), (agents[-1], retrievers[0]), (agents[-1], retrievers[-1])
    for what, before, after in (("agent", first, middle), ("retriever", middle, last), ("both", first, last)):
        if before != after and (what != "both" or middle not in (first, last)):
            yield "first to last", what, before, after


def _baseline_steps(agents: Sequence[str], retrievers: Sequence[str]) -> Iterator[Step]:
    for agent in agents:
        for retriever in retrievers[1:]:
            yield f"against {retrievers[0]}", "retriever", (agent, retrievers[0]), (agent, retriever)
    for retriever in retrievers:
        for agent in agents[1:]:
            yield f"against {agents[0]}", "agent", (agents[0], retriever), (agent, retriever)


def _differences(run: RunFolder, before: Cell, after: Cell) -> Mapping[str, Any]:
    """Differences from the matrix. Pairs that it does not contain are compared here, with the same settings."""
    assert run.matrix is not None and run.matrix_dir is not None
    for item in run.matrix["comparisons"]:
        sides = tuple((item[side]["agent"], item[side]["retriever"]) for side in ("first", "second"))
        if item["benchmark"] == before["benchmark"] and sides == (pair(before), pair(after)):
            found: Mapping[str, Any] = item["metrics"]
            return found
    if not all((run.matrix_dir / cell_name(cell) / "scores.json").is_file() for cell in (before, after)):
        return {}
    options: dict[str, Any] = {"level": 0.95, "resamples": 10_000, "seed": 0}
    options |= {name: run.matrix["config"][name] for name in options if name in run.matrix["config"]}
    [compared] = compare([before, after], run.matrix_dir, **options)
    metrics: Mapping[str, Any] = compared["metrics"]
    return metrics


# --- Matrix and charts ------------------------------------------------------------------------------------------------


def heatmaps(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each benchmark, exact match of agents by retrievers, shaded over the range of that benchmark."""
    maps = []
    for benchmark, mine in by_benchmark(cells).items():
        agents, retrievers = _names(mine)
        ems = {pair(cell): cell["metrics"]["agentic_em"] for cell in mine}
        if any(entry["mean"] is None for entry in ems.values()):  # no question has a gold answer
            continue
        low, high = (fold(entry["mean"] for entry in ems.values()) for fold in (min, max))
        shade = {key: (entry["mean"] - low) / (high - low) if high > low else 0.5 for key, entry in ems.items()}
        if len(agents) > 1 or len(retrievers) > 1:
            maps.append({"benchmark": benchmark, "agents": agents, "retrievers": retrievers, "em": ems, "shade": shade})
    return maps


def plots(cells: Sequence[Cell]) -> dict[str, Any]:
    """Charts of one benchmark: exact match, searches, and answer recall turn by turn.

    Args:
        cells: the cells of the benchmark. The colour shows the retriever.
    """
    agents, retrievers = _names(cells)
    charts = []
    for key, title, x_label, scale in (
        ("agentic_em", "Exact match", "EM, per cent", 100),
        ("search_turns", "Searches", "searches per question", 1),
    ):
        estimates = [
            Estimate(
                name=label(cell),
                value=entry["mean"] * scale,
                low=entry["low"] * scale,
                high=entry["high"] * scale,
                color=retrievers.index(cell["retriever"]),
            )
            for cell in cells
            if "low" in (entry := cell["metrics"].get(key, {}))
        ]
        charts.append({"title": title, "svg": interval_chart(title, estimates, x_label=x_label)})
    curves = [
        Series(
            name=label(cell),
            points=[
                (float(row["turn"]), row["answer_recall_so_far"] * 100)
                for row in cell.get("by_turn", ())
                if row["answer_recall_so_far"] is not None
            ],
            color=retrievers.index(cell["retriever"]),
            dashed=cell["agent"] != agents[-1],
            marked=True,
        )
        for cell in cells
    ]
    title = "Answer seen, turn by turn"
    svg = line_chart(title, curves, x_label="after search", y_label="questions, per cent", y_range=(0, None))
    charts.append({"title": title, "svg": svg})
    return {
        "charts": [chart for chart in charts if chart["svg"]],
        "retrievers": retrievers,
        "by_turn": bool(svg),
        "last_agent": agents[-1] if svg and len(agents) > 1 else "",
    }


# --- Comparison with the paper ----------------------------------------------------------------------------------------

_PAPER_NAMES = {
    "agentic_r": "Agentic-R",
    "r1_searcher": "R1-Searcher",
    "simple_deep_searcher": "SimpleDeepSearcher",
    "e5": "E5",
    "replug": "REPLUG",
}


def overview(cells: Sequence[Cell]) -> dict[str, Any] | None:
    """Exact match with one column per benchmark, and the paper's rows for the benchmarks that it reports.

    Returns:
        None if there is a single benchmark and the paper does not report it.
    """
    groups = by_benchmark(cells)
    known = {benchmark.name: benchmark for benchmark in paper.BENCHMARKS}
    if len(groups) < 2 and not groups.keys() & known.keys():
        return None
    heads = [
        {"name": name, "note": _sample_note(mine[0], known.get(name)), "paper": name in known}
        for name, mine in groups.items()
    ]
    there = {(*pair(cell), cell["benchmark"]): cell["metrics"] for cell in cells}
    rows = []
    for agent, retriever in dict.fromkeys(map(pair, cells)):
        metrics = [there.get((agent, retriever, name)) for name in groups]
        values = [
            _entry(found["agentic_em"], found.get("search_turns"))
            if found and found["agentic_em"]["mean"] is not None
            else None
            for found in metrics
        ]
        rows.append(_overview_row(agent, retriever, values, is_paper=False))
    return {"heads": heads, "rows": rows + _paper_rows(list(groups)), "has_paper": bool(groups.keys() & known.keys())}


def _paper_rows(benchmarks: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for agent, retriever in dict.fromkeys(key[:2] for key in paper.EM):
        keys = [(agent, retriever, name) for name in benchmarks]
        values = [
            {"em": paper.EM[key], "searches": paper.SEARCH_TURNS.get(key)} if key in paper.EM else None for key in keys
        ]
        if any(values):
            rows.append(_overview_row(_PAPER_NAMES[agent], _PAPER_NAMES[retriever], values, is_paper=True))
    return rows


def _entry(em: Mapping[str, Any], searches: Mapping[str, Any] | None) -> dict[str, Any]:
    """Exact match of a cell with its interval in per cent, and its searches per question."""
    interval = {side: em[side] * 100 for side in ("low", "high") if side in em}
    return {"em": em["mean"] * 100, "searches": searches["mean"] if searches else None} | interval


def _overview_row(
    agent: str, retriever: str, values: Sequence[dict[str, Any] | None], *, is_paper: bool
) -> dict[str, Any]:
    """A row with the average over all columns, if every column has a value."""
    ems = [value["em"] for value in values if value]
    average = sum(ems) / len(ems) if len(ems) == len(values) > 1 else None
    return {"agent": agent, "retriever": retriever, "values": values, "average": average, "is_paper": is_paper}


def _sample_note(cell: Cell, known: paper.Benchmark | None) -> str:
    note = f"{cell['split']}, {cell['num_questions']:,} questions"
    if known is not None and (cell["split"], cell["num_questions"]) != (known.split, known.num_questions):
        note += f"; the paper: {known.split}, {known.num_questions:,}"
    return note
