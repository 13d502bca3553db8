"""The report's sections as plain values, computed from a run folder; the templates only lay them out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from agentic_r_plugin import components
from agentic_r_plugin.errors import UnknownComponentError
from agentic_r_plugin.evaluation.charts import Series, line_chart
from agentic_r_plugin.evaluation.run_folder import Iteration, RunFolder
from agentic_r_plugin.evaluation.transcript import highlight, pieces
from agentic_r_plugin.protocol import AgentProtocol
from agentic_r_plugin.protocol import search_r1 as fallback_protocol
from agentic_r_plugin.records import Trajectory

Cell = Mapping[str, Any]


def percent(value: float) -> str:
    """A share as a percentage.

    >>> percent(0.5)
    '50 %'
    """
    return f"{value * 100:.0f} %"


# --- Results ----------------------------------------------------------------------------------------------------------


def _comparison(matrix: Mapping[str, Any], first: Cell, second: Cell) -> Mapping[str, Any] | None:
    def is_cell(side: Mapping[str, str], cell: Cell) -> bool:
        return side["agent"] == cell["agent"] and side["retriever"] == cell["retriever"]

    for item in matrix["comparisons"]:
        same_benchmark = item["benchmark"] == first["benchmark"] == second["benchmark"]
        if same_benchmark and is_cell(item["first"], first) and is_cell(item["second"], second):
            return item
    return None


def headlines(matrix: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The two questions a run answers, on its first benchmark: what the trained retriever gave, what PPO gave."""
    cells = [cell for cell in matrix["cells"] if cell["benchmark"] == matrix["cells"][0]["benchmark"]]
    agents, retrievers = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("agent", "retriever"))
    by_name = {(cell["agent"], cell["retriever"]): cell for cell in cells}
    wanted = []
    if len(retrievers) > 1:
        ends = [(agents[-1], retrievers[0]), (agents[-1], retrievers[-1])]
        wanted.append(("Training the retriever", f"{retrievers[0]} → {retrievers[-1]}, with {agents[-1]}", ends))
    if len(agents) > 1:
        ends = [(agents[0], retrievers[0]), (agents[-1], retrievers[0])]
        wanted.append(("Training the agent", f"{agents[0]} → {agents[-1]}, with {retrievers[0]}", ends))
    if len(agents) > 1 and len(retrievers) > 1:
        ends = [(agents[0], retrievers[0]), (agents[-1], retrievers[-1])]
        wanted.append(("Both", f"{' + '.join(ends[0])} → {' + '.join(ends[1])}", ends))
    tiles = []
    for title, what, (before, after) in wanted:
        if before in by_name and after in by_name:
            found = _comparison(matrix, by_name[before], by_name[after])
            tiles.append(_tile(title, what, by_name[before], by_name[after], found))
    return tiles


def _tile(title: str, what: str, before: Cell, after: Cell, comparison: Mapping[str, Any] | None) -> dict[str, Any]:
    ems = [cell["metrics"]["agentic_em"]["mean"] for cell in (before, after)]
    tile = {"title": title, "what": what, "before": ems[0], "after": ems[1], "difference": ems[1] - ems[0], "rest": []}
    tile["em"] = comparison["metrics"].get("agentic_em") if comparison else None
    names = (("search_turns", "searches", 1), ("answer_recall_at_3", "answer recall@3", 100))
    for name, label, scale in names:
        means = [cell["metrics"].get(name, {}).get("mean") for cell in (before, after)]
        if None not in means:
            tile["rest"].append({"label": label, "before": means[0] * scale, "after": means[1] * scale, "scale": scale})
    return tile


def heatmaps(matrix: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each benchmark, agents by retrievers with exact match, shaded within the benchmark's own range."""
    maps = []
    for benchmark in dict.fromkeys(cell["benchmark"] for cell in matrix["cells"]):
        cells = [cell for cell in matrix["cells"] if cell["benchmark"] == benchmark]
        agents, retrievers = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("agent", "retriever"))
        ems = {(cell["agent"], cell["retriever"]): cell["metrics"]["agentic_em"] for cell in cells}
        low, high = (fold(entry["mean"] for entry in ems.values()) for fold in (min, max))
        shade = {key: (entry["mean"] - low) / (high - low) if high > low else 0.5 for key, entry in ems.items()}
        if len(agents) > 1 or len(retrievers) > 1:
            maps.append({"benchmark": benchmark, "agents": agents, "retrievers": retrievers, "em": ems, "shade": shade})
    return maps


# --- Curves -----------------------------------------------------------------------------------------------------------

_AGENT_CHARTS: tuple[tuple[str, str, tuple[str, ...], tuple[float | None, float | None]], ...] = (
    ("Training exact match", "EM", ("agentic_r/em", "critic/score/mean"), (0, None)),
    ("Reward (with KL penalty)", "reward", ("critic/rewards/mean", "critic/score/mean"), (None, None)),
    ("Search turns", "searches a question", ("agentic_r/search_turns",), (0, None)),
    ("Malformed turns", "a trajectory", ("agentic_r/malformed_turns",), (0, None)),
    ("Entropy", "nats", ("actor/entropy", "actor/entropy_loss"), (None, None)),
    ("KL to the reference policy", "KL", ("actor/reward_kl_penalty", "actor/kl_loss", "actor/ppo_kl"), (None, None)),
    ("Critic loss", "value loss", ("critic/vf_loss",), (0, None)),
    ("Tokens the environment wrote", "share", ("agentic_r/masked_token_share",), (0, None)),
)
"""Title, unit, log keys (the first that is there), range of the y axis."""

_HELD_OUT = re.compile(r"^val-(?:core|aux)/.*/(?:em|acc|reward)/mean@\d+$")


def _points(steps: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(step["step"], step[key]) for step in steps if step.get(key) is not None and "step" in step]


def _agent_points(key: str, iteration: Iteration) -> list[tuple[float, float]]:
    return _points(iteration.agent_steps, key)


def _retriever_points(key: str, iteration: Iteration) -> list[tuple[float, float]]:
    return _points(iteration.retriever_steps, key)


def agent_charts(iterations: Sequence[Iteration]) -> list[dict[str, str]]:
    """PPO's curves, one colour an iteration."""
    charts = []
    for title, unit, keys, y_range in _AGENT_CHARTS:
        key = next((key for key in keys if any(key in step for it in iterations for step in it.agent_steps)), None)
        if key is not None:
            charts.append(_chart(title, unit, iterations, partial(_agent_points, key), y_range))
    held_out = _chart("Held-out exact match", "EM", iterations, _held_out, (0, None), marked=True)
    return [chart for chart in [*charts[:1], held_out, *charts[1:]] if chart["svg"]]


def _held_out(iteration: Iteration) -> list[tuple[float, float]]:
    """verl's validation; its `em` where there is one."""
    keys = sorted({key for step in iteration.agent_steps for key in step if _HELD_OUT.match(key)})
    key = next((key for key in keys if "/em/" in key), keys[0] if keys else "")
    return _points(iteration.agent_steps, key)


def retriever_charts(iterations: Sequence[Iteration]) -> list[dict[str, str]]:
    """The retriever's loss, and its accuracy within the batch where it was logged."""
    charts = [_chart("Contrastive loss", "loss", iterations, partial(_retriever_points, "loss"), (0, None))]
    for key in ("accuracy", "in_batch_accuracy", "mrr"):
        charts.append(
            _chart(
                f"Training {key.replace('_', ' ')}",
                "share",
                iterations,
                partial(_retriever_points, key),
                (0, 1),
            )
        )
    return [chart for chart in charts if chart["svg"]]


def _chart(
    title: str,
    unit: str,
    iterations: Sequence[Iteration],
    points: Callable[[Iteration], list[tuple[float, float]]],
    y_range: tuple[float | None, float | None],
    *,
    marked: bool = False,
) -> dict[str, str]:
    series = [
        Series(name=f"iteration {it.number}", points=points(it), color=i, marked=marked)
        for i, it in enumerate(iterations)
    ]
    svg = line_chart(title, series, x_label="step", y_label=unit, y_range=y_range)
    return {"title": title, "svg": svg}


# --- Data construction ------------------------------------------------------------------------------------------------


def positives_chart(iterations: Sequence[Iteration]) -> str:
    """Share of the queries that gave a training group, by iteration."""
    points = [
        (float(it.number), it.stages["groups"]["kept"] / it.stages["groups"]["read"])
        for it in iterations
        if it.stages.get("groups", {}).get("read")
    ]
    series = [Series(name="queries with a positive", points=points, marked=True)]
    return line_chart(
        "Queries with a positive", series, x_label="iteration", y_label="share", y_range=(0, 1), number=percent
    )


# --- Cost -------------------------------------------------------------------------------------------------------------


def cost_rows(run: RunFolder) -> tuple[list[dict[str, Any]], list[str]]:
    """Phases with their seconds by iteration, and the columns besides seconds that any phase has."""
    known = ("rollouts", "searches", "prompt_tokens", "cached_tokens", "generated_tokens")
    columns = [name for name in known if any(line.get(name) for line in run.costs)]
    longest = max((line.get("seconds", 0.0) for line in run.costs), default=0.0) or 1.0
    rows = [dict(line) | {"width": 100 * line.get("seconds", 0.0) / longest} for line in run.costs]
    return rows, columns


# --- Trajectories -----------------------------------------------------------------------------------------------------


def samples(run: RunFolder, *, num_better: int, num_worse: int) -> list[dict[str, Any]]:
    """Questions whose outcome differs between the first and the last retriever under the last agent, side by side.

    Where there is one retriever only, its right and wrong answers stand alone.
    """
    if run.matrix is None:
        return []
    benchmark = run.matrix["cells"][0]["benchmark"]
    cells = [cell for cell in run.matrix["cells"] if cell["benchmark"] == benchmark]
    agent = cells[-1]["agent"]
    mine = [cell for cell in cells if cell["agent"] == agent]
    first, last = mine[0], mine[-1]
    before, after = run.trajectories(first), run.trajectories(last)
    shared = [name for name in before if name in after]
    if first is last:
        chosen = [n for n in shared if after[n].em][:num_better] + [n for n in shared if not after[n].em][:num_worse]
        return [_sample(name, [(last, after[name])]) for name in chosen]
    better = [name for name in shared if after[name].em > before[name].em]
    worse = [name for name in shared if after[name].em < before[name].em]
    chosen = _longest_first(better, after)[:num_better] + _longest_first(worse, before)[:num_worse]
    return [_sample(name, [(first, before[name]), (last, after[name])]) for name in chosen]


def _longest_first(names: Sequence[str], trajectories: Mapping[str, Trajectory]) -> list[str]:
    """Multi-hop questions say most; ties stay in the benchmark's order."""
    return sorted(names, key=lambda name: -len(trajectories[name].turns))


def _sample(name: str, sides: Sequence[tuple[Cell, Trajectory]]) -> dict[str, Any]:
    record = sides[0][1]
    return {
        "id": name,
        "question": record.question,
        "golden_answers": record.golden_answers,
        "kind": "" if len(sides) == 1 else ("fixed" if sides[1][1].em else "broken"),
        "sides": [_side(cell, trajectory) for cell, trajectory in sides],
    }


def _side(cell: Cell, trajectory: Trajectory) -> dict[str, Any]:
    return {
        "agent": cell["agent"],
        "retriever": cell["retriever"],
        "em": trajectory.em,
        "answer": trajectory.answer,
        "stop_reason": trajectory.stop_reason.value,
        "searches": len(trajectory.turns),
        "pieces": [
            {"kind": piece.kind, "by_model": piece.by_model, "runs": highlight(piece.text, trajectory.golden_answers)}
            for piece in pieces(trajectory.text, _protocol(str(cell.get("protocol", ""))))
        ],
    }


def _protocol(name: str) -> AgentProtocol:
    """The cell's protocol; Search-R1's where it came from a package that is not installed here."""
    try:
        protocol: AgentProtocol = components.load("agent_protocol", name)
    except UnknownComponentError:
        return fallback_protocol
    return protocol
