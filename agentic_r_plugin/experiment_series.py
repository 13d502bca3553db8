"""`agentic-r experiment` over several seeds and variants of a loop: runs, experiments, and tables over the seeds.

| in OUT | contents |
|---|---|
| `[VARIANT/]seed-N/` | the experiment on the run of this variant and seed (`experiment.py`) |
| `[VARIANT/]matrix.json`, `.md`, `.csv`, `.tex` | over the seeds, with intervals over seeds and questions |

`run` names the run folder of each part, with `{seed}` and `{variant}` in it. With `loop`, a run that is missing or
unfinished is made by `iterate`. Without seeds and variants there is one part: `OUT` itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agentic_r_plugin import experiment, iterate
from agentic_r_plugin.config import load_config, merged
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.evaluation import aggregate
from agentic_r_plugin.evaluation.matrix import markdown
from agentic_r_plugin.experiment_plan import ExperimentConfig
from agentic_r_plugin.iterate import IterateConfig
from agentic_r_plugin.progress import duration, scaled
from agentic_r_plugin.retriever import training
from agentic_r_plugin.store import read_lines

_RERANKER, _RERANKED = 2.0, 10.0
"""Times that training a reranker takes of a retriever's, and a cell with reranking of one without, for the forecast."""
_PRUNED = 0.045
"""Share of the exhaustive rollouts that pruned correctness makes, for the forecast (recipes/experiments/README.md)."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One run and the experiment on it."""

    variant: str
    seed: int | None
    experiment: ExperimentConfig
    loop: IterateConfig | None
    """The loop that makes the run; None if it must exist."""


def run(config: ExperimentConfig, *, resume: bool = False) -> None:
    """Run the command `experiment`.

    Raises:
        AgenticRError: as `iterate.run`, `experiment.run` and `aggregate.run`; finished parts are kept.
    """
    found = list(parts(config))
    for part in found:
        if part.loop is not None:
            iterate.Loop(part.loop).compose()
    if config.loop or config.dry_run:
        print(forecast(found), flush=True)
    if config.dry_run:
        return
    for part in found:
        if part.loop is not None:
            iterate.run(part.loop, resume=True)
    for part in found:
        # the folder of a series is shared by its parts, so only a single experiment can be new
        experiment.run(part.experiment, resume=resume or len(found) > 1)
    if len(config.seeds) > 1:
        for variant in dict.fromkeys(part.variant for part in found):
            folders = [part.experiment.out for part in found if part.variant == variant]
            out = str(Path(config.out) / variant)
            aggregate.run(aggregate.AggregateConfig(out=out, runs=folders), resume=True)


def parts(config: ExperimentConfig) -> Iterator[Part]:
    """The runs and experiments, variant by variant.

    Raises:
        ConfigError: `run` does not name the seed or the variant, or a setting of the loop is wrong.
    """
    for name, wanted in (("seed", config.seeds), ("variant", config.variants)):
        if wanted and f"{{{name}}}" not in config.run:
            raise ConfigError(f"run: expected {{{name}}} in {config.run!r}, since {name}s are given")
    seeds: list[int | None] = [*config.seeds] or [None]
    for variant in config.variants or {"": {}}:
        for seed in seeds:
            named = {"{variant}": variant, "{seed}": "" if seed is None else str(seed)}
            folder = Path(config.out, variant, *([] if seed is None else [f"seed-{seed}"]))
            one = replace(
                config,
                run=_filled(config.run, named),
                agents=[_filled(agent, named) for agent in config.agents],
                out=str(folder),
                seeds=[],
                variants={},
            )
            yield Part(variant=variant, seed=seed, experiment=one, loop=_loop(config, variant, seed, one.run))


def _filled(text: str, named: Mapping[str, str]) -> str:
    for slot, value in named.items():
        text = text.replace(slot, value)
    return text


def _loop(config: ExperimentConfig, variant: str, seed: int | None, out: str) -> IterateConfig | None:
    if not config.loop:
        return None
    own: dict[str, Any] = {"out": out} | ({} if seed is None else {"seed": seed})
    settings = merged(config.loop_settings, config.variants.get(variant) or {})
    return load_config(IterateConfig, config.loop, values=settings | own)


# --- forecast


def forecast(found: list[Part]) -> str:
    """A table with the time that each part will still take, from its run's finished phases or else the loop's YAML."""
    rows, total = [["part", "loop", "retrievers", "cells"]], 0.0
    for part in found:
        known = _known_seconds(part)
        left = (_loop_left(part), _retrievers_left(part, known), _cells_left(part, known))
        total += sum(left)
        name = "/".join(filter(None, (part.variant, "" if part.seed is None else f"seed {part.seed}")))
        rows.append([name or "all", *map(duration, left)])
    return f"{markdown(rows)}\nforecast: {duration(total)} are left if nothing else runs on this machine"


def _settings(part: Part) -> IterateConfig:
    return part.loop or load_config(IterateConfig, Path(part.experiment.run, "config.yaml"))


def _took(part: Part) -> dict[tuple[int, str], float]:
    """Seconds of the run's finished phases."""
    costs = Path(part.experiment.run, "costs.jsonl")
    lines = [line for _, line in read_lines(costs)] if costs.is_file() else []
    return {(line["iteration"], line["phase"]): float(line["seconds"]) for line in lines}


def _known_seconds(part: Part) -> dict[str, float]:
    """Seconds of each phase of the experiment's iteration, and of one question of a cell (`question`)."""
    loop = _settings(part)
    of_all = loop.expected() | _took(part)
    known = {phase: of_all[k, phase] for k, phase in of_all if k == part.experiment.iteration or phase == "evaluate"}
    asked = int(loop.evaluate.get("first") or loop.world.test_questions) * max(len(loop.evaluate.get("cells", [])), 1)
    return known | {"question": known.get("evaluate", 0.0) / asked}


def _num_questions(part: Part) -> int:
    """Test questions of the run's benchmark, as its world says."""
    loop = _settings(part)
    first = part.experiment.evaluate.get("first") or loop.evaluate.get("first")
    return int(first or loop.world.test_questions)


def _loop_left(part: Part) -> float:
    return sum(scaled(part.loop.expected(), _took(part)).values()) if part.loop is not None else 0.0


def _retrievers_left(part: Part, known: Mapping[str, float]) -> float:
    """Training, indexes and rollouts of retrievers that are not done."""
    out, seconds, exhaustive = Path(part.experiment.out), 0.0, False
    for name, plan in part.experiment.retrievers.items():
        home = out / "retrievers" / name
        if plan.bm25 or plan.of_run or plan.hybrid or plan.rerank or (home / "retriever" / training.DONE).is_file():
            continue
        seconds += known.get("index", 0.0) + (0.0 if plan.model else known.get("train-retriever", 0.0))
        exhaustive |= plan.exhaustive
        if plan.rolls_out and not plan.exhaustive and plan.groups.get("use_correctness", True):
            seconds += known.get("correctness", 0.0)
    for name in dict.fromkeys(plan.rerank for plan in part.experiment.retrievers.values() if plan.rerank):
        if not (out / "rerankers" / name / "done.json").is_file():
            seconds += _RERANKER * known.get("train-retriever", 0.0)
    if exhaustive and not (out / "correctness.jsonl").is_file():
        seconds += known.get("correctness", 0.0) / _PRUNED
    return seconds


def _cells_left(part: Part, known: Mapping[str, float]) -> float:
    config = part.experiment
    benchmarks = 1 + len(config.benchmarks) + len(config.worlds)
    agents = len(config.agents) * max(len(config.max_searches), 1)
    of_each = sum(_RERANKED if plan.rerank else 1 for plan in config.retrievers.values())
    cells = len(config.evaluate.get("cells", ())) or agents * of_each
    done = len(list(Path(config.out, "evaluation").glob("*/result.json")))
    return max(cells * benchmarks - done, 0) * _num_questions(part) * known["question"]
