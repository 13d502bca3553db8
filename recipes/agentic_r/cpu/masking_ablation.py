"""PPO on the generated benchmark with and without masking of the passages, on a CPU: curves and a table.

    .venv/bin/python recipes/agentic_r/cpu/masking_ablation.py --out runs/masking [--seeds 0,1,2] [key=value ...]

Every run starts from the quick start's agent and searches with MiniLM; `key=value` changes a field of `ppo.yaml`
(steps=2 tries the whole in small). Runs that are finished are not done again. Written to OUT: `curves.jsonl` (one line
per run and step), `table.md`, `curves.svg`, and a folder for each run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from agentic_r_plugin.agent import launch
from agentic_r_plugin.cli import reported
from agentic_r_plugin.config import load_config
from agentic_r_plugin.errors import TrainingError
from agentic_r_plugin.report.charts import HEIGHT, WIDTH, Series, line_chart
from agentic_r_plugin.search.indexing import index
from agentic_r_plugin.search.service import server
from agentic_r_plugin.store import StepLog, atomic_path, dump_line
from agentic_r_plugin.world import generate

HERE = Path(__file__).resolve().parent
AGENT = HERE.parents[1] / "quickstart" / "agent"
ARMS = {"masked": True, "not masked": False}
SHOWN = {
    "agentic_r/em": "reward (EM)",
    "agentic_r/search_turns": "searches",
    "agentic_r/malformed_share": "malformed share",
    "actor/entropy": "entropy",
    "actor/grad_norm": "gradient norm",
    "validation_em": "validation EM",
}
"""Metric -> its name in table and curves."""
_STYLE = (
    "svg{font-family:sans-serif}.grid{stroke:#ddd}.tick,.axis,.title{fill:#555;font-size:11px}.raw{fill:none;"
    "stroke:var(--c);opacity:.35}.curve{fill:none;stroke:var(--c);stroke-width:2}.dot{fill:var(--c)}.hover{opacity:0}"
    ".c0{--c:#1f6fb2}.c1{--c:#c8452b}"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train every arm with every seed, then write curves and table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    parser.add_argument("--train-questions", type=int, default=600)
    parser.add_argument("--dev-questions", type=int, default=120)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    world = generate.WorldConfig(
        out=str(options.out), train_questions=options.train_questions, dev_questions=options.dev_questions
    )
    generate.run(world, resume=True)
    benchmark = options.out / world.name
    searched = index.IndexConfig(
        corpus=str(benchmark / "corpus.jsonl"), retriever="builtin:minilm", out=str(options.out / "index")
    )
    index.run(searched, resume=True)
    service = server.ServeConfig(index=searched.out, port=0)
    lines: list[dict[str, Any]] = []
    with server.running_service(service) as url:
        for seed in map(int, options.seeds.split(",")):
            for arm, masked in ARMS.items():
                lines += train(options.out, benchmark, url, arm, masked, seed, options.overrides)
                write(options.out, lines)
    print((options.out / "table.md").read_text(encoding="utf-8"))
    return 0


def train(
    out: Path, benchmark: Path, url: str, arm: str, masked: bool, seed: int, overrides: Sequence[str]
) -> list[dict[str, Any]]:
    """One run, or what is left of it; a run that training stopped (a loss that is not finite) counts as it is."""
    folder = out / f"{arm.replace(' ', '_')}-seed{seed}"
    print(f"[{arm}, seed {seed}]", file=sys.stderr, flush=True)
    config = load_config(
        launch.TrainAgentConfig,
        HERE / "ppo.yaml",
        overrides,
        values={
            "model": str(AGENT),
            "questions": str(benchmark / "train.jsonl"),
            "validation": str(benchmark / "dev.jsonl"),
            "retrieval_url": url,
            "out": str(folder),
            "seed": seed,
            "mask_observations": masked,
        },
    )
    stopped = ""
    try:
        launch.run(config, resume=True)
    except TrainingError as error:
        if "not finite" not in str(error):
            raise
        stopped = str(error)
        print(f"[{arm}, seed {seed}] {error}", file=sys.stderr)
    return [curve_line(arm, seed, record, stopped) for record in StepLog(folder / "metrics.jsonl").read()]


def curve_line(arm: str, seed: int, record: dict[str, Any], stopped: str) -> dict[str, Any]:
    """What table and curves show of one step."""
    validated = [value for name, value in record.items() if name.startswith("val-core/") and "/acc/" in name]
    shown = {name: record[name] for name in SHOWN if record.get(name) is not None}
    shown |= {"validation_em": validated[0]} if validated else {}
    return {"arm": arm, "seed": seed, "step": record["step"], "stopped": stopped, **shown}


def write(out: Path, lines: Sequence[dict[str, Any]]) -> None:
    """`curves.jsonl`, `table.md` and `curves.svg` of the runs so far."""
    for name, content in (
        ("curves.jsonl", "".join(dump_line(line).decode() for line in lines)),
        ("table.md", table(lines)),
        ("curves.svg", chart(lines)),
    ):
        with atomic_path(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")


def table(lines: Sequence[dict[str, Any]]) -> str:
    """One row per run: means over the first and the last quarter of its steps, validation before and after."""
    head = ["arm", "seed", "steps", *(f"{SHOWN[name]}: first quarter -> last" for name in SHOWN if "/" in name)]
    rows = [[*head, "validation EM: before -> after"], ["---"] * (len(head) + 1)]
    for arm, seed in dict.fromkeys((line["arm"], line["seed"]) for line in lines):
        run = [line for line in lines if (line["arm"], line["seed"]) == (arm, seed)]
        trained = [line for line in run if line["step"] > 0]
        cells = [_change([line[name] for line in trained if name in line]) for name in SHOWN if "/" in name]
        validated = [line["validation_em"] for line in run if "validation_em" in line]
        steps = f"{len(trained)}" + (" (stopped)" if any(line["stopped"] for line in run) else "")
        last = f"{validated[0]:.3f} -> {validated[-1]:.3f}" if len(validated) > 1 else "-"
        rows.append([arm, str(seed), steps, *cells, last])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _change(values: Sequence[float]) -> str:
    if not values:
        return "-"
    quarter = max(1, len(values) // 4)
    return f"{statistics.fmean(values[:quarter]):.3f} -> {statistics.fmean(values[-quarter:]):.3f}"


def chart(lines: Sequence[dict[str, Any]]) -> str:
    """One self-contained SVG: one panel per metric, one curve per run, coloured by arm."""
    panels = []
    for number, (metric, name) in enumerate(SHOWN.items()):
        svg = line_chart(name, list(_series(lines, metric)), x_label="step", y_label=name)
        if svg:
            place = f'x="{number % 3 * WIDTH}" y="{30 + number // 3 * HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
            panels.append(svg.replace("<svg ", f"<svg {place} ", 1))
    key = "".join(
        f'<g class="c{color}"><rect x="{10 + color * 120}" y="8" width="12" height="12" fill="var(--c)"/>'
        f'<text class="title" x="{28 + color * 120}" y="18">{arm}</text></g>'
        for color, arm in enumerate(ARMS)
    )
    size = f'viewBox="0 0 {3 * WIDTH} {30 + 2 * HEIGHT}" width="{3 * WIDTH}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{_STYLE}</style>{key}{"".join(panels)}</svg>\n'


def _series(lines: Sequence[dict[str, Any]], metric: str) -> Iterable[Series]:
    for color, arm in enumerate(ARMS):
        for seed in sorted({line["seed"] for line in lines if line["arm"] == arm}):
            points = [
                (float(line["step"]), float(line[metric]))
                for line in lines
                if (line["arm"], line["seed"]) == (arm, seed) and metric in line
            ]
            yield Series(name=f"{arm}, seed {seed}", points=points, color=color, marked=metric == "validation_em")


if __name__ == "__main__":
    with reported("masking_ablation.py"):
        sys.exit(main())
