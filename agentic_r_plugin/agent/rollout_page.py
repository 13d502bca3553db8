"""`agentic-r show-rollouts`: sampled trajectories of a training run as one HTML page, masked tokens coloured.

The page is self-contained, without network access or scripts. It is built from `rollouts/STEP.jsonl`, which verl's own
rollout viewer (`scripts/rollout_viewer.py RUN/rollouts`) can also open.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from agentic_r_plugin.agent.metrics import RolloutLog
from agentic_r_plugin.config import setting
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.storage.claim import require_new
from agentic_r_plugin.store import atomic_path

_STYLE = """
:root { color-scheme: light dark; --model: #1a7f37; --masked: #8250df; --masked-back: #8250df1f; --rule: #8888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; border-bottom: 1px solid var(--rule); }
details { margin: .6rem 0; border: 1px solid var(--rule); border-radius: 6px; padding: .4rem .8rem; }
summary { cursor: pointer; } summary small { opacity: .75; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace; }
.prompt { opacity: .6; } .model { color: var(--model); }
.masked { color: var(--masked); background: var(--masked-back); }
.tag { font: 11px system-ui, sans-serif; opacity: .7; user-select: none; }
.right { color: var(--model); font-weight: 600; }
"""


@dataclass(frozen=True, kw_only=True)
class ShowRolloutsConfig:
    """Sampled trajectories of a training as one HTML page, masked tokens coloured."""

    run: str = setting("folder of a training (train-agent's out)", default="???")
    out: str = setting("the page; empty: rollouts.html in the run's folder", default="")
    steps: list[int] = setting("which steps; none: first, last and 8 between", default_factory=list)


def run(config: ShowRolloutsConfig, *, resume: bool = False) -> None:
    """Write the page.

    Raises:
        ConfigError: the run has no rollouts, or none for a requested step.
        OutputExistsError: the page exists and `resume` is False.
    """
    log = RolloutLog(Path(config.run) / "rollouts")
    known = log.steps()
    missing = sorted(set(config.steps) - set(known))
    if not known and (trained := sorted(Path(config.run).glob("iteration-*/agent/rollouts"))):
        raise ConfigError(f"{config.run}: a run of iterate; give run={trained[-1].parent}")
    if not known or missing:
        raise ConfigError(
            f"{log.folder}: expected rollouts of step {missing[0] if missing else 1}, found "
            + (f"steps {known[0]} to {known[-1]}" if known else "none")
        )
    out = Path(config.out or Path(config.run) / "rollouts.html")
    if not resume:
        require_new(out)
    rollouts = {step: log.read(step) for step in config.steps or spread(known, 10)}
    with atomic_path(out) as temporary:
        temporary.write_text(page(Path(config.run).name, rollouts), encoding="utf-8")
    print(f"show-rollouts: {out}", file=sys.stderr)


def spread(steps: Sequence[int], most: int) -> list[int]:
    """Select at most `most` steps: the first, the last, and evenly spaced ones between.

    >>> spread(range(1, 101), 4)
    [1, 34, 67, 100]
    """
    if len(steps) <= most:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def page(title: str, rollouts: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    """Render the page; `rollouts` maps each step to the lines of its file."""
    sections = "\n".join(
        f"<h2>Step {step}</h2>\n" + "\n".join(_trajectory(line) for line in lines) for step, lines in rollouts.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}: rollouts</title>'
        f"<style>{_STYLE}</style>\n<h1>{escape(title)}: sampled trajectories</h1>\n"
        '<p><span class="model">Tokens the model wrote</span>, and '
        '<span class="masked">tokens the environment wrote</span>, which are masked in every loss unless '
        "mask_observations is off. A trajectory whose search failed is masked as a whole. "
        '<span class="tag">[n]</span>: tokens of the run of text after it.</p>\n'
        f"{sections}\n</html>\n"
    )


def _trajectory(line: Mapping[str, Any]) -> str:
    total = max(1, sum(segment["tokens"] for segment in line["segments"]))
    masked = total - line["trained_tokens"]
    answer = "no answer" if line["answer"] is None else f"“{line['answer']}”"
    mark = ' class="right"' if line["em"] else ""
    parts = ", ".join(f"{name} {value:g}" for name, value in line.get("reward", {}).items())
    reward = f"reward {line['score']:.3g} ({escape(parts)}); " if parts else ""
    summary = (
        f"{escape(line['question'])} <span{mark}>{escape(answer)}</span> <small>gold: "
        f"{escape(' / '.join(line['golden_answers']))}; {reward}{line['stop_reason']}, {len(line['turns'])} searches, "
        f"{total} tokens, {masked / total:.0%} masked</small>"
    )
    body = "".join(
        f'<span class="tag">[{segment["tokens"]}]</span>'
        f'<span class="{"model" if segment["by_model"] else "masked"}">{escape(segment["text"])}</span>'
        for segment in line["segments"]
    )
    prompt = f'<span class="prompt">{escape(line["input"])}</span>'
    return f"<details><summary>{summary}</summary><pre>{prompt}{body}</pre></details>"
