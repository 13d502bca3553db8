"""Pruned against exhaustive correctness with real rollouts: are the groups the same, and what was saved?

    python tests/benchmarks/pruning.py --out DIR       # the embedded benchmark and its agent
    python tests/benchmarks/pruning.py --out DIR --data $AGENTIC_R_DATA/hotpotqa --skip 160 --questions 16 \\
        --agent runs/hotpotqa_cpu/agent --rollouts recipes/hotpotqa_cpu/rollouts.yaml

Runs the data stages as commands (BM25, relevance from the gold documents), correctness both ways, and compares the two
groups files byte for byte; fails when they differ. Stopped, the same command goes on. Prints rollouts, tokens and
seconds of both and what pruning saved.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from agentic_r_plugin.cli import main as agentic_r
from agentic_r_plugin.config import load_config
from agentic_r_plugin.iterate import IterateConfig
from agentic_r_plugin.store import read_json

ROOT = Path(__file__).parents[2]


def command(*arguments: str) -> None:
    """One command of the package, resumed where it was begun."""
    print("agentic-r", *arguments, flush=True)
    if agentic_r([*arguments, "--resume"]) != 0:
        raise SystemExit(f"agentic-r {arguments[0]} failed")


def embedded(out: Path) -> Path:
    """The quick start's generated benchmark."""
    loop = load_config(IterateConfig, ROOT / "recipes" / "quickstart" / "loop.yaml")
    command("world", "--out", str(out), *(f"{key}={value}" for key, value in loop.world.items()))
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
    parser.add_argument("--out", type=Path, default=None, help="folder to keep; none: a temporary one")
    parser.add_argument("--data", type=Path, default=None, help="benchmark in FlashRAG layout; none: the embedded one")
    parser.add_argument("--agent", default=str(ROOT / "recipes" / "quickstart" / "agent"))
    parser.add_argument("--rollouts", type=Path, default=None, help="YAML with protocol, limits, topk, llm")
    parser.add_argument("--skip", type=int, default=0, help="questions at the start that are left out")
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--negatives", type=int, default=15)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        compare(args, out)


def compare(args: argparse.Namespace, out: Path) -> None:
    """Run everything and print the table."""
    data = args.data or embedded(out / "benchmark")
    rollouts = args.rollouts or quickstart_rollouts(out)
    questions, corpus = out / "questions.jsonl", str(data / "corpus.jsonl")
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    questions.write_text("".join(lines[args.skip : args.skip + args.questions]), encoding="utf-8")
    search = ["search.backend=bm25", f"search.corpus={corpus}"]
    agent = ["--config", str(rollouts), f"llm.model={args.agent}", *search]
    file = {name: str(out / f"{name}.jsonl") for name in ("trajectories", "candidates", "relevance")}
    protocol = next(line for line in rollouts.read_text().splitlines() if line.startswith("protocol:")).split()[1]
    command("trajectories", "--in", str(questions), "--out", file["trajectories"], *agent)
    command("candidates", "--in", file["trajectories"], "--out", file["candidates"], f"protocol={protocol}", *search)
    scored = ["--candidates", file["candidates"], "--corpus", corpus]
    command("relevance", *scored, "--questions", str(questions), "--out", file["relevance"])
    reports = {}
    for name, how in (("pruned", ["--relevance", file["relevance"]]), ("exhaustive", ["--exhaustive"])):
        correctness, groups = str(out / f"correctness-{name}.jsonl"), str(out / f"groups-{name}.jsonl")
        command("correctness", *scored, *how, *agent, "--out", correctness)
        made_of = ["--candidates", file["candidates"], "--relevance", file["relevance"], "--correctness", correctness]
        command("groups", *made_of, "--out", groups, f"num_negatives={args.negatives}")
        reports[name] = read_json(correctness + ".report.json")
    same = (out / "groups-pruned.jsonl").read_bytes() == (out / "groups-exhaustive.jsonl").read_bytes()
    count = read_json(out / "groups-pruned.jsonl.report.json")["records"]
    queries = reports["pruned"]["read"]
    print(f"\n{queries} queries, {count} groups, identical: {same}\n")
    print(f"| {'':16} | pruned | exhaustive | share |\n|---|---|---|---|")
    for name in ("rollouts", "reused", "prompt_tokens", "generated_tokens", "searches", "seconds"):
        pruned, whole = (reports[kind][name] for kind in ("pruned", "exhaustive"))
        print(f"| {name:16} | {pruned:,} | {whole:,} | {f'{pruned / whole:.3f}' if whole else '-'} |")
    for kind, report in reports.items():
        print(f"prefix-cache hit rate, {kind}: {report.get('prefix_hit_rate', 0)}")
    if not same:
        raise SystemExit("pruned and exhaustive correctness gave different groups")


if __name__ == "__main__":
    main()
