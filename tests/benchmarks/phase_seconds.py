"""The time budget of loops: `python tests/benchmarks/phase_seconds.py NAME=RUN ...` prints phase, seconds in each run.

RUN is a run folder of `agentic-r iterate`, whose `costs.jsonl` is read. `--yaml` prints one run's seconds as the
section `expected_seconds` of a loop.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from agentic_r_plugin.store import read_lines

Seconds = dict[tuple[int, str], float]


def phase_seconds(run: Path) -> Seconds:
    """Seconds of each finished phase, by iteration and name."""
    return {(line["iteration"], line["phase"]): line["seconds"] for _, line in read_lines(run / "costs.jsonl")}


def table(runs: dict[str, Seconds]) -> str:
    """Markdown: a row for each phase, the sum last."""
    phases = list(dict.fromkeys(phase for seconds in runs.values() for phase in seconds))
    lines = [f"| iteration | phase | {' | '.join(runs)} |", f"|---|---|{'---|' * len(runs)}"]
    for phase in phases:
        cells = [f"{seconds[phase]:.0f}" if phase in seconds else "-" for seconds in runs.values()]
        lines.append(f"| {phase[0]} | {phase[1]} | {' | '.join(cells)} |")
    totals = " | ".join(f"{sum(seconds.values()):.0f}" for seconds in runs.values())
    return "\n".join([*lines, f"| | all | {totals} |"])


def section(seconds: Seconds) -> str:
    """`expected_seconds` for a loop's YAML file."""
    rows = []
    for iteration in sorted({iteration for iteration, _ in seconds}):
        items = ", ".join(f"{name}: {took:.0f}" for (number, name), took in seconds.items() if number == iteration)
        rows.append(f'  "{iteration}": {{{items}}}')
    return "\n".join(["expected_seconds:", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--yaml", action="store_true", help="of the first run, as the section expected_seconds")
    options = parser.parse_args()
    runs = {name: phase_seconds(Path(run)) for name, _, run in (item.partition("=") for item in options.runs)}
    print(section(next(iter(runs.values()))) if options.yaml else table(runs))


if __name__ == "__main__":
    main()
