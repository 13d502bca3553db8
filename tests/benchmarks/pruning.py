"""Correctness pruned two ways and exhaustive, with real rollouts: are the groups the same, and what was saved?

    python tests/benchmarks/pruning.py --out DIR       # the embedded benchmark and its agent
    python tests/benchmarks/pruning.py --out DIR --ties 0.8       # a judge that gives most candidates equal scores
    python tests/benchmarks/pruning.py --out DIR --data $AGENTIC_R_DATA/hotpotqa --skip 160 --questions 16 \\
        --agent runs/hotpotqa_cpu/agent --rollouts recipes/hotpotqa_cpu/rollouts.yaml

Runs the data stages as commands (BM25, relevance from the gold documents) with correctness pruned up to the first
correct candidate (the paper's rule), pruned by whole levels of equal relevance (the released code's rule), and
exhaustive. Prints rollouts, tokens and CPU seconds of each, and compares the groups files byte for byte; fails when
they differ. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agentic_r_plugin.cli import main as agentic_r
from agentic_r_plugin.config import load_config
from agentic_r_plugin.iterate import IterateConfig
from agentic_r_plugin.store import read_json

ROOT = Path(__file__).parents[2]
WAYS = {"pruned": ["preset=paper"], "levels": ["preset=released_code"], "exhaustive": []}


def command(*arguments: str) -> None:
    """One command of the package, resumed where it was begun."""
    print("agentic-r", *arguments, flush=True)
    if agentic_r([*arguments, "--resume"]) != 0:
        raise SystemExit(f"agentic-r {arguments[0]} failed")


def embedded(out: Path) -> Path:
    """The quick start's generated benchmark."""
    loop = load_config(IterateConfig, ROOT / "recipes" / "quickstart" / "loop.yaml")
    asked = {key: value for key, value in vars(loop.world).items() if key != "out" and value is not None}
    command("world", "--out", str(out), *(f"{key}={value}" for key, value in asked.items()))
    return next(path.parent for path in out.glob("*/corpus.jsonl"))


def quickstart_rollouts(out: Path) -> Path:
    """The quick start's protocol and limits as a configuration of `trajectories` and `correctness`."""
    loop = load_config(IterateConfig, ROOT / "recipes" / "quickstart" / "loop.yaml")
    limits = ", ".join(f"{key}: {value}" for key, value in vars(loop.limits).items())
    file = out / "rollouts.yaml"
    file.write_text(f"protocol: {loop.protocol}\ntopk: {loop.topk}\nlimits: {{{limits}}}\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="benchmark in FlashRAG layout; none: the embedded one")
    parser.add_argument("--rollouts", type=Path, default=None, help="YAML with protocol, limits, topk, llm")
    parser.add_argument("--skip", type=int, default=0, help="questions at the start that are left out")
    parser.add_argument("--ties", type=float, default=0.0, help="share of candidates whose relevance is made a tie")
    start(parser, compare)


def start(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace, Path], None]) -> None:
    """Add the flags of every comparison, parse, and do the work in `--out` or a temporary folder."""
    parser.add_argument("--out", type=Path, default=None, help="folder to keep; none: a temporary one")
    parser.add_argument("--agent", default=str(ROOT / "recipes" / "quickstart" / "agent"))
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--negatives", type=int, default=15)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        work(args, out)


def stages(
    args: argparse.Namespace, out: Path, data: Path, rollouts: Path, skip: int = 0, scorer: Sequence[str] = ()
) -> tuple[dict[str, str], list[str], list[str]]:
    """Run the stages before `correctness`; returns their files, and its flags for candidates and agent."""
    questions, corpus = out / "questions.jsonl", str(data / "corpus.jsonl")
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    questions.write_text("".join(lines[skip : skip + args.questions]), encoding="utf-8")
    search = ["search.backend=bm25", f"search.corpus={corpus}"]
    agent = ["--config", str(rollouts), f"llm.model={args.agent}", *search]
    file = {name: str(out / f"{name}.jsonl") for name in ("trajectories", "candidates", "relevance")}
    protocol = next(line for line in rollouts.read_text().splitlines() if line.startswith("protocol:")).split()[1]
    command("trajectories", "--in", str(questions), "--out", file["trajectories"], *agent)
    command("candidates", "--in", file["trajectories"], "--out", file["candidates"], f"protocol={protocol}", *search)
    scored = ["--candidates", file["candidates"], "--corpus", corpus]
    command("relevance", *scored, "--questions", str(questions), "--out", file["relevance"], *scorer)
    return file, scored, agent


def compare(args: argparse.Namespace, out: Path) -> None:
    """Run everything and print the table."""
    data = args.data or embedded(out / "benchmark")
    ties = ["--scorer", "noisy", f"options.rate={args.ties}", "options.ways=[tie]"] if args.ties else []
    file, scored, agent = stages(args, out, data, args.rollouts or quickstart_rollouts(out), args.skip, ties)
    reports, spent = {}, {}
    for name, how in WAYS.items():
        correctness = str(out / f"correctness-{name}.jsonl")
        pruned_by = ["--exhaustive"] if name == "exhaustive" else ["--relevance", file["relevance"], *how]
        cpu_s = time.process_time()
        command("correctness", *scored, *pruned_by, *agent, "--out", correctness)
        spent[name] = round(time.process_time() - cpu_s, 1)
        made_of = ["--candidates", file["candidates"], "--relevance", file["relevance"], "--correctness", correctness]
        for preset in ("paper", "released_code") if name != "pruned" else ("paper",):
            groups = str(out / f"groups-{name}-{preset}.jsonl")
            command("groups", *made_of, "--out", groups, f"num_negatives={args.negatives}", "--preset", preset)
        reports[name] = read_json(correctness + ".report.json")
    report(out, reports, spent)


def report(out: Path, reports: dict[str, dict[str, Any]], spent: dict[str, float]) -> None:
    """Print the table; SystemExit where groups differ."""
    whole = reports["exhaustive"]
    print(f"\n{whole['read']} queries, {whole['candidates']:,} candidates\n")
    print("| | pruned | share | levels | share | exhaustive |\n|---|---|---|---|---|---|")
    for name in ("rollouts", "reused", "searches", "prompt_tokens", "cached_tokens", "generated_tokens"):
        cells = [f"{reports[way][name]:,} | {reports[way][name] / max(whole[name], 1):.3f}" for way in WAYS]
        print(f"| {name} | {' | '.join(cells[:2])} | {whole[name]:,} |")
    # A run that was resumed did part of its work in an earlier process.
    print(f"| CPU seconds of this process | {spent['pruned']} | | {spent['levels']} | | {spent['exhaustive']} |")
    same = {}
    for preset, ways in (("paper", ("pruned", "levels")), ("released_code", ("levels",))):
        wanted = (out / f"groups-exhaustive-{preset}.jsonl").read_bytes()
        same |= {f"{preset}, {way}": (out / f"groups-{way}-{preset}.jsonl").read_bytes() == wanted for way in ways}
        print(f"groups of {preset}: {wanted.count(bytes([10]))}")
    print("same groups as exhaustive:", same)
    if not all(same.values()):
        raise SystemExit("pruned and exhaustive correctness gave different groups")


if __name__ == "__main__":
    main()
