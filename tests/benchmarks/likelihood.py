"""Correctness by likelihood of the gold answer, against rollouts: does it agree, and what does it save?

    python tests/benchmarks/likelihood.py --out DIR --questions 40

Runs the data stages as commands on the quick start's generated benchmark with its agent (BM25, relevance from the gold
documents), with correctness exhaustive, pruned, by likelihood, and pruned in order of likelihood. Prints the rank
correlation of likelihood and exact correctness, the share of queries with the same positive, and rollouts, tokens and
CPU seconds of each. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy.stats import spearmanr

from agentic_r_plugin.records import Correctness, Group
from agentic_r_plugin.store import read_json, read_records
from tests.benchmarks.pruning import command, embedded, quickstart_rollouts, stages, start

WAYS = {
    "exhaustive": ["--exhaustive"],
    "pruned": [],
    "likelihood, all": ["--exhaustive", "method=likelihood"],
    "likelihood": ["method=likelihood"],
    "pruned, in its order": ["order=likelihood"],
    "first success, in its order": ["--exhaustive", "order=likelihood"],
}
"""Name -> flags of `correctness`. Without relevance the last one stops at any correct candidate."""


def main() -> None:
    start(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter), compare)


def compare(args: argparse.Namespace, out: Path) -> None:
    """Run everything and print the tables."""
    file, scored, agent = stages(args, out, embedded(out / "benchmark"), quickstart_rollouts(out))
    made, positives, rows = {}, {}, []
    for name, how in WAYS.items():
        stem = name.replace(", ", "-").replace(" ", "-")
        made[name], groups = out / f"correctness-{stem}.jsonl", out / f"groups-{stem}.jsonl"
        relevance = [] if "--exhaustive" in how else ["--relevance", file["relevance"]]
        cpu_s = time.process_time()
        command("correctness", *scored, *relevance, *how, *agent, "--out", str(made[name]))
        seconds = time.process_time() - cpu_s
        line = ["--candidates", file["candidates"], "--correctness", str(made[name]), "--out", str(groups)]
        rule = ["--no-use-relevance"] if name.startswith("first") else ["--relevance", file["relevance"]]
        command("groups", *line, *rule, f"num_negatives={args.negatives}")
        positives[name] = {(group.id, group.turn): group.positive for group in read_records(groups, Group)}
        report = read_json(f"{made[name]}.report.json")
        rows.append((name, report, seconds, len(positives[name])))
    print("\n| correctness | rollouts | prompt tokens | cached | generated tokens | CPU seconds | groups |")
    print("|---|---|---|---|---|---|---|")
    for name, report, seconds, groups in rows:
        counts = (report[key] for key in ("rollouts", "prompt_tokens", "cached_tokens", "generated_tokens"))
        print(f"| {name} | {' | '.join(f'{count:,}' for count in counts)} | {seconds:.1f} | {groups} |")
    exact = by_query(made["exhaustive"])
    agreement(exact, by_query(made["likelihood, all"]))
    wanted = positives["exhaustive"]
    for name in ("likelihood", "pruned, in its order"):
        both = wanted.keys() & positives[name].keys()
        same = sum(wanted[key] == positives[name][key] for key in both)
        right = sum(exact[key][positives[name][key]].em for key in positives[name])
        print(
            f"{name}: {len(positives[name])} groups, {len(both)} of the {len(wanted)} of rollouts; "
            f"same positive {same}, correct by rollout {right}"
        )


def by_query(path: Path) -> dict[tuple[str, int], dict[str, Correctness]]:
    """Records of each query, by passage."""
    found: dict[tuple[str, int], dict[str, Correctness]] = defaultdict(dict)
    for record in read_records(path, Correctness):
        found[record.id, record.turn][record.passage_id] = record
    return found


def agreement(
    exact: Mapping[tuple[str, int], Mapping[str, Correctness]],
    likely: Mapping[tuple[str, int], Mapping[str, Correctness]],
) -> None:
    """Print rank correlation and the place of the first correct candidate, over queries with both outcomes."""
    correlations, areas, places, expected = [], [], [], []
    for key, records in exact.items():
        passages = [one for one in records if likely[key][one].log_likelihood is not None]
        em = [records[one].em for one in passages]
        if 0 < sum(em) < len(em):
            scores = [likely[key][one].log_likelihood or 0.0 for one in passages]
            correlations.append(float(spearmanr(scores, em).statistic))
            areas.append(area(scores, em))
            ranked = sorted(range(len(em)), key=lambda place: -scores[place])
            places.append(1 + next(rank for rank, place in enumerate(ranked) if em[place]))
            expected.append((len(em) + 1) / (sum(em) + 1))
    if correlations:
        mean = statistics.fmean
        print(
            f"\n{len(exact)} queries, {len(correlations)} with correct and incorrect candidates; there: Spearman "
            f"{mean(correlations):.3f}, AUC {mean(areas):.3f}; the first success is number {mean(places):.2f} in the "
            f"order of likelihood, {mean(expected):.2f} in a random order"
        )


def area(scores: Sequence[float], em: Sequence[int]) -> float:
    """Probability that a correct candidate scores above an incorrect one (a tie counts half)."""
    pairs = [
        (a, b)
        for a, right in zip(scores, em, strict=True)
        if right
        for b, other in zip(scores, em, strict=True)
        if not other
    ]
    return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)


if __name__ == "__main__":
    main()
